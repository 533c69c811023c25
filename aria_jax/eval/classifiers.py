"""What is fitted on frozen embeddings: logistic regression, the reference's linear layer, k-NN.

Each is a function (x, y, group, seed) -> predict, where predict maps features [N, E] to classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, int], Predict]

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def logistic(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression on standardised features; C does best in inner grouped validation."""
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

    pipeline = _pipeline()
    n_groups = min(len(set(group[y == c])) for c in np.unique(y))
    if n_groups < 2:  # a class of one composition cannot be split: no inner validation
        return pipeline.fit(x, y).predict
    inner = StratifiedGroupKFold(min(3, n_groups), shuffle=True, random_state=seed)
    grid = {"logisticregression__C": C_GRID}
    return GridSearchCV(pipeline, grid, cv=inner).fit(x, y, groups=group).predict


def plain_logistic(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """Logistic regression with C = 1, for samples too small to choose it."""
    return _pipeline().fit(x, y).predict


def _pipeline():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


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
