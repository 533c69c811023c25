"""Pairwise statistics as Pallas kernels for TPU (Mosaic).

The grid walks the tiles of the N×M matrix row by row. A row's running maximum and sum live in
scratch while its tiles pass; those of all columns stay in VMEM for the whole grid (8 bytes a
column). Vectors of row values travel lane-major, [1, rows], and are transposed inside the kernel: a
[rows, 1] array in HBM would be padded to 128 lanes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aria_jax.kernels.contrastive import (
    NEG_INF,
    PADDING_ID,
    Statistics,
    log_of_sum,
    padded,
)

TILE_ROWS = TILE_COLUMNS = 512
LANES = 128

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
    n, m = len(x_NxE), len(y_MxE)
    x, y, x_ids, y_ids, tn, tm = _tiled(x_NxE, y_MxE, x_ids_N, y_ids_M)
    rows, columns, width = len(x) // tn, len(y) // tm, x.shape[1]
    of_row = pl.BlockSpec((1, 1, tn), lambda i, j: (i, 0, 0))
    of_columns = pl.BlockSpec((columns, 1, tm), lambda i, j: (0, 0, 0))
    row_shape = jax.ShapeDtypeStruct((rows, 1, tn), jnp.float32)
    column_shape = jax.ShapeDtypeStruct((columns, 1, tm), jnp.float32)
    out = pl.pallas_call(
        partial(_forward_kernel, columns=columns),
        grid=(rows, columns),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tn, width), lambda i, j: (i, 0)),
            pl.BlockSpec((tm, width), lambda i, j: (j, 0)),
            of_row,
            pl.BlockSpec((1, 1, tm), lambda i, j: (j, 0, 0)),
        ],
        out_specs=[of_row, of_row, of_columns, of_columns],
        out_shape=[row_shape, row_shape, column_shape, column_shape],
        scratch_shapes=[pltpu.VMEM((tn, 1), jnp.float32)] * 2,
        cost_estimate=_cost(x, y, products=1),
        name="pair_statistics",
        interpret=interpret,
    )(
        jnp.reshape(scale, (1,)).astype(jnp.float32),
        x,
        y,
        x_ids.reshape(rows, 1, tn),
        y_ids.reshape(columns, 1, tm),
    )
    row_max, row_total, column_max, column_total = (value.reshape(-1) for value in out)
    return Statistics(
        log_of_sum(row_max, row_total)[:n],
        row_max[:n],
        log_of_sum(column_max, column_total)[:m],
        column_max[:m],
    )


def _forward_kernel(
    scale: Any, x: Any, y: Any, x_ids: Any, y_ids: Any,
    row_max: Any, row_total: Any, column_max: Any, column_total: Any, max_now: Any, total_now: Any,
    *, columns: int,
) -> None:  # fmt: skip
    i, j = pl.program_id(0), pl.program_id(1)
    logits, counts = _tile_logits(scale, x, y, x_ids, y_ids)

    @pl.when(j == 0)
    def _() -> None:
        max_now[...] = jnp.full(max_now.shape, NEG_INF, jnp.float32)
        total_now[...] = jnp.zeros(total_now.shape, jnp.float32)

    @pl.when(i == 0)
    def _() -> None:
        column_max[j] = jnp.full(column_max.shape[1:], NEG_INF, jnp.float32)
        column_total[j] = jnp.zeros(column_total.shape[1:], jnp.float32)

    new_max = jnp.maximum(max_now[...], logits.max(1, keepdims=True))
    here = jnp.where(counts, jnp.exp(logits - new_max), 0).sum(1, keepdims=True)
    total_now[...] = total_now[...] * jnp.exp(max_now[...] - new_max) + here
    max_now[...] = new_max
    new_max = jnp.maximum(column_max[j], logits.max(0, keepdims=True))
    here = jnp.where(counts, jnp.exp(logits - new_max), 0).sum(0, keepdims=True)
    column_total[j] = column_total[j] * jnp.exp(column_max[j] - new_max) + here
    column_max[j] = new_max

    @pl.when(j == columns - 1)
    def _() -> None:
        row_max[0] = max_now[...].T
        row_total[0] = total_now[...].T


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
    """See `contrastive`; one kernel, run for each side: a side's sum needs its tiles in turn."""
    rows = x_NxE, x_ids_N, row_lse_N, row_cotangent_N
    columns = y_MxE, y_ids_M, column_lse_M, column_cotangent_M
    weighted = partial(_weighted_sum, scale=scale, interpret=interpret)
    return weighted(rows, columns), weighted(columns, rows)


def _weighted_sum(rows: Side, columns: Side, *, scale: jax.Array, interpret: bool) -> jax.Array:
    """W y for the weights W of the tiles; a side is (vectors, ids, lse, cotangent)."""
    (x, x_ids, *of_x), (y, y_ids, *of_y) = rows, columns
    n, e = x.shape
    x, y, x_ids, y_ids, tn, tm = _tiled(x, y, x_ids, y_ids)
    n_rows, n_columns, width = len(x) // tn, len(y) // tm, x.shape[1]
    of_row = pl.BlockSpec((1, 1, tn), lambda i, j: (i, 0, 0))
    of_column = pl.BlockSpec((1, 1, tm), lambda i, j: (j, 0, 0))
    out = pl.pallas_call(
        _backward_kernel,
        grid=(n_rows, n_columns),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tn, width), lambda i, j: (i, 0)),
            pl.BlockSpec((tm, width), lambda i, j: (j, 0)),
            *[of_row] * 3,
            *[of_column] * 3,
        ],
        out_specs=pl.BlockSpec((tn, width), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x, y, products=2),
        name="pair_gradient",
        interpret=interpret,
    )(
        jnp.reshape(scale, (1,)).astype(jnp.float32),
        x,
        y,
        *[jnp.pad(v, (0, len(x) - len(v))).reshape(n_rows, 1, tn) for v in (x_ids, *of_x)],
        *[jnp.pad(v, (0, len(y) - len(v))).reshape(n_columns, 1, tm) for v in (y_ids, *of_y)],
    )
    return out[:n, :e]


def _backward_kernel(
    scale: Any, x: Any, y: Any, x_ids: Any, row_lse: Any, row_cotangent: Any,
    y_ids: Any, column_lse: Any, column_cotangent: Any, out: Any,
) -> None:  # fmt: skip
    logits, counts = _tile_logits(scale, x, y, x_ids, y_ids)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out[...] = jnp.zeros(out.shape, jnp.float32)

    weights = row_cotangent[0].T * jnp.exp(logits - row_lse[0].T)
    weights += column_cotangent[0] * jnp.exp(logits - column_lse[0])
    weights = jnp.where(counts, weights, 0).astype(y.dtype)
    out[...] += _dot_f32(weights, y[...], (((1,), (0,)), ((), ())))


def _tile_logits(scale: Any, x: Any, y: Any, x_ids: Any, y_ids: Any) -> tuple[jax.Array, jax.Array]:
    """Logits of a tile, `NEG_INF` for the pairs that do not count; and which do."""
    logits = scale[0] * _dot_f32(x[...], y[...], (((1,), (1,)), ((), ())))
    rows, columns = x_ids[0].T, y_ids[0]
    counts = (rows != columns) & (rows != PADDING_ID) & (columns != PADDING_ID)
    return jnp.where(counts, logits, NEG_INF), counts


def _dot_f32(a: jax.Array, b: jax.Array, dimensions: jax.lax.DotDimensionNumbers) -> jax.Array:
    # One bfloat16 pass would leave float32 inputs with three digits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _cost(x: jax.Array, y: jax.Array, products: int) -> pl.CostEstimate:
    """Tells the scheduler how long a kernel runs, so that it lets transfers run beside it."""
    n, m, width = len(x), len(y), x.shape[1]
    return pl.CostEstimate(
        flops=2 * products * n * m * width,
        transcendentals=2 * n * m,
        bytes_accessed=(n + n * m // TILE_ROWS) * width * x.dtype.itemsize,
    )


def _tiled(
    x: jax.Array, y: jax.Array, x_ids: jax.Array, y_ids: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, int, int]:
    """Both sides padded to whole tiles and lanes, and the tile sizes."""
    width = x.shape[1] + -x.shape[1] % LANES
    tn, tm = (
        min(tile, len(side) + -len(side) % LANES)
        for tile, side in ((TILE_ROWS, x), (TILE_COLUMNS, y))
    )
    x, x_ids = padded(x, x_ids, tn, width)
    y, y_ids = padded(y, y_ids, tm, width)
    return x, y, x_ids, y_ids, tn, tm
