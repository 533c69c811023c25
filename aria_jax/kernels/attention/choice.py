"""Which kernel of attention runs, and on which part of the arrays."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aria_jax.kernels.attention.blockwise import attend as blockwise
from aria_jax.kernels.attention.plain import apply_rope, split_heads
from aria_jax.kernels.attention.plain import attend as plain
from aria_jax.sharding import active_mesh, divisible_spec, platform

Implementation = Literal["auto", "splash", "cudnn", "blockwise", "plain"]

MIN_SPLASH_LENGTH = 128
"""Below this length splash attention would compute mostly padding."""


def rotary_attention(
    q_BxLxD: jax.Array,
    k_BxLxD: jax.Array,
    v_BxLxD: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    n_heads: int,
    segment_ids: jax.Array | None = None,
    implementation: Implementation | Literal["packed"] = "auto",
) -> jax.Array:
    """`attention` of projections side by side, queries and keys rotated first; [B, L, D].

    Args:
        cos, sin: of `rope_tables`.
    """
    if implementation == "auto" and suits_packed(q_BxLxD.shape, n_heads):
        implementation = "packed"
    if implementation == "packed":
        return _packed(q_BxLxD, k_BxLxD, v_BxLxD, cos[:, :, 0], sin[:, :, 0], segment_ids)
    q, k, v = (split_heads(x, n_heads) for x in (q_BxLxD, k_BxLxD, v_BxLxD))
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
    return out.reshape(q_BxLxD.shape)


def suits_packed(shape: tuple[int, ...], n_heads: int) -> bool:
    """Whether the packed kernel can run: on TPUs, on whole sequences and blocks of heads."""
    if platform() != "tpu":
        return False
    from aria_jax.kernels.attention import packed

    mesh = active_mesh()
    cut, sequences = (1, 1) if mesh is None else (mesh.shape["tensor"], mesh.shape["sequence"])
    _, length, columns = shape
    whole_heads = n_heads % cut == 0 and sequences == 1
    suits = whole_heads and packed.suits(length, columns // cut, columns // n_heads)
    return suits and packed.fits_chip()


def _packed(q, k, v, cos, sin, segment_ids) -> jax.Array:
    from aria_jax.kernels.attention import packed  # Pallas takes a second to import

    mesh = active_mesh()
    if mesh is None:
        return packed.attend(q, k, v, cos, sin, segment_ids)
    spec = divisible_spec(mesh, ("batch", None, "heads"), q.shape)
    table = PartitionSpec(spec[0] if len(cos) > 1 else None)
    run = jax.shard_map(
        packed.attend,
        mesh=mesh,
        in_specs=(spec, spec, spec, table, table, PartitionSpec(spec[0])),
        out_specs=spec,
        check_vma=False,
    )
    return run(q, k, v, cos, sin, segment_ids)


def attention(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """softmax(q k / √K) v over each position's past within its segment; softmax in float32.

    Args:
        segment_ids: int [B, L]; equal ids see each other. One segment per row without.
        implementation: "auto" takes the fastest for platform, dtype, length and segments.

    Returns:
        [B, L, H, K] in the dtype of `v`.
    """
    if implementation == "auto":
        implementation = automatic(q_BxLxHxK, segment_ids)
    mesh = active_mesh()
    if implementation == "splash":
        from aria_jax.kernels.attention import splash  # Pallas takes a second to import

        return splash.attend(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segment_ids, mesh)
    kernel = {"cudnn": _cudnn, "blockwise": blockwise, "plain": plain}[implementation]
    if mesh is None:
        return kernel(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segment_ids)
    # Each device attends for its rows and heads; devices of the sequence axis do the same work.
    spec = divisible_spec(mesh, ("batch", None, "heads", None), q_BxLxHxK.shape)
    run = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(spec, spec, spec, PartitionSpec(spec[0])),
        out_specs=spec,
        check_vma=False,
    )
    return run(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segment_ids)


def automatic(q_BxLxHxK: jax.Array, segment_ids: jax.Array | None) -> Implementation:
    """The fastest implementation for these arrays on this platform."""
    if platform() == "tpu" and q_BxLxHxK.shape[1] >= MIN_SPLASH_LENGTH:
        return "splash"
    half = q_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
    if platform() == "gpu" and half and segment_ids is None:
        return "cudnn"
    return "blockwise"


def _cudnn(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
) -> jax.Array:
    """cuDNN's flash attention, for bfloat16 or float16.

    Segments cost a mask of [B, 1, L, L]: cuDNN has no other form for them.
    """
    mask = None
    if segment_ids_BxL is not None:
        mask = segment_ids_BxL[:, None, :, None] == segment_ids_BxL[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, mask=mask, is_causal=True, implementation="cudnn"
    )
