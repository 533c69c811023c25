"""How much a simple classifier reads from frozen embeddings."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aria_jax.eval.classifiers import CLASSIFIERS, Chosen, Fit, Predict, plain_logistic
from data_pipeline.errors import UserError

BOOTSTRAPS = 1000


@dataclass(frozen=True)
class ProbeResult:
    """Scores of held-out files.

    Attributes:
        classes: in the order of `confusion`.
        accuracy, macro_f1: in 0..1, means over repeats.
        accuracy_ci, macro_f1_ci: 95 % intervals, bootstrapped over compositions.
        accuracies: of each repeat.
        per_class: precision, recall, f1 and number of files of each class.
        confusion: int [C, C], true class by row, summed over repeats.
        chosen: how many fits each classifier was chosen for.
        majority_accuracy: of always predicting the most frequent training class.
        n_train, n_test: files; with folds every file is a test file once.
        left_out: classes with too few files, and how many they have.
        split: which of given splits was judged; None with folds.
        shared_groups: compositions that a given split has on both sides; 0 with folds.
        correct: share of repeats in which each held-out file was predicted correctly, float
            [n_test]; in the order of their names, so that results of different features can be
            paired.
        group: number of the composition of each of these files, int [n_test].
    """

    classes: tuple[str, ...]
    accuracy: float
    macro_f1: float
    accuracy_ci: tuple[float, float]
    macro_f1_ci: tuple[float, float]
    accuracies: tuple[float, ...]
    per_class: dict[str, dict[str, float]]
    confusion: np.ndarray
    chosen: dict[str, int]
    majority_accuracy: float
    n_train: int
    n_test: int
    left_out: dict[str, int]
    split: str | None
    shared_groups: int
    correct: np.ndarray
    group: np.ndarray

    @property
    def per_class_f1(self) -> dict[str, float]:
        """F1 by class."""
        return {name: row["f1"] for name, row in self.per_class.items()}

    def summary(self) -> dict[str, Any]:
        """Everything but the files, as plain JSON types."""
        found = {name: v for name, v in asdict(self).items() if name not in ("correct", "group")}
        return {**found, "confusion": self.confusion.tolist()}


@dataclass(frozen=True)
class Shots:
    """Scores with few files to learn from.

    Attributes:
        shots, fewest: training files of each class, and of one that has not as many.
        accuracy, macro_f1: means over draws.
        accuracy_std: standard deviation over draws.
    """

    shots: int
    accuracy: float
    accuracy_std: float
    macro_f1: float
    fewest: int


@dataclass(frozen=True)
class _Problem:
    """Features [R, E], classes [R], composition [R] and file [R] of the rows used; how many folds,
    or the given split as a pair of file numbers.
    """

    classes: tuple[str, ...]
    left_out: dict[str, int]
    x: np.ndarray
    y: np.ndarray
    group: np.ndarray
    file: np.ndarray
    folds: int
    given: tuple[np.ndarray, np.ndarray] | None
    split: str | None

    def train_test_splits(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Files to learn from and files to judge, fold by fold."""
        if self.given is not None:
            return [self.given]
        return _folds(self.y[self.first_row], self.group[self.first_row], self.folds, seed)

    @property
    def first_row(self) -> np.ndarray:
        """A row of each file."""
        return np.unique(self.file, return_index=True)[1]

    def fitted(self, fit: Fit, files: np.ndarray, seed: int) -> Predict:
        """Learns from all rows of `files`."""
        rows = np.isin(self.file, files)
        y = self.y[rows]
        if len(set(y)) == 1:
            return lambda x: np.full(len(x), y[0])
        return fit(self.x[rows], y, self.group[rows], seed)

    def means(self, files: np.ndarray) -> np.ndarray:
        """Mean of the rows of each of `files`."""
        number = np.searchsorted(files, self.file[rows := np.isin(self.file, files)])
        total = np.zeros((len(files), self.x.shape[1]))
        np.add.at(total, number, self.x[rows])
        return total / np.bincount(number, minlength=len(files))[:, None]


def held_out_splits(splits: Sequence[str | None]) -> list[str]:
    """The names of splits to judge on, "test" first: every name but "train"."""
    names = {name for name in splits if name and name != "train"}
    return sorted(names, key=lambda name: (name != "test", name))


def probe(
    features_NxE: np.ndarray,
    labels: Sequence[str | None],
    *,
    groups: Sequence[str] | None = None,
    splits: Sequence[str | None] | None = None,
    judge: str | None = None,
    files: Sequence[str] | None = None,
    folds: int = 5,
    repeats: int = 1,
    min_per_class: int = 10,
    seed: int = 0,
    classifier: str = "logistic",
    progress: Callable[[int, int], None] | None = None,
) -> ProbeResult:
    """Fits a classifier on some files and scores it on others.

    Args:
        features_NxE: float.
        labels: class of each row; None leaves the row out.
        groups: composition of each row: with folds, none is ever on both sides.
        splits: "train" to learn from, other names to judge on, None for neither; without, folds.
        judge: which of several splits is judged; None for the first of `held_out_splits`, as
            files for validation and for testing are not one set.
        files: file of each row, where rows are slices: all slices are learnt from, files are
            judged by the mean of theirs (as the reference does).
        repeats: with the seeds `seed`, `seed` + 1, …: of the folds, and of the classifier's own
            draws. Scores are means over them.
        min_per_class: classes with fewer files are left out.
        classifier: name in `CLASSIFIERS`.
        progress: told (folds done, folds in all), those of all repeats.

    Raises:
        UserError: fewer than two classes are left, or one side of the split is empty.
    """
    if classifier not in CLASSIFIERS:
        raise UserError(f"no classifier {classifier!r}; there are {', '.join(CLASSIFIERS)}")
    problem = _problem(features_NxE, labels, groups, splits, judge, files, folds, min_per_class)
    y_F = problem.y[problem.first_row]
    y_pred_RxF, majority_RxF = np.full((2, repeats, len(y_F)), -1)
    chosen: Counter[str] = Counter()
    done = 0
    for repeat in range(repeats):
        divisions = problem.train_test_splits(seed + repeat)
        for train, test in divisions:
            predict = problem.fitted(CLASSIFIERS[classifier], train, seed + repeat)
            chosen[predict.name if isinstance(predict, Chosen) else classifier] += 1
            y_pred_RxF[repeat, test] = predict(problem.means(test))
            majority_RxF[repeat, test] = np.bincount(y_F[train]).argmax()
            done += 1
            if progress is not None:
                progress(done, repeats * len(divisions))
    train, test = divisions[0]
    group = problem.group[problem.first_row]
    judged = np.flatnonzero(y_pred_RxF[0] >= 0)
    return ProbeResult(
        **_scores(y_F[judged], y_pred_RxF[:, judged], group[judged], problem.classes, seed),
        classes=problem.classes,
        chosen=dict(chosen),
        majority_accuracy=float((y_F[judged] == majority_RxF[:, judged]).mean()),
        n_train=len(train),
        n_test=len(judged),
        left_out=problem.left_out,
        split=problem.split,
        shared_groups=len(set(group[train]) & set(group[test])),
    )


def few_shot(
    features_NxE: np.ndarray,
    labels: Sequence[str | None],
    shots: Sequence[int],
    *,
    groups: Sequence[str] | None = None,
    splits: Sequence[str | None] | None = None,
    judge: str | None = None,
    files: Sequence[str] | None = None,
    folds: int = 5,
    min_per_class: int = 10,
    seed: int = 0,
    draws: int = 10,
) -> list[Shots]:
    """Logistic regression (C = 1) from few files of each class, over random draws of them.

    Arguments and errors as for `probe`.
    """
    problem = _problem(features_NxE, labels, groups, splits, judge, files, folds, min_per_class)
    y_of_file, rng = problem.y[problem.first_row], np.random.default_rng(seed)
    divisions, curve = problem.train_test_splits(seed), []
    for k in shots:
        scores, fewest = [], k
        for draw in range(draws):
            train, test = divisions[draw % len(divisions)]
            chosen = [
                rng.permutation(train[y_of_file[train] == c])[:k] for c in set(y_of_file[train])
            ]
            fewest = min(fewest, *map(len, chosen))
            predict = problem.fitted(plain_logistic, np.concatenate(chosen), seed)
            y_pred = predict(problem.means(test))
            counts = confusion_counts(y_of_file[test], y_pred, len(problem.classes))
            scores.append((accuracy(counts), macro_f1(counts)))
        mean, spread = np.mean(scores, axis=0), np.std(scores, axis=0)
        curve.append(Shots(k, float(mean[0]), float(spread[0]), float(mean[1]), fewest))
    return curve


def _problem(
    features_NxE: np.ndarray,
    labels: Sequence[str | None],
    groups: Sequence[str] | None,
    splits: Sequence[str | None] | None,
    judge: str | None,
    files: Sequence[str] | None,
    folds: int,
    min_per_class: int,
) -> _Problem:
    """Checks the arguments and takes what can be used."""
    n = len(labels)
    names = np.array([str(i) for i in range(n)] if files is None else files, dtype=object)
    label_of = {name: label for name, label in zip(names, labels, strict=True)}
    known = Counter(label for label in label_of.values() if label is not None)
    left_out = {label: n for label, n in sorted(known.items()) if n < min_per_class}
    classes = tuple(sorted(set(known) - set(left_out)))
    if len(classes) < 2:
        raise UserError(
            f"probing needs two classes of at least {min_per_class} files; "
            f"there are {dict(known) or 'no labels'}"
        )
    use = np.array([label in classes for label in labels])
    if splits is not None:
        use &= np.array([split is not None for split in splits])
    rows = np.flatnonzero(use)
    _, file = np.unique(names[rows].astype(str), return_inverse=True)
    group = (names if groups is None else np.array(groups, dtype=object))[rows].astype(str)
    y = np.array([classes.index(labels[i]) for i in rows.tolist()])
    first, given = np.unique(file, return_index=True)[1], None
    if splits is not None:
        judge = judge or next(iter(held_out_splits(splits)), None)
        of_file = np.array(splits, dtype=object)[rows[first]]
        given = np.flatnonzero(of_file == "train"), np.flatnonzero(of_file == judge)
        if not all(map(len, given)):
            raise UserError(
                f"the split column puts all files on one side: {dict(Counter(of_file))}; it needs "
                '"train" and another'
            )
    x = np.asarray(features_NxE, np.float64)[rows]
    split = judge if given is not None else None
    return _Problem(classes, left_out, x, y, group, file, folds, given, split)


def _folds(y: np.ndarray, group: np.ndarray, folds: int, seed: int) -> list:
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2 or len(set(group)) < folds or max(Counter(y.tolist()).values()) < folds:
        raise UserError(f"{folds} folds need {folds} compositions, and as many files of a class")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(y, y, group))


def confusion_counts(y_true: np.ndarray, y_pred: np.ndarray, n_classes: int) -> np.ndarray:
    """How often each class (row) was predicted as each (column): int64 [..., C, C] of [..., N].

    As scikit-learn's, for many resamples at once.
    """
    pair = y_true * n_classes + y_pred
    flat = pair.reshape(-1, pair.shape[-1])
    offset = np.arange(len(flat))[:, None] * n_classes**2
    counts = np.bincount((flat + offset).reshape(-1), minlength=len(flat) * n_classes**2)
    return counts.reshape(*pair.shape[:-1], n_classes, n_classes)


def accuracy(confusion_CxC: np.ndarray) -> np.ndarray:
    """Share of correct predictions, [...] of [..., C, C]."""
    return np.trace(confusion_CxC, axis1=-2, axis2=-1) / confusion_CxC.sum((-2, -1))


def f1_per_class(confusion_CxC: np.ndarray) -> np.ndarray:
    """F1 of each class, [..., C]; nan for one that neither occurs nor is predicted."""
    hits = np.diagonal(confusion_CxC, axis1=-2, axis2=-1)
    total = confusion_CxC.sum(-2) + confusion_CxC.sum(-1)
    return np.divide(2 * hits, total, out=np.full(total.shape, np.nan), where=total > 0)


def macro_f1(confusion_CxC: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that occur or are predicted, [...]."""
    return np.nanmean(f1_per_class(confusion_CxC), axis=-1)


def _scores(
    y_true_F: np.ndarray,
    y_pred_RxF: np.ndarray,
    group_F: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """The part of a result that predictions decide, of R repeats on F files."""
    from scipy.sparse import coo_array

    n_classes, (repeats, n_files) = len(classes), y_pred_RxF.shape
    counts_RxCxC = confusion_counts(np.tile(y_true_F, (repeats, 1)), y_pred_RxF, n_classes)
    group_F = np.unique(group_F, return_inverse=True)[1]
    n_groups = int(group_F.max()) + 1
    drawn_BxG = np.stack([np.bincount(d, minlength=n_groups) for d in _drawn(n_groups, seed)])
    resampled = []
    for y_pred_F in y_pred_RxF:
        at = (y_true_F * n_classes + y_pred_F, group_F)
        of_group = coo_array((np.ones(n_files), at), shape=(n_classes**2, n_groups)).tocsr()
        resampled.append((of_group @ drawn_BxG.T).T.reshape(BOOTSTRAPS, n_classes, n_classes))

    def interval(values_RxB: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(values_RxB.mean(0), [0.025, 0.975])
        return float(low), float(high)

    return {
        "accuracy": float(accuracy(counts_RxCxC).mean()),
        "macro_f1": float(macro_f1(counts_RxCxC).mean()),
        "accuracy_ci": interval(np.stack([accuracy(counts) for counts in resampled])),
        "macro_f1_ci": interval(np.stack([macro_f1(counts) for counts in resampled])),
        "accuracies": tuple(accuracy(counts_RxCxC).tolist()),
        "per_class": _per_class(classes, counts_RxCxC.sum(0), repeats),
        "confusion": counts_RxCxC.sum(0),
        "correct": (y_pred_RxF == y_true_F).mean(0),
        "group": group_F,
    }


def _drawn(n_groups: int, seed: int) -> np.ndarray:
    """The compositions of each resample, int [BOOTSTRAPS, G]."""
    return np.random.default_rng(seed).integers(0, n_groups, (BOOTSTRAPS, n_groups))


def paired_difference(
    one: ProbeResult, other: ProbeResult, *, seed: int = 0
) -> tuple[float, float, float]:
    """How much higher the accuracy of `one` is, and its 95 % interval.

    Bootstrapped over compositions, of which performances are not independent of each other; each
    file counts with its mean over repeats.

    Raises:
        ValueError: the two judged different files.
    """
    if len(one.correct) != len(other.correct) or (one.group != other.group).any():
        raise ValueError("results of different files cannot be paired")
    gain = one.correct - other.correct
    n_groups = int(one.group.max()) + 1
    total_G = np.bincount(one.group, gain, n_groups)
    size_G = np.bincount(one.group, minlength=n_groups)
    drawn = _drawn(n_groups, seed)
    low, high = np.quantile(total_G[drawn].sum(1) / size_G[drawn].sum(1), [0.025, 0.975])
    return float(gain.mean()), float(low), float(high)


def _per_class(
    classes: Sequence[str], counts: np.ndarray, repeats: int
) -> dict[str, dict[str, float]]:
    hits, f1 = np.diagonal(counts), np.nan_to_num(f1_per_class(counts))
    predicted, true = np.maximum(counts.sum(0), 1), np.maximum(counts.sum(1), 1)
    return {
        name: {
            "precision": float(hits[i] / predicted[i]),
            "recall": float(hits[i] / true[i]),
            "f1": float(f1[i]),
            "n": int(counts[i].sum()) // repeats,
        }
        for i, name in enumerate(classes)
    }
