"""Causal self-attention within segments: one function, one kernel per kind of machine.

    attention(q, k, v, segment_ids=..., implementation="auto") -> [B, L, H, K]
    rotary_attention(q, k, v, cos, sin, n_heads=..., ...) -> [B, L, D], rotation included

`packed_attention` (TPU: with the rotation included, or splash), `cudnn` (GPU), `blockwise`
(CPU, and where the others cannot) and `plain` (what the others are tested against) implement it;
the right one runs on every device's part of the batch and heads.

Rotation: Su et al. 2021, arXiv 2104.09864; pairs are a head's halves (aria/model.py).

Sizes: B batch, L length, H heads, K head width; R rows (batch × heads), T queries, M keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aria_jax.sharding import active_mesh, divisible_spec, platform

Implementation = Literal["auto", "splash", "cudnn", "triton", "blockwise", "plain"]

ROPE_BASE = 500_000.0
ATTENTION_RESIDUALS = "attention"
"""Checkpoint name of output and log-sum-exp: what a remat policy may keep."""
TRITON_WIDTHS = (16, 32, 64, 128)
"""Widths of heads whose blocks Triton can hold."""
MIN_SPLASH_LENGTH = 128
"""Below this length splash attention would compute mostly padding."""
TILE = 256
"""Most queries of a tile of `blockwise`."""
MAX_KV_LENS = 8
"""Key lengths that `blockwise` compiles."""
SCORES_AT_ONCE = 1 << 20
"""Scores of one tile that exist at once: bounds the rows done together, so that the tile stays in
the processor's cache."""
_NEG_INF = -1e30


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
    if platform() == "gpu":
        # Kept in place of what they are made of: rotating once more is a pass over both.
        q, k = (checkpoint_name(x, ATTENTION_RESIDUALS) for x in (q, k))
    out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
    return out.reshape(q_BxLxD.shape)


def suits_packed(shape: tuple[int, ...], n_heads: int) -> bool:
    """Whether the packed kernel can run: on TPUs, on whole sequences and blocks of heads."""
    if platform() != "tpu":
        return False
    from aria_jax.kernels import packed_attention as packed

    mesh = active_mesh()
    tensor_ways, sequence_ways = (
        (1, 1) if mesh is None else (mesh.shape["tensor"], mesh.shape["sequence"])
    )
    _, length, columns = shape
    whole_heads = n_heads % tensor_ways == 0 and sequence_ways == 1
    suits = whole_heads and packed.suits(length, columns // tensor_ways, columns // n_heads)
    return suits and packed.fits_chip()


def _packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    from aria_jax.kernels import packed_attention as packed  # Pallas takes a second to import

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
        from aria_jax.kernels import packed_attention  # Pallas takes a second to import

        return packed_attention.splash_attend(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segment_ids, mesh)
    kernel = _on_one_device(implementation)
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


def _on_one_device(implementation: Implementation) -> Callable[..., jax.Array]:
    if implementation in ("cudnn", "triton"):
        from aria_jax.kernels import gpu  # Pallas takes a second to import

        return gpu.attend if implementation == "triton" else gpu.cudnn
    return blockwise if implementation == "blockwise" else plain


def automatic(q_BxLxHxK: jax.Array, segment_ids: jax.Array | None) -> Implementation:
    """The fastest implementation for these arrays on this platform."""
    if platform() == "tpu" and q_BxLxHxK.shape[1] >= MIN_SPLASH_LENGTH:
        return "splash"
    half = q_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
    if platform() != "gpu" or not half:
        return "blockwise"
    if segment_ids is None:
        return "cudnn"
    return "triton" if q_BxLxHxK.shape[-1] in TRITON_WIDTHS else "blockwise"


def keeps_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Remat policy that keeps what cuDNN's forward pass gives, none of which jax names."""
    return primitive.name.startswith("dot_product_attention_fwd")


def plain(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
) -> jax.Array:
    """`attention` with all scores at once, memory O(L²)."""
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


def blockwise(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
    *,
    tile: int = TILE,
    max_kv_lens: int = MAX_KV_LENS,
    scores_at_once: int = SCORES_AT_ONCE,
) -> jax.Array:
    """Flash attention in plain XLA: one query block at a time against keys [0, kv_len).

    Keys from kv_len on, which causality hides from the whole block, are never read, and only the
    block at hand has scores in memory. The backward pass computes them again from the saved
    log-sum-exp (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4). With its keys at once a
    block needs no online softmax, and its products are large enough to keep every core at work.
    Each kv_len is compiled by itself, so query blocks of long sequences share a few. Any length.
    """
    batch, length, heads, width = q_BxLxHxK.shape
    tiles = -(-length // tile)
    q_blocks_per_kv_len = -(-tiles // max_kv_lens)
    tiles = -(-tiles // q_blocks_per_kv_len) * q_blocks_per_kv_len
    tile = -(-length // tiles)
    padding = tiles * tile - length
    rows = batch * heads
    rows_at_once = max(min(rows, scores_at_once // (tile * length)), 1)
    while rows % rows_at_once:
        rows_at_once -= 1

    def grouped(x_BxLxHxK: jax.Array) -> jax.Array:
        x_BxHxLxK = jnp.pad(x_BxLxHxK.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return x_BxHxLxK.reshape(-1, rows_at_once, length + padding, width)

    segments = None
    if segment_ids_BxL is not None:
        padded = jnp.pad(segment_ids_BxL, ((0, 0), (0, padding)))
        segments = jnp.repeat(padded, heads, axis=0).reshape(-1, rows_at_once, length + padding)
    scale = jnp.asarray(width**-0.5, q_BxLxHxK.dtype)
    groups = (grouped(q_BxLxHxK * scale), grouped(k_BxLxHxK), grouped(v_BxLxHxK), segments)
    if rows_at_once == rows:
        out = _attend(*(None if x is None else x[0] for x in groups), tile, q_blocks_per_kv_len)
    else:
        out = jax.lax.map(lambda group: _attend(*group, tile, q_blocks_per_kv_len), groups)
    # Padding comes last, so causality has hidden it from all that is kept.
    return out.reshape(batch, heads, -1, width)[:, :, :length].swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_RxLxK: jax.Array,
    k_RxLxK: jax.Array,
    v_RxLxK: jax.Array,
    segments_RxL: jax.Array | None,
    tile: int,
    q_blocks_per_kv_len: int,
) -> jax.Array:
    """[R, L, K]; queries are already scaled, and the query blocks of a kv_len divide L."""
    return _forward(q_RxLxK, k_RxLxK, v_RxLxK, segments_RxL, tile, q_blocks_per_kv_len)[0]


def _scan_q_blocks(
    attend_block: Callable, sums: Any, length: int, tile: int, q_blocks_per_kv_len: int
) -> tuple:
    """`lax.scan` over all tiles; what each gives is put together as [R, L, …].

    Args:
        attend_block: (sums, first query, kv_len) -> sums, and a tuple of arrays [R, T, …].
        sums: what the tiles add to, or None.
    """
    step, found = tile * q_blocks_per_kv_len, []
    for kv_len in range(step, length + 1, step):
        body = partial(attend_block, kv_len=kv_len)
        if q_blocks_per_kv_len == 1:  # a loop of one step would copy what it gives
            sums, tiles = body(sums, kv_len - tile)
        else:
            sums, tiles = jax.lax.scan(body, sums, jnp.arange(kv_len - step, kv_len, tile))
            tiles = (x.swapaxes(0, 1).reshape(x.shape[1], step, -1) for x in tiles)
        found.append(tiles)
    return sums, *(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))


def _at(x: jax.Array, start: int | jax.Array, tile: int, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, tile, axis)


def _scores(
    q: jax.Array,
    k: jax.Array,
    segments: jax.Array | None,
    start: int | jax.Array,
    tile: int,
    kv_len: int,
) -> jax.Array:
    """Of a tile, float32 [R, T, M]."""
    visible = (start + jnp.arange(tile))[:, None] >= jnp.arange(kv_len)
    if segments is not None:
        visible &= _at(segments, start, tile)[:, :, None] == segments[:, None, :kv_len]
    scores = _einsum_f32("rtk,rmk->rtm", _at(q, start, tile), k[:, :kv_len])
    return jnp.where(visible, scores, _NEG_INF)


def _einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product in the narrower dtype of the two, summed in float32."""
    dtype = a.dtype if a.dtype.itemsize <= b.dtype.itemsize else b.dtype
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
    )


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    tile: int,
    q_blocks_per_kv_len: int,
) -> tuple[jax.Array, tuple[Any, ...]]:
    def attend_block(
        sums: None, start: int | jax.Array, kv_len: int
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        scores = _scores(q, k, segments, start, tile, kv_len)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        sum_ = weights.sum(-1, keepdims=True)
        out = _einsum_f32("rtm,rmk->rtk", weights, v[:, :kv_len]) / sum_
        return sums, (out.astype(v.dtype), largest + jnp.log(sum_))

    _, out, log_sum = _scan_q_blocks(attend_block, None, q.shape[1], tile, q_blocks_per_kv_len)
    out, log_sum = (
        checkpoint_name(out, ATTENTION_RESIDUALS),
        checkpoint_name(log_sum, ATTENTION_RESIDUALS),
    )
    return out, (q, k, v, segments, out, log_sum)


def _backward(
    tile: int, q_blocks_per_kv_len: int, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, log_sum = residuals
    # The softmax's own gradient needs Σ_m p_m dp_m, which is out · d_out (algorithm 4, line 4).
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1, keepdims=True)
    # Sums over queries are written so that the large factor is read as it lies in memory.
    q_RxKxL, d_out_RxKxL = q.swapaxes(1, 2), d_out.swapaxes(1, 2)

    def attend_block(
        sums: tuple[jax.Array, jax.Array], start: int | jax.Array, kv_len: int
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array]]:
        d_k_RxKxL, d_v_RxKxL = sums
        log_sum_i, delta_i, d_out_i = (_at(x, start, tile) for x in (log_sum, delta, d_out))
        weights = jnp.exp(_scores(q, k, segments, start, tile, kv_len) - log_sum_i)
        d_scores = weights * (_einsum_f32("rtk,rmk->rtm", d_out_i, v[:, :kv_len]) - delta_i)
        d_k = _einsum_f32("rkt,rtm->rkm", _at(q_RxKxL, start, tile, axis=2), d_scores)
        d_v = _einsum_f32("rkt,rtm->rkm", _at(d_out_RxKxL, start, tile, axis=2), weights)
        sums = d_k_RxKxL.at[:, :, :kv_len].add(d_k), d_v_RxKxL.at[:, :, :kv_len].add(d_v)
        return sums, (_einsum_f32("rtm,rmk->rtk", d_scores, k[:, :kv_len]).astype(q.dtype),)

    sums = (jnp.zeros(q_RxKxL.shape, jnp.float32),) * 2
    sums, d_q = _scan_q_blocks(attend_block, sums, q.shape[1], tile, q_blocks_per_kv_len)
    d_k, d_v = (x.swapaxes(1, 2).astype(k.dtype) for x in sums)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)
