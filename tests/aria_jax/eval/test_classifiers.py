"""Readouts: each learns what can be learnt; the linear one by the reference's recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aria_jax.eval.classifiers import CLASSIFIERS, LinearRecipe, linear, nearest


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
    predict = nearest(x, np.array([0, 0, 1, 1]), np.arange(4).astype(str), 0, neighbours=4)
    np.testing.assert_array_equal(predict(np.array([[1.0, 0.2], [0.2, 1.0]])), [0, 1])
