"""Pairwise statistics as Pallas kernels for NVIDIA GPUs (Triton), on tensor cores.

One program per tile of the matrix of pairs: a product like any other, whose epilogue turns the
logits into partial sums of both sides (forward) or into the gradient of the logits (backward), so
that logits never reach memory. What is left of the backward pass, two products with that gradient,
is cuBLAS's. Rows are taken some at a time, which bounds what partial sums and gradients occupy.

Tensor cores multiply bfloat16. A float32 is the exact sum of three of them (8 + 8 + 8 bits of its
24), and six of the nine products of two such sums are as exact as float32 itself (Henry, Tang &
Heinecke 2019, arXiv 1904.06376). A bfloat16 input is one piece.

Sizes: P pieces, R rows taken at a time, C columns (all, padded), W padded width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from aria_jax.kernels.contrastive import (
    NEG_INF,
    PADDING_ID,
    Pair,
    Statistics,
    log_of_sum,
    padded,
)

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
