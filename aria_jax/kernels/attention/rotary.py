"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) as the reference has it: the pairs
of a head are its halves (aria/model.py).
"""

import jax
import jax.numpy as jnp
import numpy as np

ROPE_BASE = 500_000.0


def rope_tables(positions_BxL: jax.Array | np.ndarray, d_head: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, float32 [B, L, 1, K/2] each.

    Positions known while tracing, given as a NumPy array, make constants of them. Of others, XLA
    computes a cosine again in every layer and for every head rather than keep it.
    """
    xp = np if isinstance(positions_BxL, np.ndarray) else jnp
    frequencies = ROPE_BASE ** (-xp.arange(0, d_head, 2, dtype=xp.float32) / d_head)
    angles = positions_BxL[..., None, None].astype(xp.float32) * frequencies
    return jnp.asarray(xp.cos(angles)), jnp.asarray(xp.sin(angles))


def apply_rope(x_BxLxHxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (k, k + K/2) in float32; keeps the dtype."""
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BxLxHxK.dtype)


def split_heads(x_BxLxD: jax.Array, n_heads: int) -> jax.Array:
    """[B, L, H, K]."""
    return x_BxLxD.reshape(*x_BxLxD.shape[:2], n_heads, -1)
