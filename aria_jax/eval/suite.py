"""Every labelled task in a folder of performances, probed with several feature sets."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aria_jax.embed.table import Embeddings
from aria_jax.eval.paper import CATEGORIES, QUOTED
from aria_jax.eval.probe import ProbeResult, paired_difference, probe
from data_pipeline.errors import UserError

FOLDS = 5
YARDSTICK = "statistics"
"""The feature set that the others are held against."""


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


def find_tasks(table: Embeddings, *, min_per_class: int = 10) -> list[BenchmarkTask]:
    """The tasks that a table's labels make possible, in the paper's order.

    A data set (top folder) has a task where half of its files carry the label, or where the label
    came with a published split ({category: {split: {path: label}}}).

    Raises:
        UserError: there is none.
    """
    folders = [path.split("/")[0] if "/" in path else "" for path in table.path]
    tasks = []
    for category in CATEGORIES:
        values, own_split = table.column(category), table.column(f"{category}_split")
        for folder in sorted(set(folders)):
            mine = [i for i, f in enumerate(folders) if f == folder]
            split = any(own_split[i] for i in mine)
            rows = [i for i in mine if values[i] and (own_split[i] or not split)]
            sizes = Counter(values[i] for i in rows)
            enough = split or 2 * len(rows) >= len(mine)
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
                    splits=[own_split[i] or "" for i in rows] if split else None,
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
    readout: str = "logistic",
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
                readout=readout,
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
    """Accuracy of each feature set less that of the yardstick, in points, where it is there."""
    if YARDSTICK not in results:
        return ""
    lines = [["accuracy less that of " + YARDSTICK, *(task.name for task in tasks)]]
    lines.append(["---"] * len(lines[0]))
    for name in results:
        if name == YARDSTICK:
            continue
        cells = []
        for task in tasks:
            found = paired_difference(results[name][task.name], results[YARDSTICK][task.name])
            gain, low, high = (100 * value for value in found)
            cells.append(f"{gain:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append([name, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nPoints, with 95 % intervals bootstrapped over compositions.\n\n"
