"""Classifiers: those fitted on frozen embeddings, and what a finetuned class head says of files.

Fitted are logistic regression, a random forest, the better of these two, the reference's linear
layer and k-NN. Each is a function (x, y, group, seed) -> predict, where predict maps features
[N, E] to classes.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.embed.encode import Encode
from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.losses.cross_entropy import file_probabilities
from aria_jax.sharding import usable_cpus
from data_pipeline.workers import map_in_order

Predict = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Predict]

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def logistic(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression on standardised features; C does best in inner grouped validation.

    The model of scikit-learn's LogisticRegression, whose C multiplies the loss. All inner folds
    are solved at once, C by C, each beginning where the last one ended.
    """
    held_out_BxN = _inner_folds(y, group, seed)
    if held_out_BxN is None:
        return plain_logistic(x, y, group, seed)
    problem = _Logistic(x, y)
    return problem.predictor(_choose_c(problem, y, held_out_BxN)[0])


def plain_logistic(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression with C = 1, for samples too small to choose it."""
    return _Logistic(x, y).predictor(1.0)


TREES, SELECTION_TREES, GIVEN_UP = 300, 100, 0.1
"""Of a forest, and of those held against logistic regression, until they trail by so much."""


def forest(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """scikit-learn's random forest on the features as they are; 300 trees, else its defaults."""
    return _forest(x, y, seed, TREES)


def _forest(x: np.ndarray, y: np.ndarray, seed: int, n_trees: int) -> Predict:
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(n_trees, random_state=seed, n_jobs=usable_cpus())
    # Votes are added in the order in which threads end: in one thread a draw is always the same.
    return model.fit(x, y).set_params(n_jobs=1).predict


@dataclass(frozen=True)
class Chosen:
    """A classifier that was chosen by inner validation, and its name in `CLASSIFIERS`."""

    name: str
    predict: Predict

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Classes of rows."""
        return self.predict(x)


def best(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression or a forest: which does better in the same inner grouped validation (the
    first without it). A forest that trails by `GIVEN_UP` in a fold is not tried in others.
    """
    held_out_BxN = _inner_folds(y, group, seed)
    if held_out_BxN is None:
        return Chosen("logistic", plain_logistic(x, y, group, seed))
    problem = _Logistic(x, y)
    c, of_logistic_B = _choose_c(problem, y, held_out_BxN)
    gains: list[float] = []
    for held_out_N, of_logistic in zip(held_out_BxN, of_logistic_B, strict=True):
        predict = _forest(x[~held_out_N], y[~held_out_N], seed, SELECTION_TREES)
        gains.append((predict(x[held_out_N]) == y[held_out_N]).mean() - of_logistic)
        if gains[-1] < -GIVEN_UP:
            return Chosen("logistic", problem.predictor(c))
    if np.mean(gains) > 0:
        return Chosen("forest", forest(x, y, group, seed))
    return Chosen("logistic", problem.predictor(c))


def _inner_folds(y: np.ndarray, group: np.ndarray, seed: int) -> np.ndarray | None:
    """Which rows each of up to three inner folds holds out, bool [B, N].

    None unless two classes have two compositions: then nothing could be learnt and judged.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_groups = sorted(len(set(group[y == c])) for c in np.unique(y))
    n_folds = min(3, n_groups[-2] if len(n_groups) > 1 else 1)
    if n_folds < 2:
        return None
    inner = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    held_out_BxN = np.zeros((n_folds, len(y)), bool)
    with warnings.catch_warnings():  # a class with fewer rows than folds is in some of them only
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        for fold, (_, test) in enumerate(inner.split(y, y, group)):
            held_out_BxN[fold, test] = True
    return held_out_BxN[held_out_BxN.any(1)]


def _choose_c(
    problem: "_Logistic", y: np.ndarray, held_out_BxN: np.ndarray
) -> tuple[float, np.ndarray]:
    """The best of `C_GRID`, and its accuracy in each inner fold."""
    weights_BxRxK, accuracies = None, []
    for c in C_GRID:
        weights_BxRxK = problem.solve(~held_out_BxN, c, SELECTION_TOLERANCE, weights_BxRxK)
        correct_BxN = (problem.predict(problem.z_NxR, weights_BxRxK) == y) & held_out_BxN
        accuracies.append(correct_BxN.sum(1) / held_out_BxN.sum(1))
    best_c = int(np.argmax(np.mean(accuracies, axis=1)))
    return C_GRID[best_c], accuracies[best_c]


class _Logistic:
    """Logistic regressions on rows of one set: features standardised, then rotated to their
    principal axes, where the Hessian of the loss has a diagonal bound.

    A rotation changes neither the penalty nor the solution. Sizes: N rows, R features and the
    intercept, K classes, B problems.
    """

    def __init__(self, x_NxE: np.ndarray, y_N: np.ndarray):
        self._classes, self._y_N = np.unique(y_N, return_inverse=True)
        self._mean_E, deviation_E = x_NxE.mean(0), x_NxE.std(0)
        scale_E = np.where(deviation_E > 0, deviation_E, 1.0)
        standard_NxE = (x_NxE - self._mean_E) / scale_E
        _, axes_ExE = np.linalg.eigh((standard_NxE.T @ standard_NxE).astype(np.float32))
        self._rotation_ExE = axes_ExE / scale_E[:, None]
        self.z_NxR = self.rotated(x_NxE)

    def rotated(self, x_NxE: np.ndarray) -> np.ndarray:
        """Rows as the problem sees them, float32 [N, R]."""
        return _with_one((x_NxE - self._mean_E) @ self._rotation_ExE)

    def solve(
        self, use_BxN: np.ndarray, c: float, tolerance: float, start_BxRxK: np.ndarray | None = None
    ) -> np.ndarray:
        """Weights float32 [B, R, K] of problem b: the rows that it uses."""
        padding = -len(self.z_NxR) % ROWS
        target_NxK = np.eye(len(self._classes), dtype=np.float32)[self._y_N]
        if start_BxRxK is None:
            shape = (len(use_BxN), self.z_NxR.shape[1], len(self._classes))
            start_BxRxK = np.zeros(shape, np.float32)
        return np.asarray(
            _solve(
                np.pad(self.z_NxR, ((0, padding), (0, 0))),
                np.pad(target_NxK, ((0, padding), (0, 0))),
                np.pad(use_BxN.astype(np.float32), ((0, 0), (0, padding))),
                np.float32(1 / c),
                np.float32(tolerance),
                start_BxRxK,
            )
        )

    def predict(self, z_NxR: np.ndarray, weights_BxRxK: np.ndarray) -> np.ndarray:
        """Classes [B, N] of rotated rows."""
        return self._classes[(z_NxR @ weights_BxRxK).argmax(-1)]

    def predictor(self, c: float) -> Predict:
        """Learnt from all rows."""
        weights_1xRxK = self.solve(np.ones((1, len(self.z_NxR)), bool), c, TOLERANCE)
        return lambda x: self.predict(self.rotated(x), weights_1xRxK)[0]


ROWS = 512
"""Rows are padded to multiples of this: folds of nearly one size are compiled once."""
MAX_STEPS, TOLERANCE = 1000, 1e-4
"""Of the solver; the tolerance is the greatest gradient of a mean loss, as in scikit-learn."""
SELECTION_TOLERANCE = 1e-3
"""Where C is chosen."""


@jax.jit
def _solve(
    z_NxR: jax.Array,
    target_NxK: jax.Array,
    use_BxN: jax.Array,
    ridge: jax.Array,
    tolerance: jax.Array,
    start_BxRxK: jax.Array,
) -> jax.Array:
    """Minimises, for every b, the cross-entropy summed over the rows used plus ridge / 2 |W|^2,
    the last row of W (the intercept) not counted.

    Accelerated gradient steps with restarts (O'Donoghue and Candes 2015), preconditioned by the
    bound of the Hessian that holds everywhere, Z'Z / 2 + ridge (Boehning 1992), which is diagonal
    on principal axes.
    """
    n_rows, n_features = z_NxR.shape
    n_classes, n_problems = target_NxK.shape[1], len(use_BxN)
    penalty_Rx1 = ridge * (jnp.arange(n_features) < n_features - 1)[:, None]
    bound_Rx1 = 0.5 * jnp.square(z_NxR).sum(0)[:, None] + penalty_Rx1
    n_used_B = use_BxN.sum(1)

    def gradient(w_BxRxK: jax.Array) -> jax.Array:
        flat_RxBK = jnp.moveaxis(w_BxRxK, 0, 1).reshape(n_features, -1)
        logits_NxBxK = (z_NxR @ flat_RxBK).reshape(n_rows, n_problems, n_classes)
        error_NxBxK = jax.nn.softmax(logits_NxBxK) - target_NxK[:, None]
        error_NxBxK = error_NxBxK * use_BxN.T[:, :, None]
        slope_RxBK = z_NxR.T @ error_NxBxK.reshape(n_rows, -1)
        slope_BxRxK = jnp.moveaxis(slope_RxBK.reshape(n_features, n_problems, n_classes), 1, 0)
        return slope_BxRxK + penalty_Rx1 * w_BxRxK

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[0] < MAX_STEPS) & (carry[4] > tolerance)

    def step(carry: tuple) -> tuple:
        number, w, ahead, momentum_B, _ = carry
        slope = gradient(ahead)
        new = ahead - slope / bound_Rx1
        uphill_B = (slope * (new - w)).sum((1, 2)) > 0
        momentum_B = jnp.where(uphill_B, 1.0, momentum_B)
        next_B = (1 + jnp.sqrt(1 + 4 * jnp.square(momentum_B))) / 2
        ahead = new + ((momentum_B - 1) / next_B)[:, None, None] * (new - w)
        steepest = (jnp.abs(slope).max((1, 2)) / n_used_B).max()
        return number + 1, new, ahead, next_B, steepest

    first = (0, start_BxRxK, start_BxRxK, jnp.ones(n_problems), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, step, first)[1]


def knn(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int, neighbours: int = 5) -> Predict:
    """Vote of the nearest training rows by cosine; the nearer of two classes wins a draw."""

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    known, n_classes = unit(x), int(y.max()) + 1

    def predict(rows: np.ndarray) -> np.ndarray:
        similarity = unit(rows) @ known.T
        closest = np.argsort(-similarity, axis=1)[:, :neighbours]
        votes = np.zeros((len(rows), n_classes))
        # Similarities are at most 1, so the second term decides draws only.
        weight = 1 + np.take_along_axis(similarity, closest, 1) / (10 * neighbours)
        np.add.at(votes, (np.arange(len(rows))[:, None], y[closest]), weight)
        return votes.argmax(1)

    return predict


@dataclass(frozen=True)
class LinearRecipe:
    """The reference's linear probe (aria/eval/linear_probe.py): AdamW on cross-entropy, warm-up
    and linear decay; batch size and length are arguments there.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-5
    warmup_steps: int = 100
    start_ratio: float = 1e-6
    end_ratio: float = 0.1
    batch_size: int = 32
    steps: int = 5000

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warmup = min(self.warmup_steps, self.steps - 1)
        if step < warmup:
            ratio = self.start_ratio + (1 - self.start_ratio) * step / warmup
        else:
            ratio = 1 - (1 - self.end_ratio) * (step - warmup) / (self.steps - warmup)
        return self.learning_rate * ratio


def linear(
    x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int, recipe: LinearRecipe | None = None
) -> Predict:
    """A linear layer with bias, trained with the reference's recipe on the features as they are."""
    recipe, rng = recipe or LinearRecipe(), np.random.default_rng(seed)
    n, n_classes = len(x), int(y.max()) + 1
    epochs = -(-recipe.steps * recipe.batch_size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
    batches = order[: recipe.steps * recipe.batch_size].reshape(recipe.steps, -1)
    bound = x.shape[1] ** -0.5  # as torch.nn.Linear begins
    weights = rng.uniform(-bound, bound, (x.shape[1] + 1, n_classes)).astype(np.float32)
    x1, target = _with_one(x), np.eye(n_classes, dtype=np.float32)[y]
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step, rows in enumerate(batches):
        logits = x1[rows] @ weights
        likely = np.exp(logits - logits.max(1, keepdims=True))
        likely /= likely.sum(1, keepdims=True)
        gradient = x1[rows].T @ (likely - target[rows]) / len(rows)
        mean = recipe.b1 * mean + (1 - recipe.b1) * gradient
        square = recipe.b2 * square + (1 - recipe.b2) * gradient**2
        scale = np.sqrt(square / (1 - recipe.b2 ** (step + 1))) + recipe.eps
        change = mean / (1 - recipe.b1 ** (step + 1)) / scale + recipe.weight_decay * weights
        weights = weights - np.float32(recipe.rate(step)) * change
    return lambda rows: (_with_one(rows) @ weights).argmax(1)


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float32)


CLASSIFIERS: dict[str, Fit] = {
    **{"logistic": logistic, "forest": forest, "best": best},
    **{"linear": linear, "knn": knn},
}


FILES_AT_ONCE = 64  # enough slices for full length-bucketed batches


@dataclass(frozen=True)
class Prediction:
    """What a class head says of a file.

    Attributes:
        sha256: of the MIDI file.
        probabilities: float64 [C], mean over slices weighted by their tokens.
        labels: what is known of the file.
    """

    path: str
    sha256: str
    probabilities: np.ndarray
    labels: dict[str, str]

    @property
    def predicted(self) -> int:
        """Number of the most likely class."""
        return int(self.probabilities.argmax())


def predict(
    source: Source,
    encode: Encode,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Prediction | Rejection]:
    """A prediction for each file of `source`, in order.

    Args:
        encode: slices to probabilities, as `embed.encode.class_encoder` makes it.
        workers: processes that read and tokenise.
    """
    done, n = 0, len(source.paths)
    sliced = map_in_order(source.piece, range(n), workers=workers, ahead=2 * FILES_AT_ONCE)
    if progress is not None:
        progress(0, n)
    while files := list(islice(sliced, FILES_AT_ONCE)):
        pieces = [file for file in files if isinstance(file, Piece)]
        slices = [ids for piece in pieces for ids in piece.slices]
        of_piece = np.repeat(np.arange(len(pieces)), [len(piece.slices) for piece in pieces])
        n_tokens = np.array([len(ids) for ids in slices])
        read = file_probabilities(encode(slices), n_tokens, of_piece)[1] if slices else ()
        likely_FxC = iter(read)
        for one in files:
            if isinstance(one, Piece):
                yield Prediction(one.path, one.sha256, next(likely_FxC), one.labels)
            else:
                yield one
        done += len(files)
        if progress is not None:
            progress(done, n)


def score_predictions(
    predictions: Sequence[Prediction], label: str, class_names: Sequence[str]
) -> dict[str, Any] | None:
    """Accuracy, macro-F1 (over classes that occur or are predicted), number of files and confusion
    (true class by row) of the files whose `label` is one of the classes; None without any.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    number = {name: i for i, name in enumerate(class_names)}
    known = [p for p in predictions if p.labels.get(label) in number]
    if not known:
        return None
    y_true, y_pred = zip(*((number[p.labels[label]], p.predicted) for p in known), strict=True)
    return {
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "macro_f1": float(f1_score(y_true, y_pred, average="macro")),
        "n_scored": len(known),
        "confusion": confusion_matrix(y_true, y_pred, labels=range(len(number))).tolist(),
    }
