"""Figures of the Aria paper, quoted to stand beside ours; nothing here is computed."""

QUOTED: dict[str, dict[str, tuple[float, float]]] = {
    "MERT": {
        "genre": (83.00, 83.00),
        "form": (63.89, 63.90),
        "period": (69.50, 68.94),
        "composer": (69.60, 69.30),
        "pianist": (65.06, 65.18),
        "emotion": (45.45, 40.37),
    },
    "M3": {
        "genre": (85.10, 85.10),
        "form": (69.88, 70.12),
        "period": (71.20, 70.81),
        "composer": (71.90, 71.72),
        "pianist": (81.93, 81.48),
        "emotion": (54.55, 46.13),
    },
    "CLaMP 3": {
        "genre": (89.10, 89.10),
        "form": (77.79, 77.97),
        "period": (80.60, 80.20),
        "composer": (84.50, 84.46),
        "pianist": (80.72, 79.76),
        "emotion": (45.45, 36.53),
    },
    "Aria_Emb": {
        "genre": (92.40, 92.40),
        "form": (82.45, 82.57),
        "period": (84.70, 84.69),
        "composer": (90.50, 90.49),
        "pianist": (91.57, 92.38),
        "emotion": (63.64, 63.96),
    },
    "Aria_Ft": {
        "genre": (93.20, 93.20),
        "form": (87.53, 87.59),
        "period": (86.50, 86.53),
        "composer": (96.30, 96.32),
        "pianist": (91.56, 92.03),
        "emotion": (68.18, 69.55),
    },
}
"""model -> category -> (accuracy, macro-F1) in %, per file (tables of the paper, section 4)."""

CATEGORIES = {
    "genre": "genre",
    "form": "form",
    "period": "period",
    "composer": "composer",
    "pianist": "Pianist8",
    "emotion": "VG-MIDI",
}
"""The paper's tasks in its order: label -> column heading."""
