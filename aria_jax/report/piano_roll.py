"""Piano rolls: pitch over time, loudness as opacity, one colour per part."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.midi import Performance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b5b92", "#d1622b", "#3d8a5f", "#8c4a86")


@dataclass(frozen=True)
class Part:
    """Notes of one colour.

    Attributes:
        label: what the legend says.
        pitch, velocity: int arrays [N].
        start_ms, end_ms: float or int arrays [N].
    """

    label: str
    pitch: np.ndarray
    velocity: np.ndarray
    start_ms: np.ndarray
    end_ms: np.ndarray

    @classmethod
    def of(cls, performance: Performance, label: str, offset_ms: int = 0) -> "Part":
        """All notes of a performance, shifted by `offset_ms`."""
        notes = performance.notes
        return cls(
            label=label,
            pitch=notes["pitch"].astype(int),
            velocity=notes["velocity"].astype(int),
            start_ms=performance.ms(notes["start"]) + offset_ms,
            end_ms=performance.ms(notes["end"]) + offset_ms,
        )


def draw_piano_roll(axes: "Axes", parts: Sequence[Part]) -> None:
    """Draws `parts` into matplotlib `axes`, time in seconds."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    for part, colour in zip(parts, COLOURS * (len(parts) // len(COLOURS) + 1), strict=False):
        left, right = part.start_ms / 1000, np.maximum(part.end_ms, part.start_ms + 30) / 1000
        low, high = part.pitch - 0.45, part.pitch + 0.45
        corners = np.stack(
            [np.stack(xy, -1) for xy in ((left, low), (left, high), (right, high), (right, low))],
            axis=1,
        )
        rgba = np.tile(to_rgba(colour), (len(part.pitch), 1))
        rgba[:, 3] = 0.35 + 0.65 * part.velocity / 127
        axes.add_collection(PolyCollection(list(corners), facecolors=rgba, linewidths=0))
    filled = [part for part in parts if len(part.pitch)]
    if filled:
        axes.set_xlim(
            min(p.start_ms.min() for p in filled) / 1000, max(p.end_ms.max() for p in filled) / 1000
        )
        axes.set_ylim(
            min(p.pitch.min() for p in filled) - 2, max(p.pitch.max() for p in filled) + 2
        )
    axes.set_yticks([24, 36, 48, 60, 72, 84, 96], [f"C{octave}" for octave in range(1, 8)])
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds")
    if len(parts) > 1:
        handles = [Patch(color=c, label=p.label) for p, c in zip(parts, COLOURS, strict=False)]
        axes.legend(handles=handles, loc="upper right", fontsize="small", framealpha=0.8)


def piano_roll(parts: Sequence[Part], size_inches: tuple[float, float] = (10, 3)) -> "Figure":
    """One piano roll as a matplotlib figure (no global state, safe in threads)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    draw_piano_roll(figure.add_subplot(), parts)
    return figure


def save_piano_roll(path: str | Path, parts: Sequence[Part]) -> None:
    """Writes a piano roll; the suffix of `path` (.png, .svg, .pdf) chooses the format."""
    piano_roll(parts).savefig(path, dpi=130)


def piano_roll_svg(parts: Sequence[Part], size_inches: tuple[float, float] = (10, 3)) -> str:
    """A piano roll as an `<svg>` element to put inside an HTML page."""
    return figure_svg(piano_roll(parts, size_inches))


def figure_svg(figure: "Figure") -> str:
    """Any matplotlib figure as an `<svg>` element, without the XML preamble."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt makes ids, and so the whole report, reproducible.
    with matplotlib.rc_context({"svg.hashsalt": "aria-jax", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
