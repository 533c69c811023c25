"""Flash attention in plain XLA: a tile of queries and keys at a time, with an online softmax.

Tiles that causality hides are never computed, and only the tile at hand has scores in memory. The
backward pass computes them again from the saved log-sum-exp (Dao et al. 2022, arXiv 2205.14135,
algorithms 1 and 4). Loops, not unrolled blocks: any length compiles in the same time.

Sizes: R rows (batch × heads), L length, K head width, T tile.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

TILE = 256
"""Most queries, and most keys, of a tile."""
SCORES_AT_ONCE = 1 << 21
"""Scores of one tile that exist at once: bounds the rows done together, so that the tile stays in
the processor's cache."""
RESIDUALS = "attention"
"""Checkpoint name of output and log-sum-exp: what a remat policy may keep."""
_NOTHING = -1e30


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
    tile: int = TILE,
) -> jax.Array:
    """See the package; any length, padded to a multiple of the tile."""
    batch, length, heads, width = q_BxLxHxK.shape
    n_tiles = -(-length // tile)
    tile = -(-length // n_tiles)
    padding = n_tiles * tile - length
    rows = batch * heads
    together = max(min(rows, SCORES_AT_ONCE // tile**2), 1)
    while rows % together:
        together -= 1

    def grouped(x_BxLxHxK: jax.Array) -> jax.Array:
        x_BxHxLxK = jnp.pad(x_BxLxHxK.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return x_BxHxLxK.reshape(-1, together, length + padding, width)

    segments = None
    if segment_ids_BxL is not None:
        padded = jnp.pad(segment_ids_BxL, ((0, 0), (0, padding)))
        segments = jnp.repeat(padded, heads, axis=0).reshape(-1, together, length + padding)
    scale = jnp.asarray(width**-0.5, q_BxLxHxK.dtype)
    groups = (grouped(q_BxLxHxK * scale), grouped(k_BxLxHxK), grouped(v_BxLxHxK), segments)
    if together == rows:
        out = _attend(*(None if x is None else x[0] for x in groups), tile)
    else:
        out = jax.lax.map(lambda group: _attend(*group, tile), groups)
    # Padding comes last, so causality has hidden it from all that is kept.
    return out.reshape(batch, heads, -1, width)[:, :, :length].swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_RxLxK, k_RxLxK, v_RxLxK, segments_RxL, tile):
    """[R, L, K]; queries are already scaled, and the tile divides L."""
    return _forward(q_RxLxK, k_RxLxK, v_RxLxK, segments_RxL, tile)[0]


def _at(x: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    """The i-th tile of the second axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=1)


def _with(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    """`x` with its i-th tile replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * part.shape[1], axis=1)


def _scorer(q, k, segments, tile: int) -> Callable:
    """(i, j) -> scores of the i-th tile of queries with the j-th of keys, float32 [R, T, T]."""

    def scores(i: jax.Array, j: jax.Array) -> jax.Array:
        positions = jnp.arange(tile)
        visible = (i * tile + positions)[:, None] >= j * tile + positions
        if segments is not None:
            visible &= _at(segments, i, tile)[:, :, None] == _at(segments, j, tile)[:, None]
        return jnp.where(
            visible, _product("rlk,rmk->rlm", _at(q, i, tile), _at(k, j, tile)), _NOTHING
        )

    return scores


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product in the narrower dtype of the two, summed in float32."""
    dtype = a.dtype if a.dtype.itemsize <= b.dtype.itemsize else b.dtype
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
    )


def _forward(q, k, v, segments, tile):
    rows, length, width = q.shape
    scores_of = _scorer(q, k, segments, tile)

    def of_queries(i, done):
        def with_keys(j, running):
            total, largest, sum_ = running
            scores = scores_of(i, j)
            new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - new_largest)
            shrink = jnp.exp(largest - new_largest)
            total = total * shrink + _product("rlm,rmk->rlk", weights, _at(v, j, tile))
            return total, new_largest, sum_ * shrink + weights.sum(-1, keepdims=True)

        nothing = (
            jnp.zeros((rows, tile, width), jnp.float32),
            jnp.full((rows, tile, 1), _NOTHING, jnp.float32),
            jnp.zeros((rows, tile, 1), jnp.float32),
        )
        total, largest, sum_ = jax.lax.fori_loop(0, i + 1, with_keys, nothing)
        out, log_sum = done
        return _with(out, total / sum_, i), _with(log_sum, largest + jnp.log(sum_), i)

    empty = jnp.zeros(v.shape, v.dtype), jnp.zeros((rows, length, 1), jnp.float32)
    out, log_sum = jax.lax.fori_loop(0, length // tile, of_queries, empty)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (q, k, v, segments, out, log_sum)


def _backward(tile, residuals, d_out):
    q, k, v, segments, out, log_sum = residuals
    scores_of = _scorer(q, k, segments, tile)
    # The softmax's own gradient needs Σ_m p_m dp_m, which is out · d_out (algorithm 4, line 4).
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1, keepdims=True)

    def of_queries(i, done):
        q_i, d_out_i, log_sum_i, delta_i = (_at(x, i, tile) for x in (q, d_out, log_sum, delta))

        def with_keys(j, running):
            d_q_i, d_k, d_v = running
            k_j, v_j = _at(k, j, tile), _at(v, j, tile)
            weights = jnp.exp(scores_of(i, j) - log_sum_i)
            d_scores = weights * (_product("rlk,rmk->rlm", d_out_i, v_j) - delta_i)
            d_v_j = _at(d_v, j, tile) + _product("rlm,rlk->rmk", weights, d_out_i)
            d_k_j = _at(d_k, j, tile) + _product("rlm,rlk->rmk", d_scores, q_i)
            d_q_i = d_q_i + _product("rlm,rmk->rlk", d_scores, k_j)
            return d_q_i, _with(d_k, d_k_j, j), _with(d_v, d_v_j, j)

        d_q, d_k, d_v = done
        start = (jnp.zeros(q_i.shape, jnp.float32), d_k, d_v)
        d_q_i, d_k, d_v = jax.lax.fori_loop(0, i + 1, with_keys, start)
        return _with(d_q, d_q_i, i), d_k, d_v

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    d_q, d_k, d_v = jax.lax.fori_loop(0, q.shape[1] // tile, of_queries, zeros)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
