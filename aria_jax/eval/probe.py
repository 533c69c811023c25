"""How much a linear classifier reads from frozen embeddings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aria_jax.eval.classification import accuracy, confusion_counts, f1_per_class
from data_pipeline.errors import UserError

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class ProbeResult:
    """Scores of held-out files.

    Attributes:
        classes: in the order of `confusion`.
        accuracy, macro_f1: in 0..1.
        accuracy_ci, macro_f1_ci: 95 % intervals, bootstrapped over files.
        per_class_f1: by class.
        confusion: int [C, C], true class by row.
        majority_accuracy: of always answering the most frequent training class.
        n_train, n_test: files; with folds every file is a test file once.
        left_out: classes with too few files, and how many they have.
    """

    classes: tuple[str, ...]
    accuracy: float
    macro_f1: float
    accuracy_ci: tuple[float, float]
    macro_f1_ci: tuple[float, float]
    per_class_f1: dict[str, float]
    confusion: np.ndarray
    majority_accuracy: float
    n_train: int
    n_test: int
    left_out: dict[str, int]


def probe(
    features_NxE: np.ndarray,
    labels: Sequence[str | None],
    *,
    groups: Sequence[str] | None = None,
    splits: Sequence[str | None] | None = None,
    folds: int = 5,
    min_per_class: int = 10,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression on standardised features, C chosen by inner cross-validation.

    Args:
        features_NxE: float.
        labels: class of each file; None leaves the file out.
        groups: composition of each file: none is ever on both sides of a split.
        splits: "train" for files to learn from, anything else to test on; without, `folds`-fold
            cross-validation.
        min_per_class: classes with fewer files are left out.

    Raises:
        UserError: fewer than two classes are left, or one side of the split is empty.
    """
    known = Counter(label for label in labels if label is not None)
    left_out = {label: n for label, n in sorted(known.items()) if n < min_per_class}
    use = np.array([label is not None and label not in left_out for label in labels], bool)
    classes = tuple(sorted(set(known) - set(left_out)))
    if len(classes) < 2:
        raise UserError(
            f"probing needs two classes of at least {min_per_class} files; "
            f"there are {dict(known) or 'no labels'}"
        )
    x = np.asarray(features_NxE, np.float64)[use]
    y = np.array([classes.index(label) for label in labels if label in classes])
    group = np.array(
        [i if groups is None else groups[i] for i in np.flatnonzero(use)], dtype=object
    ).astype(str)
    if splits is not None:
        train = np.array([splits[i] == "train" for i in np.flatnonzero(use)])
        if train.all() or not train.any():
            raise UserError("the split column puts all files on one side")
        sides = [(np.flatnonzero(train), np.flatnonzero(~train))]
    else:
        sides = _folds(x, y, group, folds, seed)
    truth, answer, majority = [], [], []
    for train, test in sides:
        model = _fitted(x[train], y[train], group[train], seed)
        truth.append(y[test])
        answer.append(model.predict(x[test]))
        majority.append(np.full(len(test), np.bincount(y[train]).argmax()))
    return _result(
        classes, *map(np.concatenate, (truth, answer, majority)), len(sides[0][0]), left_out, seed
    )


def _folds(x: np.ndarray, y: np.ndarray, group: np.ndarray, folds: int, seed: int) -> list:
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2 or len(set(group)) < folds:
        raise UserError(f"{folds}-fold cross-validation needs {folds} compositions or more")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(x, y, group))


def _fitted(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int):
    """The pipeline fitted with the C that does best in inner grouped cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    n_groups = min(len(set(group[y == c])) for c in np.unique(y))
    if n_groups < 2:  # a class of one composition cannot be split: no inner validation
        return pipeline.fit(x, y)
    inner = StratifiedGroupKFold(min(3, n_groups), shuffle=True, random_state=seed)
    grid = {"logisticregression__C": C_GRID}
    return GridSearchCV(pipeline, grid, cv=inner).fit(x, y, groups=group)


def _result(
    classes: tuple[str, ...],
    truth: np.ndarray,
    answer: np.ndarray,
    majority: np.ndarray,
    n_train: int,
    left_out: dict[str, int],
    seed: int,
) -> ProbeResult:
    confusion = confusion_counts(truth, answer, len(classes))
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(truth), (BOOTSTRAPS, len(truth)))
    resampled = [confusion_counts(truth[d], answer[d], len(classes)) for d in draws]

    def interval(values: list[float]) -> tuple[float, float]:
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)

    return ProbeResult(
        classes=classes,
        accuracy=accuracy(confusion),
        macro_f1=float(f1_per_class(confusion).mean()),
        accuracy_ci=interval([accuracy(c) for c in resampled]),
        macro_f1_ci=interval([float(f1_per_class(c).mean()) for c in resampled]),
        per_class_f1=dict(zip(classes, f1_per_class(confusion).tolist(), strict=True)),
        confusion=confusion,
        majority_accuracy=float((truth == majority).mean()),
        n_train=n_train,
        n_test=len(truth),
        left_out=left_out,
    )
