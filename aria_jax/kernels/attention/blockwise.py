"""Flash attention in plain XLA: one query block at a time against keys [0, kv_len).

Keys from kv_len on, which causality hides from the whole block, are never read, and only the block
at hand has scores in memory. The backward pass computes them again from the saved log-sum-exp (Dao
et al. 2022, arXiv 2205.14135, algorithms 1 and 4). With its keys at once a block needs no online
softmax, and its products are large enough to keep every core at work. Each kv_len is compiled by
itself, so there are few: query blocks of long sequences share them.

Sizes: R rows (batch × heads), L length, K head width, T queries of a block, M = kv_len keys.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

TILE = 256
"""Most queries of a tile."""
MAX_KV_LENS = 8
"""Key lengths that are compiled."""
SCORES_AT_ONCE = 1 << 20
"""Scores of one tile that exist at once: bounds the rows done together, so that the tile stays in
the processor's cache."""
RESIDUALS = "attention"
"""Checkpoint name of output and log-sum-exp: what a remat policy may keep."""
_NEG_INF = -1e30


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
    *,
    tile: int = TILE,
    max_kv_lens: int = MAX_KV_LENS,
    scores_at_once: int = SCORES_AT_ONCE,
) -> jax.Array:
    """See the package; any length, padded to a multiple of the tile."""
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
def _attend(q_RxLxK, k_RxLxK, v_RxLxK, segments_RxL, tile, q_blocks_per_kv_len):
    """[R, L, K]; queries are already scaled, and the query blocks of a kv_len divide L."""
    return _forward(q_RxLxK, k_RxLxK, v_RxLxK, segments_RxL, tile, q_blocks_per_kv_len)[0]


def _scan_q_blocks(
    attend_block: Callable, sums, length: int, tile: int, q_blocks_per_kv_len: int
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


def _scores(q, k, segments, start: int | jax.Array, tile: int, kv_len: int) -> jax.Array:
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


def _forward(q, k, v, segments, tile, q_blocks_per_kv_len):
    def attend_block(sums, start, kv_len):
        scores = _scores(q, k, segments, start, tile, kv_len)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        sum_ = weights.sum(-1, keepdims=True)
        out = _einsum_f32("rtm,rmk->rtk", weights, v[:, :kv_len]) / sum_
        return sums, (out.astype(v.dtype), largest + jnp.log(sum_))

    _, out, log_sum = _scan_q_blocks(attend_block, None, q.shape[1], tile, q_blocks_per_kv_len)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (q, k, v, segments, out, log_sum)


def _backward(tile, q_blocks_per_kv_len, residuals, d_out):
    q, k, v, segments, out, log_sum = residuals
    # The softmax's own gradient needs Σ_m p_m dp_m, which is out · d_out (algorithm 4, line 4).
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1, keepdims=True)
    # Sums over queries are written so that the large factor is read as it lies in memory.
    q_RxKxL, d_out_RxKxL = q.swapaxes(1, 2), d_out.swapaxes(1, 2)

    def attend_block(sums, start, kv_len):
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
