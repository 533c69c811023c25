"""Splash attention, the block-sparse flash attention of JAX's Pallas kernels for TPU.

The kernel sees one sequence of one device: batches by `vmap`, devices by `shard_map`. With a
sequence axis on the mesh each device has the queries of its part and the keys and values of all.
Elsewhere than on a TPU the kernel is interpreted, slowly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from aria_jax.kernels.attention import ATTENTION_RESIDUALS
from aria_jax.sharding import LOGICAL_RULES, divisible_spec, platform

BLOCKS = (1024, 512, 256, 128)
"""Lengths of the kernel's tiles; the least is the width of a TPU's lanes."""


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
    mesh: AbstractMesh | None = None,
) -> jax.Array:
    """As `attention`; any length, padded to a multiple of the tile.

    Args:
        mesh: what batch, heads and queries are cut over; None on one device.
    """
    length, heads, width = q_BxLxHxK.shape[1:]
    parts = 1 if mesh is None else mesh.shape["sequence"]
    padded, block = _tiling(length, parts)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    # Padding comes last, so causality hides it from all that counts.
    q, k, v = (pad(x) for x in (q_BxLxHxK * jnp.asarray(width**-0.5, q_BxLxHxK.dtype),
                                k_BxLxHxK, v_BxLxHxK))  # fmt: skip
    segments = None if segment_ids_BxL is None else pad(segment_ids_BxL)
    if mesh is None:
        out = _on_one_device(_kernel(heads, padded, block, 1), q, k, v, segments, segments)
        return out[:, :length]
    of_queries = divisible_spec(mesh, ("batch", "length", "heads", None), q.shape)
    of_keys = divisible_spec(mesh, ("batch", None, "heads", None), q.shape)
    local_heads = heads // (mesh.shape["tensor"] if of_queries[2] else 1)
    kernel = _kernel(local_heads, padded, block, parts)
    placed = NamedSharding(mesh, PartitionSpec(None, LOGICAL_RULES["length"]))
    run = jax.shard_map(
        _on_one_device,
        mesh=mesh,
        in_specs=(
            kernel.manual_sharding_spec(placed),
            of_queries,
            of_keys,
            of_keys,
            PartitionSpec(*of_queries[:2]),
            PartitionSpec(*of_keys[:2]),
        ),
        out_specs=of_queries,
        check_vma=False,
    )
    return run(kernel, q, k, v, segments, segments)[:, :length]


def _tiling(length: int, parts: int) -> tuple[int, int]:
    """The padded length and the tile: least padding first, then the largest tile."""
    padded, negative = min((-(-length // (b * parts)) * b * parts, -b) for b in BLOCKS)
    return padded, -negative


def _kernel(heads: int, length: int, block: int, parts: int) -> kernels.SplashAttentionKernel:
    mask = masks.CausalMask((length, length), shard_count=parts)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        use_fused_bwd_kernel=True,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        interpret=platform() != "tpu",
    )


def _on_one_device(
    kernel: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if query_segments is None or key_segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(query_segments, key_segments))
    return out.swapaxes(1, 2)
