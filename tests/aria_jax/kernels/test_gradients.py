"""Gradients that keep and read less than a formula's derivative are that derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.kernels import EPSILON, layer_norm, products, swiglu


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


def test_swiglu_has_its_second_factor_back_by_a_division():
    """Also where a gate is zero, so negative that nothing is left of it, or the factor is zero."""
    rng = np.random.default_rng(2)
    gate, up, weights = (rng.normal(size=(64, 48)).astype(np.float32) * 3 for _ in range(3))
    gate[0], gate[1, ::2], gate[2, ::2], up[3] = 0, -1e4, 1e4, 0
    gate[4, ::2] = np.linspace(-110, -80, 24)  # where the sigmoid leaves float32's normal numbers

    def gradients(function):
        return jax.value_and_grad(lambda *a: (function(*a) * weights).sum(), (0, 1))(gate, up)

    actual, desired = gradients(swiglu), gradients(lambda g, u: jax.nn.silu(g) * u)
    for one, another in zip(*(jax.tree.leaves(x) for x in (actual, desired)), strict=True):
        np.testing.assert_allclose(one, another, rtol=2e-5, atol=1e-6)


def test_swiglu_in_bfloat16_loses_no_more_than_its_rounding():
    rng = np.random.default_rng(3)
    gate, up, g = (jnp.asarray(rng.normal(size=4096), jnp.bfloat16) for _ in range(3))
    gate = gate.at[:64].set(0)
    out, pull = jax.vjp(swiglu, gate, up)
    wide = (x.astype(jnp.float32) for x in (gate, up))
    expected, wide_pull = jax.vjp(lambda a, b: jax.nn.silu(a) * b, *wide)
    assert out.dtype == jnp.bfloat16
    # Half a unit in the last of 8 places for the result, another one for what is made of it; and
    # a gate of zero counts as 1e-20.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-19)
    for one, another in zip(pull(g), wide_pull(g.astype(jnp.float32)), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), another, rtol=2**-7, atol=1e-19)


def test_products_of_one_input_have_the_gradients_of_each():
    rng = np.random.default_rng(4)
    x, *matrices = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 8), (8, 6), (8, 6)))

    def loss(function):
        return lambda x, m: sum(jnp.sin(y).sum() for y in function(x, m))

    actual = jax.grad(loss(products), (0, 1))(x, matrices)
    desired = jax.grad(loss(lambda x, ms: [x @ m for m in ms]), (0, 1))(x, matrices)
    for one, another in zip(*(jax.tree.leaves(x) for x in (actual, desired)), strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-5, atol=1e-5)
