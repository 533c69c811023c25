"""Pallas kernels for NVIDIA GPUs (Triton): pairwise statistics, and attention within segments.

Statistics (see `contrastive`). One program per tile of the matrix of pairs: a product like any
other, whose epilogue turns the logits into partial sums of both sides (forward) or into the
gradient of the logits (backward), so that logits never reach memory. What is left of the backward
pass, two products with that gradient, is XLA's. Rows are taken some at a time, which bounds what
partial sums and gradients occupy.

Tensor cores multiply bfloat16. A float32 is the exact sum of three of them (8 + 8 + 8 bits of its
24), and six of the nine products of two such sums are as exact as float32 itself (Henry, Tang &
Heinecke 2019, arXiv 1904.06376). A bfloat16 input is one piece.

Attention (see `attention`). cuDNN's, which serves everything else, takes segments as a mask of all
scores only. Here a program has one block of queries and passes over the blocks of keys that it can
see: those before the first token of its segments are never read, and neither ids nor positions are
compared where a whole block belongs to one segment. Rows of many short pieces cost what they cost.
Recurrences: Dao 2023, arXiv 2307.08691, algorithms 1 and 2, in powers of two. The backward pass is
two kernels, one for keys and values and one for queries: a single one would add the gradients of
the queries up by atomics, in another order every time.

Sizes, statistics: P pieces, R rows taken at a time, C columns (all, padded), W padded width;
attention: B batch, L length, H heads, K head width, Q queries and M keys of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from aria_jax.kernels.attention import ATTENTION_RESIDUALS, TRITON_WIDTHS
from aria_jax.kernels.contrastive import (
    NEG_INF,
    PADDING_ID,
    Pair,
    Statistics,
    log_of_sum,
    padded,
)
from aria_jax.sharding import platform

LOGITS_AT_ONCE = 2**26
"""Logits of the rows taken at a time: their gradients are 400 MB in float32, 134 in bfloat16."""
PRODUCTS = {1: ((0, 0),), 3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))}
"""Pieces of the factors whose products count, by number of pieces; the smallest come first."""
_LEADING_BITS = -(2**16)
"""Of a float32 as an integer: sign, exponent and the 8 bits that a bfloat16 has."""


class _Tile(NamedTuple):
    """Sizes with which no GPU from sm_80 to sm_100 spills registers (tested)."""

    rows: int
    columns: int
    depth: int
    """Columns of the vectors that are in shared memory at a time."""
    stages: int


TILES = {1: _Tile(128, 128, 64, 3), 3: _Tile(128, 64, 32, 2)}
_WARPS = 8


class _Side(NamedTuple):
    """The rows or the columns, padded to whole tiles.

    Attributes:
        pieces: of the vectors, bfloat16 [P, N, W].
        ids: int32 [N].
        vectors: float32 [N]: log-sum-exps and cotangents, where there are any.
    """

    pieces: jax.Array
    ids: jax.Array
    vectors: tuple[jax.Array, ...]


def forward(
    x_NxE: jax.Array,
    y_MxE: jax.Array,
    x_ids_N: jax.Array,
    y_ids_M: jax.Array,
    scale: jax.Array,
    *,
    interpret: bool = False,
) -> Statistics:
    """See `contrastive`."""
    tile, blocks, columns = _tiled((x_NxE, x_ids_N), (y_MxE, y_ids_M))
    n_columns = len(columns.ids)

    def step(column: Pair, rows: _Side) -> tuple[Pair, Pair]:
        n_rows = len(rows.ids)
        of_row, of_column = (n_columns // tile.columns, n_rows), (n_rows // tile.rows, n_columns)
        row_max, row_total, column_max, column_total = _call(
            _statistics_kernel,
            tile,
            rows,
            columns,
            scale,
            [pl.BlockSpec((None, tile.rows), lambda i, j: (j, i))] * 2
            + [pl.BlockSpec((None, tile.columns), lambda i, j: (i, j))] * 2,
            [jax.ShapeDtypeStruct(of_row, jnp.float32)] * 2
            + [jax.ShapeDtypeStruct(of_column, jnp.float32)] * 2,
            "contrastive_statistics",
            interpret,
        )
        with_former = (
            jnp.concatenate([old[None], new])
            for old, new in zip(column, (column_max, column_total), strict=True)
        )
        return _merged(*with_former), _merged(row_max, row_total)

    nothing = jnp.full(n_columns, NEG_INF), jnp.zeros(n_columns)
    column, row = jax.lax.scan(step, nothing, blocks)
    (row_max, row_total), (column_max, column_total) = (
        [part.reshape(-1)[:length] for part in side]
        for side, length in ((row, len(x_NxE)), (column, len(y_MxE)))
    )
    return Statistics(
        log_of_sum(row_max, row_total), row_max, log_of_sum(column_max, column_total), column_max
    )


def backward(
    x_NxE: jax.Array,
    y_MxE: jax.Array,
    x_ids_N: jax.Array,
    y_ids_M: jax.Array,
    scale: jax.Array,
    row_lse_N: jax.Array,
    column_lse_M: jax.Array,
    row_cotangent_N: jax.Array,
    column_cotangent_M: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `contrastive`."""
    tile, blocks, columns = _tiled(
        (x_NxE, x_ids_N, row_lse_N, row_cotangent_N),
        (y_MxE, y_ids_M, column_lse_M, column_cotangent_M),
    )

    def step(dy_CxW: jax.Array, rows: _Side) -> tuple[jax.Array, jax.Array]:
        shape = (len(rows.pieces), len(rows.ids), len(columns.ids))
        (weights_PxRxC,) = _call(
            _weights_kernel,
            tile,
            rows,
            columns,
            scale,
            [pl.BlockSpec((shape[0], tile.rows, tile.columns), lambda i, j: (0, i, j))],
            [jax.ShapeDtypeStruct(shape, jnp.bfloat16)],
            "contrastive_weights",
            interpret,
        )
        dy = _product(weights_PxRxC.swapaxes(1, 2), rows.pieces)
        return dy_CxW + dy, _product(weights_PxRxC, columns.pieces)

    start = jnp.zeros(columns.pieces.shape[1:], jnp.float32)
    dy, dx = jax.lax.scan(step, start, blocks)
    n, e = x_NxE.shape
    return dx.reshape(-1, dx.shape[-1])[:n, :e], dy[: len(y_MxE), :e]


def _statistics_kernel(
    tile: _Tile, scale: Any, x: Any, x_ids: Any, y: Any, y_ids: Any, *partial_sums: Any
) -> None:
    logits, counts = _tile_logits(tile, scale, x, x_ids, y, y_ids)
    for axis, maximum, total in ((1, *partial_sums[:2]), (0, *partial_sums[2:])):
        largest = logits.max(axis)
        above = jnp.exp(logits - jnp.expand_dims(largest, axis))
        maximum[...], total[...] = largest, jnp.where(counts, above, 0.0).sum(axis)


def _weights_kernel(
    tile: _Tile, scale: Any, x: Any, x_ids: Any, row_lse: Any, row_cotangent: Any,
    y: Any, y_ids: Any, column_lse: Any, column_cotangent: Any, out: Any,
) -> None:  # fmt: skip
    logits, counts = _tile_logits(tile, scale, x, x_ids, y, y_ids)
    by_row = row_cotangent[...][:, None] * jnp.exp(logits - row_lse[...][:, None])
    by_column = column_cotangent[...][None] * jnp.exp(logits - column_lse[...][None])
    weights = jnp.where(counts, by_row + by_column, 0.0)
    for number, piece in enumerate(_pieces(weights, len(PRODUCTS[out.shape[0]]) > 1)):
        out[number] = piece


def _tile_logits(
    tile: _Tile, scale: Any, x: Any, x_ids: Any, y: Any, y_ids: Any
) -> tuple[jax.Array, jax.Array]:
    """Logits of a tile, `NEG_INF` for the pairs that do not count; and which do."""
    n_pieces, _, width = x.shape

    def add(k: Any, sum_now: jax.Array) -> jax.Array:
        here = pl.ds(k * tile.depth, tile.depth)
        xs, ys = ([z[p, :, here] for p in range(n_pieces)] for z in (x, y))
        for one, other in PRODUCTS[n_pieces]:
            sum_now += jnp.dot(xs[one], ys[other].T, preferred_element_type=jnp.float32)
        return sum_now

    start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    logits = scale[0] * jax.lax.fori_loop(0, width // tile.depth, add, start)
    rows, columns = x_ids[...][:, None], y_ids[...][None]
    counts = (rows != columns) & (rows != PADDING_ID) & (columns != PADDING_ID)
    return jnp.where(counts, logits, NEG_INF), counts


def _call(
    kernel: Callable[..., None],
    tile: _Tile,
    rows: _Side,
    columns: _Side,
    scale: jax.Array,
    out_specs: list[pl.BlockSpec],
    out_shape: list[jax.ShapeDtypeStruct],
    name: str,
    interpret: bool,
) -> list[jax.Array]:
    """Neighbouring programs share their columns: those of all rows at hand run side by side."""
    n_pieces, n_rows, width = rows.pieces.shape
    flops = 2 * len(PRODUCTS[n_pieces]) * n_rows * len(columns.ids) * width
    of_rows = [pl.BlockSpec((n_pieces, tile.rows, width), lambda i, j: (0, i, 0))]
    of_rows += [pl.BlockSpec((tile.rows,), lambda i, j: (i,))] * (1 + len(rows.vectors))
    of_columns = [pl.BlockSpec((n_pieces, tile.columns, width), lambda i, j: (0, j, 0))]
    of_columns += [pl.BlockSpec((tile.columns,), lambda i, j: (j,))] * (1 + len(columns.vectors))
    return pl.pallas_call(
        partial(kernel, tile),
        grid=(n_rows // tile.rows, len(columns.ids) // tile.columns),
        in_specs=[pl.BlockSpec((1,), lambda i, j: (0,)), *of_rows, *of_columns],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=tile.stages),
        name=name,
        metadata={"flops": str(flops)},
        interpret=interpret,
    )(
        jnp.reshape(scale, (1,)).astype(jnp.float32),
        *(rows.pieces, rows.ids, *rows.vectors),
        *(columns.pieces, columns.ids, *columns.vectors),
    )


def _tiled(
    rows: tuple[jax.Array, ...], columns: tuple[jax.Array, ...]
) -> tuple[_Tile, _Side, _Side]:
    """The tile; the rows in blocks, as a leading axis of every array; and the columns.

    A side is given as vectors, ids and float32 arrays of one number for each.
    """
    exact = rows[0].dtype == jnp.float32
    tile = TILES[3 if exact else 1]
    width = -(-rows[0].shape[1] // tile.depth) * tile.depth

    def side(arrays: tuple[jax.Array, ...], multiple: int) -> _Side:
        z, ids, *vectors = arrays
        z, ids = padded(z, ids, multiple, width)
        pieces = jnp.stack(_pieces(z, exact))
        return _Side(pieces, ids, tuple(jnp.pad(v, (0, len(ids) - len(v))) for v in vectors))

    all_columns = side(columns, tile.columns)
    at_once = max(LOGITS_AT_ONCE // len(all_columns.ids) // tile.rows, 1) * tile.rows
    at_once = min(at_once, -(-len(rows[0]) // tile.rows) * tile.rows)
    all_rows = side(rows, at_once)
    pieces = all_rows.pieces.reshape(len(all_rows.pieces), -1, at_once, width).swapaxes(0, 1)
    ids, *vectors = (a.reshape(-1, at_once) for a in (all_rows.ids, *all_rows.vectors))
    return tile, _Side(pieces, ids, tuple(vectors)), all_columns


def _pieces(x: jax.Array, exact: bool) -> list[jax.Array]:
    """bfloat16 arrays whose sum is `x`: one, or for a float32 to be represented exactly three."""
    found: list[jax.Array] = []
    while exact and len(found) < 2:
        # Not by rounding: XLA may take a float32 made bfloat16 and float32 again for the first.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(_LEADING_BITS)
        leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(leading.astype(jnp.bfloat16))
        x = x - leading
    return [*found, x.astype(jnp.bfloat16)]


def _product(a_PxNxK: jax.Array, b_PxKxM: jax.Array) -> jax.Array:
    """Of two matrices in pieces, float32 [N, M]."""
    return sum(
        jnp.matmul(a_PxNxK[one], b_PxKxM[other], preferred_element_type=jnp.float32)
        for one, other in PRODUCTS[len(a_PxNxK)]
    )  # type: ignore[return-value]


def _merged(maximum_SxN: jax.Array, total_SxN: jax.Array) -> Pair:
    """Maximum and sum of disjoint sets of logits, [N] each, from those of each set."""
    maximum = maximum_SxN.max(0)
    return maximum, (total_SxN * jnp.exp(maximum_SxN - maximum)).sum(0)


LOG2_E = float(np.log2(np.e))


class _Blocks(NamedTuple):
    """Block lengths: `rows` of what a program keeps, `step` of what it passes over."""

    rows: int
    step: int
    warps: int
    stages: int


ATTENTION_FORWARD = _Blocks(128, 64, 8, 3)
ATTENTION_BACKWARD = {64: _Blocks(64, 64, 4, 2), 128: _Blocks(64, 32, 8, 2)}
"""By the widest head: with more, registers would spill (tested from sm_80 to sm_100)."""
ALIGNMENT = 128
"""Sequences are padded to a multiple of this; blocks divide it."""


def cudnn(
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


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
) -> jax.Array:
    """As `attention`, on one device. Elsewhere than on a GPU the kernels are interpreted, slowly.

    Raises:
        ValueError: a width of heads not in `TRITON_WIDTHS`.
    """
    length, width = q_BxLxHxK.shape[1], q_BxLxHxK.shape[3]
    if width not in TRITON_WIDTHS:
        raise ValueError(f"heads of {width}: attention by Triton takes {TRITON_WIDTHS}")
    if segment_ids_BxL is None:
        segment_ids_BxL = jnp.zeros(q_BxLxHxK.shape[:2], jnp.int32)
    padding = [(0, 0), (0, -length % ALIGNMENT)]
    # Padding comes last, so causality hides it from all that counts.
    q, k, v = (jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    segments = jnp.pad(segment_ids_BxL.astype(jnp.int32), padding, mode="edge")
    return _attend(q, k, v, segments)[:, :length]


@jax.custom_vjp
def _attend(
    q_BxLxHxK: jax.Array, k_BxLxHxK: jax.Array, v_BxLxHxK: jax.Array, segments_BxL: jax.Array
) -> jax.Array:
    return _attend_forward(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, length, heads, _ = q.shape
    out, lse_BxHxL = _attention_call(
        _attention_kernel,
        ATTENTION_FORWARD,
        _key_ranges(segments, ATTENTION_FORWARD),
        block=(q, segments),
        passed=(k, v, segments),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        products=2,
        name="segment_attention",
    )
    out = checkpoint_name(out, ATTENTION_RESIDUALS)
    lse_BxHxL = checkpoint_name(lse_BxHxL, ATTENTION_RESIDUALS)
    return out, (q, k, v, segments, out, lse_BxHxL)


def _attend_backward(
    residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, lse = residuals
    # The softmax's own gradient needs Σ_m p_m dp_m, which is out · d_out.
    delta_BxLxH = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    of_queries = d_out, lse, delta_BxLxH.swapaxes(1, 2)
    blocks = ATTENTION_BACKWARD[64 if q.shape[-1] <= 64 else 128]
    dk, dv = _attention_call(
        _key_gradient_kernel,
        blocks,
        _query_ranges(segments, blocks),
        block=(k, v, segments),
        passed=(q, *of_queries, segments),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        products=4,
        name="segment_attention_key_gradient",
    )
    (dq,) = _attention_call(
        _query_gradient_kernel,
        blocks,
        _key_ranges(segments, blocks),
        block=(q, *of_queries, segments),
        passed=(k, v, segments),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        products=3,
        name="segment_attention_query_gradient",
    )
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _attention_kernel(
    blocks: _Blocks, ranges: Any, q: Any, q_ids: Any, k: Any, v: Any, k_ids: Any, out: Any, lse: Any
) -> None:
    here, scale = _own_block(blocks), q.shape[1] ** -0.5 * LOG2_E
    queries, ids, at = q[...], q_ids[...], here * blocks.rows + jnp.arange(blocks.rows)

    def visit(j: Any, carry: tuple, masked: bool, causal: bool) -> tuple:
        sums, total, largest = carry
        keys = pl.ds(j * blocks.step, blocks.step)
        scores = _dot_f32(queries, k[keys, :].T) * scale
        if masked:
            visible = ids[:, None] == k_ids[keys][None]
            if causal:
                visible &= at[:, None] >= (j * blocks.step + jnp.arange(blocks.step))[None]
            scores = jnp.where(visible, scores, NEG_INF)
        new_largest = jnp.maximum(largest, scores.max(1))
        weights = jnp.exp2(scores - new_largest[:, None])
        shrink = jnp.exp2(largest - new_largest)
        values = v[keys, :]
        sums = sums * shrink[:, None] + _dot_f32(weights.astype(values.dtype), values)
        return sums, total * shrink + weights.sum(1), new_largest

    sums, total, largest = _over_keys(
        blocks,
        ranges,
        visit,
        (
            jnp.zeros(q.shape, jnp.float32),
            jnp.zeros(blocks.rows, jnp.float32),
            jnp.full(blocks.rows, NEG_INF, jnp.float32),
        ),
    )
    # Every position sees itself, so no sum is empty.
    out[...] = (sums / total[:, None]).astype(out.dtype)
    lse[...] = largest + jnp.log2(total)


def _query_gradient_kernel(
    blocks: _Blocks, ranges: Any, q: Any, d_out: Any, lse: Any, delta: Any, q_ids: Any,
    k: Any, v: Any, k_ids: Any, d_q: Any,
) -> None:  # fmt: skip
    here, scale = _own_block(blocks), q.shape[1] ** -0.5
    queries, d_outs, ids = q[...], d_out[...], q_ids[...]
    log_sum, own = lse[...][:, None], delta[...][:, None]
    at = here * blocks.rows + jnp.arange(blocks.rows)

    def visit(j: Any, total: jax.Array, masked: bool, causal: bool) -> jax.Array:
        here = pl.ds(j * blocks.step, blocks.step)
        keys = k[here, :]
        weights = jnp.exp2(_dot_f32(queries, keys.T) * (scale * LOG2_E) - log_sum)
        if masked:
            visible = ids[:, None] == k_ids[here][None]
            if causal:
                visible &= at[:, None] >= (j * blocks.step + jnp.arange(blocks.step))[None]
            weights = jnp.where(visible, weights, 0.0)
        d_scores = weights * (_dot_f32(d_outs, v[here, :].T) - own)
        return total + _dot_f32(d_scores.astype(keys.dtype), keys)

    total = _over_keys(blocks, ranges, visit, jnp.zeros(q.shape, jnp.float32))
    d_q[...] = (total * scale).astype(d_q.dtype)


def _key_gradient_kernel(
    blocks: _Blocks, ranges: Any, k: Any, v: Any, k_ids: Any,
    q: Any, d_out: Any, lse: Any, delta: Any, q_ids: Any, d_k: Any, d_v: Any,
) -> None:  # fmt: skip
    """Scores lie transposed, so that both products take them from registers."""
    here, scale = pl.program_id(0), k.shape[1] ** -0.5
    keys, values, ids = k[...], v[...], k_ids[...]
    at = here * blocks.rows + jnp.arange(blocks.rows)

    def visit(i: Any, carry: tuple, masked: bool, causal: bool) -> tuple:
        of_keys, of_values = carry
        here = pl.ds(i * blocks.step, blocks.step)
        queries, d_outs = q[here, :], d_out[here, :]
        scores_t = _dot_f32(keys, queries.T) * (scale * LOG2_E)
        weights_t = jnp.exp2(scores_t - lse[here][None])
        if masked:
            visible = ids[:, None] == q_ids[here][None]
            if causal:
                visible &= at[:, None] <= (i * blocks.step + jnp.arange(blocks.step))[None]
            weights_t = jnp.where(visible, weights_t, 0.0)
        of_values += _dot_f32(weights_t.astype(d_outs.dtype), d_outs)
        d_scores_t = weights_t * (_dot_f32(values, d_outs.T) - delta[here][None])
        return of_keys + _dot_f32(d_scores_t.astype(queries.dtype), queries), of_values

    # Those on the diagonal, those of one segment, those that may be of others.
    diagonal = here * (blocks.rows // blocks.step), (here + 1) * (blocks.rows // blocks.step)
    same_until, stop = ranges[0], ranges[1]
    carry = (jnp.zeros(k.shape, jnp.float32),) * 2
    for first, last, masked, causal in (
        (*diagonal, True, True),
        (diagonal[1], same_until, False, False),
        (same_until, stop, True, False),
    ):
        carry = jax.lax.fori_loop(first, last, partial(visit, masked=masked, causal=causal), carry)
    d_k[...] = (carry[0] * scale).astype(d_k.dtype)
    d_v[...] = carry[1].astype(d_v.dtype)


def _own_block(blocks: _Blocks) -> Any:
    """Which block of queries a program has: the last, which see most, come first."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _over_keys(blocks: _Blocks, ranges: Any, visit: Any, carry: Any) -> Any:
    """Passes over the keys that a block of queries sees: those that may be of other segments, those
    of its own, those on the diagonal.
    """
    diagonal = _own_block(blocks) * (blocks.rows // blocks.step)
    start, same_from = ranges[0], ranges[1]
    for first, last, masked, causal in (
        (start, same_from, True, False),
        (same_from, diagonal, False, False),
        (diagonal, diagonal + blocks.rows // blocks.step, True, True),
    ):
        carry = jax.lax.fori_loop(first, last, partial(visit, masked=masked, causal=causal), carry)
    return carry


def _dot_f32(a: jax.Array, b: jax.Array) -> jax.Array:
    # For float32, which TF32 would leave with three digits, this leaves tensor cores unused.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _key_ranges(segments_BxL: jax.Array, blocks: _Blocks) -> jax.Array:
    """For every block of queries, int32 [B, L/Q, 2]: the first block of keys with a token of one of
    its segments, and the first from which on all keys are of its one segment.
    """
    overlap, same = _relation(segments_BxL, blocks.rows, blocks.step)
    n_rows, n_steps = overlap.shape[1:]
    step = jnp.arange(n_steps)
    diagonal = jnp.arange(n_rows)[:, None] * (blocks.rows // blocks.step)
    start = jnp.where(overlap & (step < diagonal), step, diagonal).min(-1)
    same_from = jnp.where(~same & (step < diagonal), step + 1, 0).max(-1)
    return jnp.stack([start, jnp.maximum(start, same_from)], -1).astype(jnp.int32)


def _query_ranges(segments_BxL: jax.Array, blocks: _Blocks) -> jax.Array:
    """For every block of keys, int32 [B, L/M, 2]: the block of queries up to which all after the
    diagonal are of its one segment, and the one after the last with a token of its segments.
    """
    overlap, same = _relation(segments_BxL, blocks.rows, blocks.step)
    n_rows, n_steps = overlap.shape[1:]
    step = jnp.arange(n_steps)
    after = (jnp.arange(n_rows)[:, None] + 1) * (blocks.rows // blocks.step)
    stop = jnp.where(overlap & (step >= after), step + 1, after).max(-1)
    same_until = jnp.where(~same & (step >= after), step, n_steps).min(-1)
    return jnp.stack([jnp.minimum(same_until, stop), stop], -1).astype(jnp.int32)


def _relation(segments_BxL: jax.Array, rows: int, step: int) -> tuple[jax.Array, jax.Array]:
    """Whether blocks may share a segment, and whether they are of one and the same; [B, L/rows,
    L/step]. Ids need not be in order: what may be shared is then an upper bound.
    """
    batch = len(segments_BxL)
    of_rows = segments_BxL.reshape(batch, -1, 1, rows)
    of_steps = segments_BxL.reshape(batch, 1, -1, step)
    (low, high), (low_step, high_step) = ((x.min(-1), x.max(-1)) for x in (of_rows, of_steps))
    overlap = (low <= high_step) & (low_step <= high)
    return overlap, (low == high_step) & (low_step == high)


def _attention_call(
    kernel: Any,
    blocks: _Blocks,
    ranges: jax.Array,
    *,
    block: tuple[jax.Array, ...],
    passed: tuple[jax.Array, ...],
    out_shape: list[jax.ShapeDtypeStruct],
    products: int,
    name: str,
) -> Any:
    """A program for each block, head and row; arrays are [B, L, H, K], [B, H, L] or [B, L].

    Args:
        block: arrays of which a program has its block, as of what it returns.
        passed: arrays of which it has the whole sequence.
        products: matrix products of a block of scores.
    """
    batch, length, heads, width = block[0].shape
    n = length // blocks.rows
    of_keys = kernel is _key_gradient_kernel

    def spec(x: Any, rows: int, mine: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, rows, None, width), lambda i, h, b: (b, mine(i), h, 0))
        if x.ndim == 3:
            return pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, mine(i)))
        return pl.BlockSpec((None, rows), lambda i, h, b: (b, mine(i)))

    def own(i: Any) -> Any:
        return i if of_keys else n - 1 - i

    scores = batch * heads * length * (length + blocks.rows) // 2
    return pl.pallas_call(
        partial(kernel, blocks),
        grid=(n, heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, 2), lambda i, h, b: (b, own(i), 0)),
            *(spec(x, blocks.rows, own) for x in block),
            *(spec(x, length, lambda i: 0) for x in passed),
        ],
        out_specs=[spec(x, blocks.rows, own) for x in out_shape],
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        # Of one segment: how many there are is not known here.
        metadata={"flops": str(2 * products * scores * width)},
        name=name,
        interpret=platform() != "gpu",
    )(ranges, *block, *passed)
