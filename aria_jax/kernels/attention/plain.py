"""Rotary position embedding, and attention as in the textbook, which kernels are tested against.

Rotation: Su et al. 2021, arXiv 2104.09864, as the reference has it: the pairs of a head are its
halves (aria/model.py). Attention has all scores at once, memory O(L²).
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


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
) -> jax.Array:
    """See the package."""
    scores_BxHxLxM = jnp.einsum(
        "blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK, preferred_element_type=jnp.float32
    )
    scores_BxHxLxM *= q_BxLxHxK.shape[-1] ** -0.5
    mask = causal_mask(q_BxLxHxK.shape[1], segment_ids_BxL)
    scores_BxHxLxM = jnp.where(mask[:, None], scores_BxHxLxM, -jnp.inf)
    weights = jax.nn.softmax(scores_BxHxLxM, axis=-1).astype(v_BxLxHxK.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", weights, v_BxLxHxK)


def attend_once(
    q_BxHxK: jax.Array, k_BxLxHxK: jax.Array, v_BxLxHxK: jax.Array, visible_BxL: jax.Array
) -> jax.Array:
    """Attention of one position of each row to those of its positions that it sees, [B, H, K]."""
    scores_BxHxL = jnp.einsum(
        "bhk,blhk->bhl", q_BxHxK, k_BxLxHxK, preferred_element_type=jnp.float32
    )
    scores_BxHxL *= q_BxHxK.shape[-1] ** -0.5
    scores_BxHxL = jnp.where(visible_BxL[:, None], scores_BxHxL, -jnp.inf)
    weights = jax.nn.softmax(scores_BxHxL, axis=-1).astype(v_BxLxHxK.dtype)
    return jnp.einsum("bhl,blhk->bhk", weights, v_BxLxHxK)


def causal_mask(length: int, segment_ids_BxL: jax.Array | None = None) -> jax.Array:
    """bool [1 or B, L, L]: each position sees itself and what precedes it in its own segment."""
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BxL is not None:
        mask = mask & (segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :])
    return mask
