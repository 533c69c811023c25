"""Causal self-attention within segments."""

import jax
import jax.numpy as jnp


def attention(
    q_BxLxHxK: jax.Array,
    k_BxMxHxK: jax.Array,
    v_BxMxHxK: jax.Array,
    mask_BxLxM: jax.Array,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v, where the mask allows; scores and softmax in float32.

    Args:
        mask_BxLxM: bool, True where a query may look; B may be 1.

    Returns:
        [B, L, H, K] in the dtype of `v`. A query that may look nowhere gets the mean of `v`.
    """
    scale = q_BxLxHxK.shape[-1] ** -0.5
    scores_BxHxLxM = jnp.einsum(
        "blhk,bmhk->bhlm", q_BxLxHxK * scale, k_BxMxHxK, preferred_element_type=jnp.float32
    )
    scores_BxHxLxM = jnp.where(mask_BxLxM[:, None], scores_BxHxLxM, -1e30)
    weights = jax.nn.softmax(scores_BxHxLxM, axis=-1).astype(v_BxMxHxK.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", weights, v_BxMxHxK)


def causal_mask(length: int, segment_ids_BxL: jax.Array | None = None) -> jax.Array:
    """bool [1 or B, L, L]: each position sees itself and what precedes it in its own segment."""
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BxL is not None:
        mask = mask & (segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :])
    return mask
