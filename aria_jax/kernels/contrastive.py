"""Log-sum-exp of all pairwise similarities and its gradient, without the matrix of pairs.

The one operation every contrastive loss here is made of. Rows x and columns y are unit vectors;
logit (i, j) is `scale * x_i · y_j`, and pairs with equal ids are left out (an anchor with itself,
with its positive, with another performance of the same composition).

    forward(x, y, x_ids, y_ids, scale)                         -> Statistics of rows and columns
    backward(x, y, x_ids, y_ids, scale, row_lse, column_lse,
             row_cotangent, column_cotangent)                  -> (W y, Wᵀ x), float32

where W is the gradient with respect to the logits; times `scale` that gives the gradients of x
and y. `contrastive_tpu` and `gpu` implement the two as kernels, `blockwise_forward` and
`blockwise_backward` as a scan; `pair_statistics` chooses between them and is differentiable.

On a mesh it is a ring: each device keeps its rows and passes its columns on to its neighbour, with
what has been summed up for them, until they are home again. The next columns are under way while
the ones at hand are computed, and no device ever holds more than two blocks of them.

Sizes: N rows, M columns, E embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Implementation = Literal["auto", "blockwise", "tpu", "gpu", "tpu-interpret", "gpu-interpret"]

NEG_INF = -1e30
"""Log of an empty sum. Finite, so that differences of two empty sums are not NaN."""

PADDING_ID = -(2**31)
"""Id of a row that is not there: it pairs with nothing."""

LOGITS_AT_ONCE = 2**23
"""Logits that `blockwise_forward` and `blockwise_backward` hold at a time: 32 MiB in float32."""


class Statistics(NamedTuple):
    """Of the logits that count, float32.

    Attributes:
        row_lse, row_max: log-sum-exp and maximum of each row, [N].
        column_lse, column_max: of each column, [M].
    """

    row_lse: jax.Array
    row_max: jax.Array
    column_lse: jax.Array
    column_max: jax.Array


def log_of_sum(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """Log-sum-exp from the maximum and the sum of `exp(logit - maximum)`; `NEG_INF` if empty."""
    return jnp.where(total > 0, maximum + jnp.log(jnp.maximum(total, 1e-37)), NEG_INF)


Pair = tuple[jax.Array, jax.Array]
"""Log-sum-exp and maximum."""


def merge_lse(one: Pair, other: Pair) -> Pair:
    """Of the union of two disjoint sets of logits."""
    return jnp.logaddexp(one[0], other[0]), jnp.maximum(one[1], other[1])


def padded(
    x_NxE: jax.Array, ids_N: jax.Array, rows: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """`x` and `ids` with rows of padding to a multiple of `rows`, columns to `width`."""
    extra = -len(x_NxE) % rows
    x = jnp.pad(x_NxE, ((0, extra), (0, width - x_NxE.shape[1])))
    return x, jnp.pad(ids_N, (0, extra), constant_values=PADDING_ID)


@dataclass(frozen=True)
class PairSharding:
    """Where and how pairs are computed.

    Attributes:
        implementation: "auto" takes the kernel of the platform that the program is compiled for;
            the "-interpret" ones run a kernel anywhere, slowly.
        mesh: None computes on whatever device the arrays are.
        axes: axes of the mesh over which rows and columns are sharded.
        ring: whether rows meet the columns of all devices; False: only those of their own.
    """

    implementation: Implementation = "auto"
    mesh: Mesh | None = None
    axes: tuple[str, ...] = ()
    ring: bool = True


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def pair_statistics(
    x_NxE: jax.Array,
    y_MxE: jax.Array,
    x_ids_N: jax.Array,
    y_ids_M: jax.Array,
    scale: jax.Array,
    placement: PairSharding,
) -> Statistics:
    """Statistics of the logits `scale * x_i · y_j` of all pairs whose ids differ.

    Differentiable in x, y and scale through both log-sum-exps; the maxima have no gradient.
    Memory: O((N + M) E), sharded over the devices of the mesh.

    Args:
        x_NxE, y_MxE: unit vectors, float32 or bfloat16 (products are summed in float32).
        x_ids_N, y_ids_M: int32.
        scale: float32 scalar, one over the temperature.
    """
    return _forward(x_NxE, y_MxE, x_ids_N, y_ids_M, scale, placement)[0]


def _forward(
    x: jax.Array,
    y: jax.Array,
    x_ids: jax.Array,
    y_ids: jax.Array,
    scale: jax.Array,
    placement: PairSharding,
) -> tuple[Statistics, tuple[jax.Array, ...]]:
    forward = _chosen("forward", placement.implementation)
    if placement.mesh is None:
        found = forward(x, y, x_ids, y_ids, scale)
    else:
        body = partial(_ring_forward, forward, _ring_axes(placement))
        found = _on_mesh(body, placement, (x, y, x_ids, y_ids), scale)
    return found, (x, y, x_ids, y_ids, scale, found.row_lse, found.column_lse)


def _backward(
    placement: PairSharding, kept: tuple[jax.Array, ...], cotangents: Statistics
) -> tuple[jax.Array, jax.Array, None, None, jax.Array]:
    x, y, x_ids, y_ids, scale, row_lse, column_lse = kept
    per_view = x, y, x_ids, y_ids, row_lse, column_lse, cotangents.row_lse, cotangents.column_lse
    backward = _chosen("backward", placement.implementation)
    if placement.mesh is None:
        sums = backward(*per_view[:4], scale, *per_view[4:])
    else:
        sums = _on_mesh(
            partial(_ring_backward, backward, _ring_axes(placement)), placement, per_view, scale
        )
    d_scale = jnp.sum(x.astype(jnp.float32) * sums[0])
    dx, dy = ((scale * s).astype(side.dtype) for s, side in zip(sums, (x, y), strict=True))
    return dx, dy, None, None, d_scale


pair_statistics.defvjp(_forward, _backward)


def _chosen(direction: Literal["forward", "backward"], name: Implementation) -> Callable:
    from aria_jax.kernels import contrastive_tpu, gpu  # Pallas takes a second to import

    functions = {
        "blockwise": blockwise_forward if direction == "forward" else blockwise_backward,
        "tpu": getattr(contrastive_tpu, direction),
        "gpu": getattr(gpu, direction),
    }
    if name != "auto":
        kind, _, interpret = name.partition("-")
        return partial(functions[kind], interpret=True) if interpret else functions[kind]

    def by_platform(*arguments: jax.Array) -> Any:
        return jax.lax.platform_dependent(
            *arguments,
            tpu=functions["tpu"],
            cuda=functions["gpu"],
            default=functions["blockwise"],
        )

    return by_platform


def _ring_axes(placement: PairSharding) -> tuple[str, ...]:
    return placement.axes if placement.ring else ()


def _on_mesh(
    body: Callable, placement: PairSharding, per_view: tuple[jax.Array, ...], scale: jax.Array
) -> Any:
    sharded, whole = PartitionSpec(placement.axes), PartitionSpec()
    return jax.shard_map(
        body,
        mesh=placement.mesh,
        in_specs=(sharded,) * len(per_view) + (whole,),
        out_specs=sharded,
        check_vma=False,
    )(*per_view, scale)


def _ring_shift(tree: Any, axes: tuple[str, ...]) -> Any:
    """Arrays of this device to the next one round the ring."""
    size = jax.lax.axis_size(axes)
    around = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axes, around), tree)


def _ring_forward(
    forward: Callable,
    axes: tuple[str, ...],
    x: jax.Array,
    y: jax.Array,
    x_ids: jax.Array,
    y_ids: jax.Array,
    scale: jax.Array,
) -> Statistics:
    if not axes:
        return forward(x, y, x_ids, y_ids, scale)
    no_rows = jnp.full(len(x), NEG_INF), jnp.full(len(x), NEG_INF)

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        columns, column_stats, row_stats = carry
        # Both transfers start here, so that they run while this block is computed.
        incoming, received = _ring_shift((columns, column_stats), axes)
        found = forward(x, columns[0], x_ids, columns[1], scale)
        row_stats = merge_lse(row_stats, (found.row_lse, found.row_max))
        column_stats = merge_lse(received, (found.column_lse, found.column_max))
        return (incoming, column_stats, row_stats), None

    empty = jnp.full(len(y), NEG_INF), jnp.full(len(y), NEG_INF)
    start = (y, y_ids), empty, no_rows
    (_, column_stats, row_stats), _ = jax.lax.scan(step, start, length=jax.lax.axis_size(axes))
    return Statistics(*row_stats, *_ring_shift(column_stats, axes))


def _ring_backward(
    backward: Callable,
    axes: tuple[str, ...],
    x: jax.Array,
    y: jax.Array,
    x_ids: jax.Array,
    y_ids: jax.Array,
    row_lse: jax.Array,
    column_lse: jax.Array,
    row_ct: jax.Array,
    column_ct: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    if not axes:
        return backward(x, y, x_ids, y_ids, scale, row_lse, column_lse, row_ct, column_ct)

    def step(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        columns, dy, dx = carry
        incoming, received = _ring_shift((columns, dy), axes)
        y, y_ids, column_lse, column_ct = columns
        more_x, more_y = backward(x, y, x_ids, y_ids, scale, row_lse, column_lse, row_ct, column_ct)
        return (incoming, received + more_y, dx + more_x), None

    zeros = jnp.zeros(y.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
    start = (y, y_ids, column_lse, column_ct), *zeros
    (_, dy, dx), _ = jax.lax.scan(step, start, length=jax.lax.axis_size(axes))
    return dx, _ring_shift(dy, axes)


def blockwise_forward(
    x_NxE: jax.Array,
    y_MxE: jax.Array,
    x_ids_N: jax.Array,
    y_ids_M: jax.Array,
    scale: jax.Array,
) -> Statistics:
    """A scan over blocks of rows, each compared with all columns at once; for any backend."""
    blocks = _blocks(x_NxE, x_ids_N, len(y_MxE))

    def step(columns: Pair, block: Pair) -> tuple[Pair, Pair]:
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


def blockwise_backward(
    x_NxE: jax.Array,
    y_MxE: jax.Array,
    x_ids_N: jax.Array,
    y_ids_M: jax.Array,
    scale: jax.Array,
    row_lse_N: jax.Array,
    column_lse_M: jax.Array,
    row_cotangent_N: jax.Array,
    column_cotangent_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `blockwise_forward` and the module."""
    x_blocks, id_blocks = _blocks(x_NxE, x_ids_N, len(y_MxE))
    extra = id_blocks.size - len(x_NxE)
    row_blocks = [
        jnp.pad(r, (0, extra)).reshape(id_blocks.shape) for r in (row_lse_N, row_cotangent_N)
    ]

    def step(dy_MxE: jax.Array, block: tuple[jax.Array, ...]) -> Pair:
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


def _blocks(x_NxE: jax.Array, ids_N: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """x as [blocks, rows, E] and its ids as [blocks, rows]."""
    rows = min(len(x_NxE), max(LOGITS_AT_ONCE // m, 1))
    x, ids = padded(x_NxE, ids_N, rows, x_NxE.shape[1])
    return x.reshape(-1, rows, x.shape[1]), ids.reshape(-1, rows)


def _masked_logits(
    x: jax.Array, y: jax.Array, x_ids: jax.Array, y_ids: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of a tile, `NEG_INF` for the pairs that do not count; and which do."""
    logits = scale * jnp.matmul(x, y.T, preferred_element_type=jnp.float32)
    counts = (x_ids[:, None] != y_ids) & (x_ids != PADDING_ID)[:, None] & (y_ids != PADDING_ID)
    return jnp.where(counts, logits, NEG_INF), counts
