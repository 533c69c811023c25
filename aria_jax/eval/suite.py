"""Every labelled task in a folder of performances, probed with several feature sets."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from aria_jax.embed.table import Embeddings
from aria_jax.eval.probe import ProbeResult, paired_difference, probe
from data_pipeline.errors import UserError

BASELINE, UNTRAINED = "statistics", "untrained"
BASELINES = (BASELINE, UNTRAINED)
"""Feature sets that the others are held against."""
COUNTED = ("pitch-class", BASELINE)
"""Those that no network made."""
CATEGORIES = {
    "genre": "genre",
    "form": "form",
    "period": "period",
    "composer": "composer",
    "pianist": "Pianist8",
    "emotion": "VG-MIDI",
}
"""What can be predicted, in the paper's order: label -> the benchmark whose figures stand below."""


_PAPER = {
    "MERT": "83.00/83.00 63.89/63.90 69.50/68.94 69.60/69.30 65.06/65.18 45.45/40.37",
    "M3": "85.10/85.10 69.88/70.12 71.20/70.81 71.90/71.72 81.93/81.48 54.55/46.13",
    "CLaMP 3": "89.10/89.10 77.79/77.97 80.60/80.20 84.50/84.46 80.72/79.76 45.45/36.53",
    "Aria_Emb": "92.40/92.40 82.45/82.57 84.70/84.69 90.50/90.49 91.57/92.38 63.64/63.96",
    "Aria_Ft": "93.20/93.20 87.53/87.59 86.50/86.53 96.30/96.32 91.56/92.03 68.18/69.55",
}  # section 4 of the Aria paper: genre, form, period, composer, Pianist8, VG-MIDI
QUOTED: dict[str, dict[str, str]] = {
    **{
        model: dict(
            zip(
                CATEGORIES.values(), (cell.replace("/", " / ") for cell in row.split()), strict=True
            )
        )
        for model, row in _PAPER.items()
    },
    "M3 by its authors, 2502.10362": {"Pianist8": "91.57 / 91.99", "VG-MIDI": "70.73"},
    "CLaMP 2 and 3 on ABC, 2502.10362": {"VG-MIDI": "80.49"},
    "Aria, 5 folds x 5 seeds, 2608.11026": {"Pianist8": "86.1 ± 4.3"},
    "MAJEPPA, 5 folds x 5 seeds, 2608.11026": {"Pianist8": "86.8 ± 5.2"},
    "CLaMP 3, 5 folds x 5 seeds, 2608.11026": {"Pianist8": "80.8"},
    "Moonbeam, 5 folds x 5 seeds, 2608.11026": {"Pianist8": "80.6"},
    "MusicBERT, 5 folds x 5 seeds, 2608.11026": {"Pianist8": "78.6"},
    "Moonbeam with LoRA, 2505.15559": {
        **{"Pianist8": "81.1 / 80.4", "PiJAMA30": "64.9 / 59.6"},
        **{"EMOPIA": "63.6 / 62.3", "GPM30": "54.1 / 47.0"},
    },
    "MidiBERT CP": {"EMOPIA": "67.89"},
}
"""Published figures, accuracy / macro-F1 in % per file, by benchmark; the later ones by the arXiv
numbers named, each by a protocol of its own."""


@dataclass(frozen=True)
class Rule:
    """How a known data set is judged.

    Attributes:
        min_per_class: files that a class must have; None as asked.
        max_classes: the most frequent ones that are kept; None for all.
        quoted: the benchmark whose figures stand below.
    """

    min_per_class: int | None = None
    max_classes: int | None = None
    quoted: str = ""


RULES = {
    ("pijama", "pianist"): Rule(min_per_class=20, quoted="PiJAMA30"),
    ("giantmidi", "composer"): Rule(max_classes=30, quoted="GPM30"),
    ("emopia", "emotion"): Rule(quoted="EMOPIA"),
}
"""By data set and label."""


@dataclass(frozen=True)
class BenchmarkTask:
    """Something to predict.

    Attributes:
        folder: data set, the first folder of its files; "" for files that lie in none, several
            joined by "+".
        category: the label.
        rows: of the tables, int [N].
        labels, groups: of these rows.
        splits: the published "train"/"val"/"test" of this category; None cross-validates.
        notes: which files and classes were taken, for people.
    """

    folder: str
    category: str
    rows: np.ndarray
    labels: list[str]
    groups: list[str]
    splits: list[str] | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people, e.g. "asap composer"."""
        return f"{self.folder} {self.category}".strip()

    @property
    def quoted(self) -> str:
        """The benchmark in `QUOTED` that it is like."""
        rule = RULES.get((self.folder, self.category), Rule())
        return rule.quoted or CATEGORIES[self.category]


@dataclass(frozen=True)
class _Labelled:
    """What the table says of one category, and how its tasks are made."""

    table: Embeddings
    category: str
    min_per_class: int
    max_per_class: int | None
    seed: int

    @cached_property
    def values(self) -> list[str | None]:
        """Label of each row."""
        return self.table.column(self.category)

    def task(
        self, folder: str, rows: Sequence[int], of_file: Sequence[str | None] | None
    ) -> BenchmarkTask | None:
        """The task of these rows, judged by the split `of_file`; None with fewer than two classes.

        Classes that are too small are left out, then those beyond the most frequent ones, then
        files beyond `max_per_class`.
        """
        rule, values = RULES.get((folder, self.category), Rule()), self.values
        at_least = rule.min_per_class or self.min_per_class
        rows = [i for i in rows if values[i] and (of_file is None or of_file[i])]
        sizes = Counter(values[i] for i in rows)
        kept = [c for c, n in sorted(sizes.items(), key=lambda item: (-item[1], str(item[0])))
                if n >= at_least][: rule.max_classes]  # fmt: skip
        if len(kept) < 2:
            return None
        notes = []
        if len(kept) < len(sizes):
            notes.append(f"of {len(sizes)} classes those of {at_least} files or more")
        if rule.max_classes is not None and len(kept) == rule.max_classes:
            notes.append(f"the {rule.max_classes} most frequent")
        rows = [i for i in rows if values[i] in kept]
        drawn = self._draw(rows, of_file)
        if len(drawn) < len(rows):
            what = f"{self.max_per_class} of a class" + " to learn from" * (of_file is not None)
            notes.append(f"at most {what}: {len(drawn)} of {len(rows)} files, seed {self.seed}")
        compositions = self.table.column("composition")
        groups = [compositions[i] or self.table.path[i] for i in drawn]
        if of_file is None:
            of_class = {(values[i], group) for i, group in zip(drawn, groups, strict=True)}
            alone = sum(n == 1 for n in Counter(value for value, _ in of_class).values())
            if alone:
                one = "one composition or album, which cannot be learnt and judged"
                notes.append(f"classes that are of {one}: {alone}")
        return BenchmarkTask(
            folder=folder,
            category=self.category,
            rows=np.array(drawn),
            labels=[values[i] or "" for i in drawn],
            groups=groups,
            splits=None if of_file is None else [of_file[i] or "" for i in drawn],
            notes=tuple(notes),
        )

    def _draw(self, rows: list[int], of_file: Sequence[str | None] | None) -> list[int]:
        """At most `max_per_class` rows of each class; all of those that a split judges."""
        if self.max_per_class is None:
            return rows
        rng = np.random.default_rng(self.seed)
        of_class: dict[str | None, list[int]] = {}
        for i in rows:
            learnt = of_file is None or of_file[i] == "train"
            of_class.setdefault(self.values[i] if learnt else None, []).append(i)
        drawn = of_class.pop(None, [])
        for members in of_class.values():
            drawn = [*drawn, *rng.permutation(members)[: self.max_per_class].tolist()]
        return sorted(drawn)


def find_tasks(
    table: Embeddings,
    *,
    min_per_class: int = 10,
    max_per_class: int | None = None,
    published_split: bool = True,
    cross_validate: Collection[str] = (),
    seed: int = 0,
) -> list[BenchmarkTask]:
    """The tasks that a table's labels make possible, in the paper's order.

    A data set (top folder; all files where those would make no task) has one where half of its
    files carry the label, or where the label came with a published split: its own ({category:
    {split: {path: label}}}), or a label "split" of the files that names "train" and another. Data
    sets of one genre each make one task together.

    Args:
        max_per_class: files of a class that are drawn, at most.
        published_split: whether the label "split" is the data set's; False where it is our own
            division of files.
        cross_validate: data sets whose published split is not used.
        seed: of the draw.

    Raises:
        UserError: there is none, or `cross_validate` names no data set.
    """
    folders = [path.split("/")[0] if "/" in path else "" for path in table.path]
    rows_of = {name: [i for i, f in enumerate(folders) if f == name] for name in set(folders)}
    if unknown := sorted(set(cross_validate) - set(folders)):
        known = ", ".join(sorted(rows_of))
        raise UserError(f"no data set {unknown[0]!r} to cross-validate; there are {known}")
    # Where there is none, the folders are perhaps the classes of one data set.
    for sets in (rows_of, {"": list(range(len(folders)))}):
        tasks = []
        for category in CATEGORIES:
            labelled = _Labelled(table, category, min_per_class, max_per_class, seed)
            values, of_one = labelled.values, {}
            for folder, mine in sorted(sets.items()):
                of_file = table.column(f"{category}_split")
                own = any(of_file[i] for i in mine)
                if published_split and not own:
                    of_file = table.column("split")
                names = {of_file[i] for i in mine if values[i]} - {None}
                split = own or ("train" in names and len(names) > 1)
                rows = [i for i in mine if values[i]]
                if not own and 2 * len(rows) < len(mine):
                    continue
                used = of_file if split and folder not in cross_validate else None
                task = labelled.task(folder, rows, used)
                if task is not None:
                    tasks.append(task)
                elif category == "genre" and len({values[i] for i in rows}) == 1:
                    of_one[folder] = rows
            rows = [i for mine in of_one.values() for i in mine]
            together = labelled.task("+".join(of_one), rows, None)
            if together is not None:
                note = "each class is of other data sets, whose making may be told apart too"
                tasks.append(replace(together, notes=(*together.notes, note)))
        if tasks:
            return tasks
    raise UserError(
        f"no task found: none of the labels {', '.join(CATEGORIES)} has two classes of "
        f"{min_per_class} files; is there a metadata.json beside the files?"
    )


Results = Mapping[str, Mapping[str, ProbeResult]]
"""By feature set and task name."""


def run_suite(
    tasks: Sequence[BenchmarkTask],
    features: Mapping[str, np.ndarray],
    *,
    classifier: str = "logistic",
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """Results by feature set and task name.

    Args:
        features: name -> float [N, E], rows as in the table the tasks were found in; nan in rows
            of no task.
        folds, repeats: of cross-validation, see `probe`.
        progress: told (fits done, fits in all).

    Raises:
        UserError: a task has fewer compositions than folds.
    """
    results: dict[str, dict[str, ProbeResult]] = {name: {} for name in features}
    fits = [repeats * (folds if task.splits is None else 1) for task in tasks]
    done, total = 0, sum(fits) * len(features)
    for task, n_fits in zip(tasks, fits, strict=True):
        for name, matrix in features.items():

            def report(n: int, _: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + n, total)

            results[name][task.name] = probe(
                matrix[task.rows],
                task.labels,
                groups=task.groups,
                splits=task.splits,
                folds=folds,
                repeats=repeats,
                min_per_class=1,
                seed=seed,
                classifier=classifier,
                progress=report,
            )
            done += n_fits
    return results


def rows_by_path(
    table: Embeddings, paths: Sequence[str], name: str, needed: Collection[int] | None = None
) -> np.ndarray:
    """Embeddings in the order of `paths`; nan where one is missing and not `needed`.

    Raises:
        UserError: some of those needed (default: of all) are missing.
    """
    at = {path: i for i, path in enumerate(table.path)}
    wanted = range(len(paths)) if needed is None else needed
    missing = [paths[i] for i in wanted if paths[i] not in at]
    if missing:
        raise UserError(
            f"{name}: no embedding of {len(missing)} of {len(wanted)} files, such as {missing[0]}; "
            "its column path must be relative to the same folder"
        )
    found = np.full((len(paths), table.embedding.shape[1]), np.nan, table.embedding.dtype)
    rows = [i for i, path in enumerate(paths) if path in at]
    found[rows] = table.embedding[[at[paths[i]] for i in rows]]
    return found


def markdown_table(tasks: Sequence[BenchmarkTask], results: Results) -> str:
    """Accuracy / macro-F1 in % by feature set and task, quoted rows last and marked."""
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
        if any(task.quoted in quoted for task in tasks):
            lines.append([f"{name} (quoted)", *(quoted.get(task.quoted, "") for task in tasks)])
    return (
        f"{_table(lines)}\n\nAccuracy / macro-F1 in %, per file.\n\n"
        + "".join(f"- {_how(task, first[task.name])}\n" for task in tasks)
        + f"\n{_chosen(tasks, results)}"
        + "".join(_differences(tasks, results, than) for than in BASELINES)
        + "Quoted rows are published figures, each on its own data, classes and protocol (arXiv "
        "numbers; without one, the Aria paper): context, not a comparison.\n"
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _how(task: BenchmarkTask, result: ProbeResult) -> str:
    """How a task is judged, and on what."""
    repeats = len(result.accuracies)
    seeds = f", mean of {repeats} seeds" if repeats > 1 else ""
    how = f"{sum(result.chosen.values()) // repeats}-fold, no composition on both sides{seeds}"
    if result.split is not None:
        how = f'published split, judged on "{result.split}"{seeds}'
        if result.shared_groups:
            how += f"; {result.shared_groups} compositions are on both sides of it"
    what = f"{result.n_test} files judged, {len(result.classes)} classes, {how}"
    return "; ".join([f"{task.name}: {what}", *task.notes])


def _chosen(tasks: Sequence[BenchmarkTask], results: Results) -> str:
    """Where classifiers were chosen among, how often it was the forest."""
    text = ""
    for name, row in results.items():
        counts = {task.name: row[task.name].chosen for task in tasks}
        if any("forest" in n for n in counts.values()):
            fits = (f"{t} {n.get('forest', 0)}/{sum(n.values())}" for t, n in counts.items())
            text += f"- {name}: {', '.join(fits)}\n"
    return f"Fits by a random forest, not logistic regression:\n\n{text}\n" if text else ""


def _differences(tasks: Sequence[BenchmarkTask], results: Results, than: str) -> str:
    """Accuracy of each feature set less that of `than`, in points, where it is there."""
    names = [name for name in results if name != than and (than == BASELINE or name not in COUNTED)]
    if than not in results or not names:
        return ""
    lines = [["accuracy less that of " + than, *(task.name for task in tasks)]]
    lines.append(["---"] * len(lines[0]))
    for name in names:
        cells = []
        for task in tasks:
            found = paired_difference(results[name][task.name], results[than][task.name])
            gain, low, high = (100 * value for value in found)
            cells.append(f"{gain:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append([name, *cells])
    note = "Points, with 95 % intervals bootstrapped over compositions, seeds averaged."
    return f"{_table(lines)}\n\n{note}\n\n"
