"""cuDNN's flash attention, for bfloat16 or float16 on NVIDIA GPUs."""

import jax


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
) -> jax.Array:
    """See the package. Segments cost a mask of [B, 1, L, L]: cuDNN has no other form for them."""
    mask = None
    if segment_ids_BxL is not None:
        mask = segment_ids_BxL[:, None, :, None] == segment_ids_BxL[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, mask=mask, is_causal=True, implementation="cudnn"
    )
