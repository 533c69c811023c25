"""Kernels for each kind of machine; here, what XLA makes kernels of by gradients of our own:
products of one input, SwiGLU, layer normalisation.

Accelerators wait for memory wherever an array is passed over outside a matrix product; these
gradients keep and read as little as they can.

Sizes: B batch, L length, D d_model, I inputs, O outputs, F feed-forward.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aria_jax.sharding import active_mesh

PROJECTION = "projection"
"""Checkpoint name of what a layer's large matrix products give."""
MOMENTS = "moments"
"""Checkpoint name of each row's mean and inverse deviation: a thousandth of the row itself."""
EPSILON = 1e-5
"""Of layer normalisation."""
TINY_GATE = 1e-20
"""In place of a gate of zero, by which nothing could be divided."""


def matmul(x_BxLxI: jax.Array, weights_IxO: jax.Array) -> jax.Array:
    """[B, L, O]."""
    # To sum the weights' gradient over batch and length, XLA for CPUs would copy the large factor
    # into another order.
    return (flat(x_BxLxI) @ weights_IxO).reshape(*x_BxLxI.shape[:-1], -1)


def flat(x_BxLxI: jax.Array) -> jax.Array:
    """Batch and length as one axis, which they cannot be where a mesh shards both."""
    mesh = active_mesh()
    if mesh is not None and mesh.shape["sequence"] > 1:
        return x_BxLxI
    return x_BxLxI.reshape(-1, x_BxLxI.shape[-1])


@jax.custom_vjp
def products(x_BxLxI: jax.Array, matrices: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Products of one input and several matrices [I, O], [B, L, O] each.

    The parts of the input's gradient are added one after the other, the product first, as cuBLAS
    adds to its own result what was there: no pass over memory is left for the sum.
    """
    return tuple(matmul(x_BxLxI, matrix) for matrix in matrices)


def _products_forward(x: jax.Array, matrices: list[jax.Array]) -> tuple[tuple, tuple]:
    return products(x, matrices), (x, matrices)


def _products_backward(kept: tuple, cotangents: tuple) -> tuple[jax.Array, list[jax.Array]]:
    x, matrices = kept
    pairs = zip(matrices, cotangents, strict=True)
    (d_x, *others), d_matrices = zip(
        *(jax.vjp(matmul, x, matrix)[1](g) for matrix, g in pairs), strict=True
    )
    for part in others:
        d_x = part + d_x
    return d_x, list(d_matrices)


products.defvjp(_products_forward, _products_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up.

    Keeps `gate` and its own result, which the next product's gradient reads, and has `up` back by
    a division: exact to the dtype's precision, and a pass less than computing the result again.
    """
    return _swiglu_forward(gate, up)[0]


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple]:
    gate = checkpoint_name(gate, PROJECTION)
    gated = (_silu(gate)[0] * up.astype(jnp.float32)).astype(up.dtype)
    gated = checkpoint_name(gated, PROJECTION)
    return gated, (gate, gated)


def _swiglu_backward(kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, gated = kept
    (silu, share), g32 = _silu(gate), g.astype(jnp.float32)
    up = jnp.where(silu == 0, 0, gated.astype(jnp.float32) / silu)
    d_gate = g32 * up * (share + silu * (1 - share))
    return d_gate.astype(gate.dtype), (g32 * silu).astype(gated.dtype)


def _silu(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In float32, and the sigmoid; zero only where a gate is so negative that it gives nothing."""
    gate = gate.astype(jnp.float32)
    gate = jnp.where(gate == 0, TINY_GATE, gate)
    share = jax.nn.sigmoid(gate)
    return gate * share, share


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """Normalises the last axis in float32; keeps the dtype of `x`.

    The gradient reads kept moments and passes over the rows less often than the formula's
    derivative, which is what takes time on accelerators: a pass reads all of `x`.
    """
    return _norm_forward(x, scale_D, bias_D)[0]


def _norm_forward(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> tuple[jax.Array, tuple]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + EPSILON)
    mean, inverse = checkpoint_name(mean, MOMENTS), checkpoint_name(inverse, MOMENTS)
    y = (x32 - mean) * inverse * scale_D + bias_D
    return y.astype(x.dtype), (x, mean, inverse, scale_D)


def _norm_backward(kept: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale_D = kept
    g32, unit = g.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    scaled, rows = g32 * scale_D, tuple(range(x.ndim - 1))
    # What is left after the parts along the mean and along the row itself, which the
    # normalisation takes away.
    along = unit * (scaled * unit).mean(-1, keepdims=True)
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - along)
    return dx.astype(x.dtype), (g32 * unit).sum(rows), g32.sum(rows)


layer_norm.defvjp(_norm_forward, _norm_backward)
