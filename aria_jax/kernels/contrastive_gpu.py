"""Pairwise statistics as Pallas kernels for NVIDIA GPUs (Triton).

One program per block of rows; it keeps the block's vectors and running sums in registers and
passes over all columns. Each kernel serves one side only, so both run twice, with the sides
exchanged: column sums of a row-wise pass would need atomics, and be different every time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from aria_jax.kernels.contrastive import (
    NEG_INF,
    PADDING_ID,
    Statistics,
    log_of_sum,
    padded,
)

TILE_ROWS = 64
TILE_COLUMNS = 32
_WARPS, _STAGES = 8, 2

Side = tuple[jax.Array, ...]
"""Vectors, ids, log-sum-exps and cotangents of the rows or of the columns."""


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
    rows, columns = (x_NxE, x_ids_N), (y_MxE, y_ids_M)
    one_side = partial(_row_statistics, scale=scale, interpret=interpret)
    return Statistics(*one_side(rows, columns), *one_side(columns, rows))


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
    rows = x_NxE, x_ids_N, row_lse_N, row_cotangent_N
    columns = y_MxE, y_ids_M, column_lse_M, column_cotangent_M
    one_side = partial(_weighted_sum, scale=scale, interpret=interpret)
    return one_side(rows, columns), one_side(columns, rows)


def _row_statistics(
    rows: Side, columns: Side, *, scale: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp and maximum of each row."""
    n = len(rows[0])
    rows, columns = _tiled(rows, TILE_ROWS), _tiled(columns, TILE_COLUMNS)
    shape = jax.ShapeDtypeStruct((len(rows[0]),), jnp.float32)
    of_row = pl.BlockSpec((TILE_ROWS,), lambda i: (i,))
    maximum, total = _call(
        _statistics_kernel, rows, columns, scale, [of_row, of_row], [shape, shape], interpret
    )
    return log_of_sum(maximum, total)[:n], maximum[:n]


def _statistics_kernel(
    scale: Any, x: Any, x_ids: Any, y: Any, y_ids: Any, maximum: Any, total: Any
) -> None:
    def pass_tile(j: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        max_now, total_now = carry
        columns = pl.ds(j * TILE_COLUMNS, TILE_COLUMNS)
        y_tile = plgpu.load(y.at[columns, :])
        logits, counts = _tile_logits(
            scale, x[...], y_tile, x_ids[...], plgpu.load(y_ids.at[columns])
        )
        new_max = jnp.maximum(max_now, logits.max(1))
        here = jnp.where(counts, jnp.exp(logits - new_max[:, None]), 0.0).sum(1)
        return new_max, total_now * jnp.exp(max_now - new_max) + here

    empty = jnp.full((TILE_ROWS,), NEG_INF, jnp.float32), jnp.zeros((TILE_ROWS,), jnp.float32)
    maximum[...], total[...] = jax.lax.fori_loop(0, y.shape[0] // TILE_COLUMNS, pass_tile, empty)


def _weighted_sum(rows: Side, columns: Side, *, scale: jax.Array, interpret: bool) -> jax.Array:
    """W y for the weights W of the tiles; a side is (vectors, ids, lse, cotangent)."""
    n, e = rows[0].shape
    rows, columns = _tiled(rows, TILE_ROWS), _tiled(columns, TILE_COLUMNS)
    shape = jax.ShapeDtypeStruct(rows[0].shape, jnp.float32)
    of_row = pl.BlockSpec((TILE_ROWS, shape.shape[1]), lambda i: (i, 0))
    (out,) = _call(_gradient_kernel, rows, columns, scale, [of_row], [shape], interpret)
    return out[:n, :e]


def _gradient_kernel(
    scale: Any, x: Any, x_ids: Any, row_lse: Any, row_cotangent: Any,
    y: Any, y_ids: Any, column_lse: Any, column_cotangent: Any, out: Any,
) -> None:  # fmt: skip
    def pass_tile(j: Any, sum_now: jax.Array) -> jax.Array:
        columns = pl.ds(j * TILE_COLUMNS, TILE_COLUMNS)
        y_tile = plgpu.load(y.at[columns, :])
        logits, counts = _tile_logits(
            scale, x[...], y_tile, x_ids[...], plgpu.load(y_ids.at[columns])
        )
        by_row = row_cotangent[...][:, None] * jnp.exp(logits - row_lse[...][:, None])
        lse, cotangent = (
            plgpu.load(column_lse.at[columns]),
            plgpu.load(column_cotangent.at[columns]),
        )
        by_column = cotangent[None, :] * jnp.exp(logits - lse[None, :])
        weights = jnp.where(counts, by_row + by_column, 0.0).astype(y_tile.dtype)
        return sum_now + _dot_f32(weights, y_tile)

    start = jnp.zeros(out.shape, jnp.float32)
    out[...] = jax.lax.fori_loop(0, y.shape[0] // TILE_COLUMNS, pass_tile, start)


def _call(
    kernel: Callable[..., None],
    rows: Side,
    columns: Side,
    scale: jax.Array,
    out_specs: list[pl.BlockSpec],
    out_shape: list[jax.ShapeDtypeStruct],
    interpret: bool,
) -> list[jax.Array]:
    width = rows[0].shape[1]
    of_row = [pl.BlockSpec((TILE_ROWS, width), lambda i: (i, 0))]
    of_row += [pl.BlockSpec((TILE_ROWS,), lambda i: (i,))] * (len(rows) - 1)
    everything = [pl.BlockSpec(memory_space=pl.ANY)] * len(columns)
    return pl.pallas_call(
        kernel,
        grid=(len(rows[0]) // TILE_ROWS,),
        in_specs=[pl.BlockSpec((1,), lambda i: (0,)), *of_row, *everything],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name=kernel.__name__.strip("_"),
        interpret=interpret,
    )(jnp.reshape(scale, (1,)).astype(jnp.float32), *rows, *columns)


def _tile_logits(
    scale: Any, x: jax.Array, y: jax.Array, x_ids: jax.Array, y_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of a tile, `NEG_INF` for the pairs that do not count; and which do."""
    logits = scale[0] * _dot_f32(x, y.T)
    rows, columns = x_ids[:, None], y_ids[None, :]
    counts = (rows != columns) & (rows != PADDING_ID) & (columns != PADDING_ID)
    return jnp.where(counts, logits, NEG_INF), counts


def _dot_f32(a: jax.Array, b: jax.Array) -> jax.Array:
    # TF32 would leave float32 inputs with three digits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _tiled(side: Side, tile: int) -> Side:
    """A side padded to whole tiles; Triton's blocks are powers of two wide, at least 16."""
    x, ids, *vectors = side
    width = max(16, 1 << (x.shape[1] - 1).bit_length())
    x, ids = padded(x, ids, tile, width)
    return x, ids, *(jnp.pad(v, (0, len(x) - len(v))) for v in vectors)
