"""Layer normalisation with a gradient of its own."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

EPSILON = 1e-5
MOMENTS = "moments"
"""Checkpoint name of each row's mean and inverse deviation: a thousandth of the row itself."""


@jax.custom_vjp
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """Normalises the last axis in float32; keeps the dtype of `x`.

    The gradient reads kept moments and passes over the rows less often than the formula's
    derivative, which is what takes time on accelerators: a pass reads all of `x`.
    """
    return _forward(x, scale_D, bias_D)[0]


def _forward(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> tuple[jax.Array, tuple]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + EPSILON)
    mean, inverse = checkpoint_name(mean, MOMENTS), checkpoint_name(inverse, MOMENTS)
    y = (x32 - mean) * inverse * scale_D + bias_D
    return y.astype(x.dtype), (x, mean, inverse, scale_D)


def _backward(kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale_D = kept
    g32, unit = g.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    scaled, rows = g32 * scale_D, tuple(range(x.ndim - 1))
    # What is left after the parts along the mean and along the row itself, which the
    # normalisation takes away.
    along = unit * (scaled * unit).mean(-1, keepdims=True)
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - along)
    return dx.astype(x.dtype), (g32 * unit).sum(rows), g32.sum(rows)


layer_norm.defvjp(_forward, _backward)
