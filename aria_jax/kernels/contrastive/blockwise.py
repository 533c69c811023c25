"""Pairwise statistics as a scan over blocks of rows, for CPU and any backend without a kernel."""

import jax
import jax.numpy as jnp

from aria_jax.kernels.contrastive import (
    NEG_INF,
    PADDING_ID,
    Statistics,
    log_of_sum,
    padded,
)

TILE = 2**23
"""Logits held at a time: 32 MiB in float32."""


def forward(
    x_NxE: jax.Array,
    y_MxE: jax.Array,
    x_ids_N: jax.Array,
    y_ids_M: jax.Array,
    scale: jax.Array,
    tile: int = TILE,
) -> Statistics:
    """See the package; every block of rows is compared with all columns at once."""
    blocks = _blocks(x_NxE, x_ids_N, len(y_MxE), tile)

    def step(columns, block):
        maximum_M, total_M = columns
        x, ids = block
        logits, counts = _masked_logits(x, y_MxE, ids, y_ids_M, scale)
        row_max = logits.max(1)
        row_total = jnp.where(counts, jnp.exp(logits - row_max[:, None]), 0).sum(1)
        new_max = jnp.maximum(maximum_M, logits.max(0))
        here = jnp.where(counts, jnp.exp(logits - new_max), 0).sum(0)
        total_M = total_M * jnp.exp(maximum_M - new_max) + here
        return (new_max, total_M), (row_max, row_total)

    empty = jnp.full(len(y_MxE), NEG_INF), jnp.zeros(len(y_MxE))
    (column_max, column_total), rows = jax.lax.scan(step, empty, blocks)
    row_max, row_total = (r.reshape(-1)[: len(x_NxE)] for r in rows)
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
    tile: int = TILE,
) -> tuple[jax.Array, jax.Array]:
    """See the package."""
    x_blocks, id_blocks = _blocks(x_NxE, x_ids_N, len(y_MxE), tile)
    extra = id_blocks.size - len(x_NxE)
    row_blocks = [
        jnp.pad(r, (0, extra)).reshape(id_blocks.shape) for r in (row_lse_N, row_cotangent_N)
    ]

    def step(dy_MxE, block):
        x, ids, lse, cotangent = block
        logits, counts = _masked_logits(x, y_MxE, ids, y_ids_M, scale)
        weights = cotangent[:, None] * jnp.exp(logits - lse[:, None])
        weights += column_cotangent_M * jnp.exp(logits - column_lse_M)
        weights = jnp.where(counts, weights, 0).astype(x.dtype)
        dx = jnp.matmul(weights, y_MxE, preferred_element_type=jnp.float32)
        dy = jnp.matmul(weights.T, x, preferred_element_type=jnp.float32)
        return dy_MxE + dy, dx

    start = jnp.zeros(y_MxE.shape, jnp.float32)
    dy_MxE, dx = jax.lax.scan(step, start, (x_blocks, id_blocks, *row_blocks))
    return dx.reshape(-1, x_NxE.shape[1])[: len(x_NxE)], dy_MxE


def _blocks(x_NxE: jax.Array, ids_N: jax.Array, m: int, tile: int):
    """x as [blocks, rows, E] and its ids as [blocks, rows]."""
    rows = min(len(x_NxE), max(tile // m, 1))
    x, ids = padded(x_NxE, ids_N, rows, x_NxE.shape[1])
    return x.reshape(-1, rows, x.shape[1]), ids.reshape(-1, rows)


def _masked_logits(x, y, x_ids, y_ids, scale):
    """Logits of a tile, `NEG_INF` for the pairs that do not count; and which do."""
    logits = scale * jnp.matmul(x, y.T, preferred_element_type=jnp.float32)
    counts = (x_ids[:, None] != y_ids) & (x_ids != PADDING_ID)[:, None] & (y_ids != PADDING_ID)
    return jnp.where(counts, logits, NEG_INF), counts
