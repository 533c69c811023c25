"""Classifiers: those fitted on frozen embeddings, and what a finetuned class head says of files.

Fitted are logistic regression, the reference's linear layer and k-NN. Each is a function
(x, y, group, seed) -> predict, where predict maps features [N, E] to classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.embed.encode import Encode
from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.losses.cross_entropy import file_probabilities
from data_pipeline.shards import TokenShards
from data_pipeline.workers import map_in_order

Predict = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Predict]

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def logistic(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression on standardised features; C does best in inner grouped validation.

    The model of scikit-learn's LogisticRegression, whose C multiplies the loss. All inner folds
    are solved at once, C by C, each beginning where the last one ended.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_groups = min(len(set(group[y == c])) for c in np.unique(y))
    if n_groups < 2:  # a class of one composition cannot be split: no inner validation
        return plain_logistic(x, y, group, seed)
    problem = _Logistic(x, y)
    inner = StratifiedGroupKFold(min(3, n_groups), shuffle=True, random_state=seed)
    held_out_BxN = np.zeros((inner.get_n_splits(), len(x)), bool)
    for fold, (_, test) in enumerate(inner.split(x, y, group)):
        held_out_BxN[fold, test] = True
    weights_BxRxK, accuracies = None, []
    for c in C_GRID:
        weights_BxRxK = problem.solve(~held_out_BxN, c, SELECTION_TOLERANCE, weights_BxRxK)
        correct_BxN = (problem.predict(problem.z_NxR, weights_BxRxK) == y) & held_out_BxN
        accuracies.append((correct_BxN.sum(1) / held_out_BxN.sum(1)).mean())
    return problem.predictor(C_GRID[int(np.argmax(accuracies))])


def plain_logistic(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression with C = 1, for samples too small to choose it."""
    return _Logistic(x, y).predictor(1.0)


class _Logistic:
    """Logistic regressions on rows of one set: features standardised, then turned to their
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
        self._turn_ExE = axes_ExE / scale_E[:, None]
        self.z_NxR = self.turned(x_NxE)

    def turned(self, x_NxE: np.ndarray) -> np.ndarray:
        """Rows as the problem sees them, float32 [N, R]."""
        return _with_one((x_NxE - self._mean_E) @ self._turn_ExE)

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
        """Classes [B, N] of turned rows."""
        return self._classes[(z_NxR @ weights_BxRxK).argmax(-1)]

    def predictor(self, c: float) -> Predict:
        """Learnt from all rows."""
        weights_1xRxK = self.solve(np.ones((1, len(self.z_NxR)), bool), c, TOLERANCE)
        return lambda x: self.predict(self.turned(x), weights_1xRxK)[0]


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


def nearest(
    x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int, neighbours: int = 5
) -> Predict:
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


CLASSIFIERS: dict[str, Fit] = {"logistic": logistic, "linear": linear, "knn": nearest}


FILES_AT_ONCE = 64
"""Enough slices for full length-bucketed batches."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of a file.

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
    n = len(source.paths)
    cut = map_in_order(source.cut, range(n), workers=workers, ahead=2 * FILES_AT_ONCE)
    done = 0
    if progress is not None:
        progress(0, n)
    while files := list(islice(cut, FILES_AT_ONCE)):
        predictions = _predictions([file for file in files if isinstance(file, Piece)], encode)
        for file in files:
            yield next(predictions) if isinstance(file, Piece) else file
        done += len(files)
        if progress is not None:
            progress(done, n)


def _predictions(pieces: Sequence[Piece], encode: Encode) -> Iterator[Prediction]:
    if not pieces:
        return
    slices = [ids for piece in pieces for ids in piece.slices]
    n_tokens = np.array([len(ids) for ids in slices])
    of_piece = np.repeat(np.arange(len(pieces)), [len(piece.slices) for piece in pieces])
    _, likely_FxC = file_probabilities(encode(slices), n_tokens, of_piece)
    for piece, likely_C in zip(pieces, likely_FxC, strict=True):
        yield Prediction(piece.path, piece.sha256, likely_C, piece.labels)


@dataclass(frozen=True)
class Scores:
    """How well labels were predicted.

    Attributes:
        n_scored: files whose label is one of the classes; without any the scores are nan.
        accuracy, macro_f1: in 0..1; F1 over the classes that occur or are predicted.
        confusion: int64 [C, C], true class by row.
    """

    n_scored: int
    accuracy: float
    macro_f1: float
    confusion: np.ndarray


def score_predictions(
    predictions: Sequence[Prediction], label: str, class_names: Sequence[str]
) -> Scores:
    """Compares predictions with the `label` of the files that have one of the classes."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    number = {name: i for i, name in enumerate(class_names)}
    known = [p for p in predictions if p.labels.get(label) in number]
    if not known:
        empty = np.zeros((len(class_names), len(class_names)), int)
        return Scores(0, float("nan"), float("nan"), empty)
    y_true = [number[p.labels[label]] for p in known]
    y_pred = [p.predicted for p in known]
    return Scores(
        n_scored=len(known),
        accuracy=float(accuracy_score(y_true, y_pred)),
        macro_f1=float(f1_score(y_true, y_pred, average="macro")),
        confusion=confusion_matrix(y_true, y_pred, labels=range(len(class_names))),
    )


def training_files(corpus: str | Path) -> frozenset[str]:
    """sha256 of the MIDI files that a model learnt from: the training split of its token shards.

    Raises:
        UserError: no token shards there.
    """
    shards = TokenShards(corpus, "train")
    return frozenset(shards[i].meta["sha256"] for i in range(len(shards)))
