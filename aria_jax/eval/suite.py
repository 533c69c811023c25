"""Every labelled task in a folder of performances, probed with several feature sets."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aria_jax.embed.table import Embeddings
from aria_jax.eval.probe import ProbeResult, paired_difference, probe
from data_pipeline.errors import UserError

FOLDS = 5
BASELINE = "statistics"
"""The feature set that the others are held against."""
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
"""Figures of the Aria paper, section 4, quoted: model -> category -> (accuracy, macro-F1) in %, per
file."""

CATEGORIES = {
    "genre": "genre",
    "form": "form",
    "period": "period",
    "composer": "composer",
    "pianist": "Pianist8",
    "emotion": "VG-MIDI",
}
"""The paper's tasks in its order: label -> column heading."""


@dataclass(frozen=True)
class BenchmarkTask:
    """Something to predict.

    Attributes:
        folder: data set, the first folder of its files; "" for files that lie in none.
        category: the label.
        rows: of the tables, int [N].
        labels, groups: of these rows.
        splits: the published "train"/"val"/"test" of this category; None cross-validates.
    """

    folder: str
    category: str
    rows: np.ndarray
    labels: list[str]
    groups: list[str]
    splits: list[str] | None

    @property
    def name(self) -> str:
        """For people, e.g. "asap composer"."""
        return f"{self.folder} {self.category}".strip()

    @property
    def protocol(self) -> str:
        """How it is judged."""
        if self.splits is not None:
            return "published split"
        return f"{FOLDS}-fold, no composition on both sides"


def find_tasks(
    table: Embeddings, *, min_per_class: int = 10, published_split: bool = True
) -> list[BenchmarkTask]:
    """The tasks that a table's labels make possible, in the paper's order.

    A data set (top folder) has a task where half of its files carry the label, or where the label
    came with a published split: its own ({category: {split: {path: label}}}), or a label "split" of
    the files that names "train" and another.

    Args:
        published_split: whether the label "split" is the data set's; False where it is our own
            division of files.

    Raises:
        UserError: there is none.
    """
    folders = [path.split("/")[0] if "/" in path else "" for path in table.path]
    tasks = []
    for category in CATEGORIES:
        values, own_split = table.column(category), table.column(f"{category}_split")
        for folder in sorted(set(folders)):
            mine = [i for i, f in enumerate(folders) if f == folder]
            of_file, own = own_split, any(own_split[i] for i in mine)
            if published_split and not own:
                of_file = table.column("split")
            names = {of_file[i] for i in mine if values[i]} - {None}
            split = own or ("train" in names and len(names) > 1)
            rows = [i for i in mine if values[i] and (of_file[i] or not split)]
            sizes = Counter(values[i] for i in rows)
            enough = own or 2 * len(rows) >= len(mine)
            if not enough or sum(n >= min_per_class for n in sizes.values()) < 2:
                continue
            compositions = table.column("composition")
            tasks.append(
                BenchmarkTask(
                    folder=folder,
                    category=category,
                    rows=np.array(rows),
                    labels=[values[i] or "" for i in rows],
                    groups=[compositions[i] or table.path[i] for i in rows],
                    splits=[of_file[i] or "" for i in rows] if split else None,
                )
            )
    if not tasks:
        raise UserError(
            "no task found: none of the labels "
            f"{', '.join(CATEGORIES)} has two classes of {min_per_class} files; "
            "is there a metadata.json beside the files?"
        )
    return tasks


def run_suite(
    tasks: Sequence[BenchmarkTask],
    features: Mapping[str, np.ndarray],
    *,
    classifier: str = "logistic",
    min_per_class: int = 10,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """Results by feature set and task name.

    Args:
        features: name -> float [N, E], rows as in the table the tasks were found in.
    """
    results: dict[str, dict[str, ProbeResult]] = {name: {} for name in features}
    done, total = 0, len(tasks) * len(features)
    for task in tasks:
        for name, matrix in features.items():
            results[name][task.name] = probe(
                matrix[task.rows],
                task.labels,
                groups=task.groups,
                splits=task.splits,
                folds=FOLDS,
                min_per_class=min_per_class,
                seed=seed,
                classifier=classifier,
            )
            done += 1
            if progress is not None:
                progress(done, total)
    return results


def rows_by_path(table: Embeddings, paths: Sequence[str], name: str) -> np.ndarray:
    """Embeddings in the order of `paths`.

    Raises:
        UserError: some are missing.
    """
    at = {path: i for i, path in enumerate(table.path)}
    missing = [path for path in paths if path not in at]
    if missing:
        raise UserError(
            f"{name}: no embedding of {len(missing)} of {len(paths)} files, such as {missing[0]}; "
            "its column path must be relative to the same folder"
        )
    return table.embedding[[at[path] for path in paths]]


def markdown_table(
    tasks: Sequence[BenchmarkTask], results: Mapping[str, Mapping[str, ProbeResult]]
) -> str:
    """Accuracy / macro-F1 in % by feature set and task, the paper's rows last and marked."""
    head = ["features", *(task.name for task in tasks)]
    lines = [head, ["---"] * len(head)]
    first = next(iter(results.values()))
    lines.append(
        ["majority class", *(f"{100 * first[t.name].majority_accuracy:.1f}" for t in tasks)]
    )
    for name, row in results.items():
        cells = (row[task.name] for task in tasks)
        lines.append([name, *(f"{100 * r.accuracy:.1f} / {100 * r.macro_f1:.1f}" for r in cells)])
    for name, quoted in QUOTED.items():
        pairs = (quoted[task.category] for task in tasks)
        lines.append([f"{name} (quoted)", *(f"{a:.2f} / {f:.2f}" for a, f in pairs)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [
        f"- {t.name}: {first[t.name].n_test} files judged, {len(first[t.name].classes)} classes, "
        f"{t.protocol}"
        for t in tasks
    ]
    return (
        f"{table}\n\nAccuracy / macro-F1 in %, per file.\n\n" + "\n".join(notes) + "\n\n"
        f"{_differences(tasks, results)}"
        "Quoted rows are the paper's, on its own data and classes: context, not a comparison.\n"
    )


def _differences(
    tasks: Sequence[BenchmarkTask], results: Mapping[str, Mapping[str, ProbeResult]]
) -> str:
    """Accuracy of each feature set less that of the baseline, in points, where it is there."""
    if BASELINE not in results:
        return ""
    lines = [["accuracy less that of " + BASELINE, *(task.name for task in tasks)]]
    lines.append(["---"] * len(lines[0]))
    for name in results:
        if name == BASELINE:
            continue
        cells = []
        for task in tasks:
            found = paired_difference(results[name][task.name], results[BASELINE][task.name])
            gain, low, high = (100 * value for value in found)
            cells.append(f"{gain:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append([name, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nPoints, with 95 % intervals bootstrapped over compositions.\n\n"
