"""Attention as written in the textbook: all scores at once, memory O(L²)."""

import jax
import jax.numpy as jnp


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
