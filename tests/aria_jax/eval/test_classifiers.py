"""Classifiers: each learns what can be learnt, as the reference does; labels of whole files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aria_jax.eval import classifiers
from aria_jax.eval.classifiers import (
    C_GRID,
    CLASSIFIERS,
    LinearRecipe,
    Prediction,
    _Logistic,
    knn,
    linear,
    score_predictions,
)
from aria_jax.losses.cross_entropy import file_probabilities


def clusters(n=120, signal=4.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return np.eye(3, 8)[y] * signal + rng.normal(size=(n, 8)), y


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_each_learns_separable_classes(name):
    x, y = clusters()
    other_x, other_y = clusters(seed=1)
    predict = CLASSIFIERS[name](x, y, np.arange(len(y)).astype(str), 0)
    assert (predict(other_x) == other_y).mean() > 0.9


@pytest.mark.parametrize(("n", "width", "n_classes"), [(90, 12, 3), (60, 100, 4)])
def test_logistic_regression_is_scikit_learns(n, width, n_classes):
    """More and fewer rows than features, both solved far beyond where they stop by default."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    x = rng.normal(size=(n_classes, width))[y] + rng.normal(size=(n, width)) * 3
    x[:, 0] = 7  # a feature that says nothing
    use = rng.random((2, n)) < 0.8
    problem = _Logistic(x, y)
    standard = StandardScaler().fit_transform(x)
    for c in (0.01, 1.0):
        weights = problem.solve(use, c, 1e-6)
        for rows, weight in zip(use, weights, strict=True):
            model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(standard[rows], y[rows])
            likely = scipy.special.softmax(problem.z_NxR @ weight, axis=1)
            np.testing.assert_allclose(likely, model.predict_proba(standard), atol=1e-3)


def test_logistic_regression_chooses_as_well_as_a_grid_search():
    rng = np.random.default_rng(1)
    y, centres = np.arange(600) % 3, rng.normal(size=(3, 40)) * 0.5
    x, group = centres[y] + rng.normal(size=(600, 40)) * 1.5, (np.arange(600) // 2).astype(str)
    train, test = slice(0, 300), slice(300, 600)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    search = GridSearchCV(
        pipeline,
        {"logisticregression__C": C_GRID},
        cv=StratifiedGroupKFold(3, shuffle=True, random_state=0),
    ).fit(x[train], y[train], groups=group[train])
    found = CLASSIFIERS["logistic"](x[train], y[train], group[train], 0)(x[test])
    assert (found == search.predict(x[test])).mean() > 0.99
    few = CLASSIFIERS["logistic"](x[:6], y[:6] + 4, np.zeros(6, str), 0)  # no inner folds
    assert set(few(x[test])) <= {4, 5, 6}


def test_the_better_of_forest_and_logistic_regression_is_chosen(monkeypatch):
    """A line is for logistic regression, the corners of a square for a forest."""
    monkeypatch.setattr(classifiers, "TREES", 40)
    monkeypatch.setattr(classifiers, "SELECTION_TREES", 20)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 4))
    group, rows = np.arange(240).astype(str), slice(0, 160)
    for name, y in (
        ("logistic", (x.sum(1) > 0).astype(int)),
        ("forest", (x[:, 0] * x[:, 1] > 0).astype(int)),
    ):
        fitted = CLASSIFIERS["best"](x[rows], y[rows], group[rows], 0)
        assert fitted.name == name
        alone = CLASSIFIERS[name](x[rows], y[rows], group[rows], 0)
        np.testing.assert_array_equal(fitted(x[160:]), alone(x[160:]))
        assert (fitted(x[160:]) == y[160:]).mean() > 0.8


def test_a_forest_that_trails_far_is_given_up(monkeypatch):
    """After one inner fold of three, where a line separates what no axis does."""
    fitted = []
    whole = classifiers._forest
    monkeypatch.setattr(classifiers, "SELECTION_TREES", 10)
    monkeypatch.setattr(classifiers, "_forest", lambda *a: fitted.append(a[3]) or whole(*a))
    x = np.random.default_rng(0).normal(size=(200, 30))
    y = (x.sum(1) > 0).astype(int)
    assert CLASSIFIERS["best"](x, y, np.arange(200).astype(str), 0).name == "logistic"
    assert fitted == [10]


def test_c_is_chosen_where_a_class_has_one_composition_only(monkeypatch):
    x, y = clusters(n=60, signal=1.5)
    x = np.concatenate([x, np.random.default_rng(2).normal(size=(60, 90))], axis=1)
    group = np.where(y == 2, "the only one", np.arange(60).astype(str))
    seen = []
    monkeypatch.setattr(_Logistic, "predictor", lambda problem, c: seen.append(c))
    CLASSIFIERS["logistic"](x, y, group, 0)
    CLASSIFIERS["logistic"](x, y, np.array(["one", "two", "three"])[y], 0)
    assert seen[0] < 1.0 and seen[1] == 1.0


def test_linear_is_adamw_with_warm_up_and_decay():
    """The same batches through Optax's AdamW and schedule."""
    x, y = clusters(n=32)
    predict = linear(x, y, y.astype(str), 3, LinearRecipe(steps=40, warmup_steps=15))
    rng = np.random.default_rng(3)
    batches = [rng.permutation(32) for _ in range(40)]
    bound = 8**-0.5
    w = jnp.asarray(rng.uniform(-bound, bound, (9, 3)), jnp.float32)
    x1 = jnp.concatenate([x, np.ones((32, 1))], 1)
    schedule = optax.join_schedules(
        [optax.linear_schedule(3e-10, 3e-4, 15), optax.linear_schedule(3e-4, 3e-5, 25)], [15]
    )
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1)
    state = optimizer.init(w)

    def loss(w, rows):
        chosen = jnp.asarray(y)[rows]
        return optax.softmax_cross_entropy_with_integer_labels(x1[rows] @ w, chosen).mean()

    for rows in batches:
        updates, state = optimizer.update(jax.grad(loss)(w, rows), state, w)
        w = optax.apply_updates(w, updates)
    other = np.random.default_rng(9).normal(size=(2000, 8))
    expected = (np.concatenate([other, np.ones((2000, 1))], 1) @ w).argmax(1)
    assert (predict(other) == expected).mean() > 0.998  # all but draws within rounding


def test_the_nearer_class_wins_a_draw():
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    predict = knn(x, np.array([0, 0, 1, 1]), np.arange(4).astype(str), 0, neighbours=4)
    np.testing.assert_array_equal(predict(np.array([[1.0, 0.2], [0.2, 1.0]])), [0, 1])


def test_long_slices_outweigh_short_ones_and_fillers_do_not_count():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.0, 1.0], [1.0, 0.0]])
    pieces, mean = file_probabilities(
        probabilities, np.array([100, 900, 10, 500]), np.array([7, 7, 3, -1])
    )
    assert pieces.tolist() == [3, 7]
    np.testing.assert_allclose(mean, [[0, 1], [0.27, 0.73]])


def test_order_of_slices_does_not_matter():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 50)
    n_tokens, pieces = rng.integers(1, 900, 50), rng.integers(0, 9, 50)
    order = rng.permutation(50)
    one = file_probabilities(probabilities, n_tokens, pieces)
    other = file_probabilities(probabilities[order], n_tokens[order], pieces[order])
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1])
    np.testing.assert_allclose(one[1].sum(1), 1)


def test_only_files_with_a_known_label_are_scored():
    likely = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    labels = ["bach", "bach", "liszt", "satie"]
    predictions = [
        Prediction(f"{i}.mid", str(i), likely[i], {"composer": labels[i]}) for i in range(4)
    ]
    scores = score_predictions(predictions, "composer", ("bach", "liszt"))
    assert (scores["n_scored"], scores["accuracy"]) == (3, pytest.approx(1 / 3))
    assert scores["confusion"] == [[1, 1], [1, 0]]
    assert score_predictions(predictions, "form", ("bach", "liszt")) is None
