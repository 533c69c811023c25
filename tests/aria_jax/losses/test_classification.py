"""Cross-entropy over classes against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.losses.classification import classification_loss


def test_equals_the_definition():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    loss, aux = classification_loss(logits, jnp.array([0, 2]))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-(np.log(p[0, 0]) + np.log(p[1, 2])) / 2, rel=1e-6)
    assert aux["accuracy"] == 0.5


def test_masked_rows_count_for_nothing():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 3, 1, 0, 0])
    mask = jnp.array([True, True, True, False, False])
    masked, aux = classification_loss(logits, labels, mask)
    expected, expected_aux = classification_loss(logits[:3], labels[:3])
    assert masked == pytest.approx(float(expected), rel=1e-6)
    assert aux["accuracy"] == pytest.approx(float(expected_aux["accuracy"]))
    grad = jax.grad(lambda logits: classification_loss(logits, labels, mask)[0])(logits)
    assert np.all(np.asarray(grad[3:]) == 0)
