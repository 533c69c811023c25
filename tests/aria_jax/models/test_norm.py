"""The norm's own gradient is the derivative of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.models.transformer import EPSILON, layer_norm


def formula(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias


@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 16)])
def test_value_and_gradient_of_the_formula(shape):
    rng = np.random.default_rng(0)
    x = (3 * rng.normal(size=shape) + 5).astype(np.float32)
    scale, bias = (rng.normal(size=shape[-1]).astype(np.float32) for _ in range(2))
    weights = rng.normal(size=shape).astype(np.float32)

    def gradients(norm):
        return jax.value_and_grad(lambda *a: (norm(*a) * weights).sum(), (0, 1, 2))(x, scale, bias)

    (actual, actual_grads), (desired, desired_grads) = gradients(layer_norm), gradients(formula)
    assert float(actual) == pytest.approx(float(desired), rel=1e-5)
    for one, another in zip(actual_grads, desired_grads, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    x = jnp.asarray(np.random.default_rng(1).normal(100, 1, (4, 64)), jnp.bfloat16)
    one, zero = jnp.ones(64), jnp.zeros(64)
    y, pull = jax.vjp(layer_norm, x, one, zero)
    expected = formula(x.astype(jnp.float32), one, zero)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)
    dx, dscale, dbias = pull(y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert dscale.dtype == dbias.dtype == jnp.float32
