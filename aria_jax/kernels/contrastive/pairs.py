"""The differentiable operation: which implementation computes it, and on which devices.

On a mesh it is a ring: each device keeps its rows and passes its columns on to its neighbour, with
what has been summed up for them, until they are home again. The next columns are under way while
the present ones are computed, and no device ever holds more than two blocks of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from aria_jax.kernels.contrastive import (
    NEG_INF,
    Statistics,
    blockwise,
    merge_lse,
    pallas_gpu,
    pallas_tpu,
)

Implementation = Literal["auto", "blockwise", "tpu", "gpu", "tpu-interpret", "gpu-interpret"]


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


def _forward(x, y, x_ids, y_ids, scale, placement: PairSharding):
    forward = _chosen("forward", placement.implementation)
    if placement.mesh is None:
        found = forward(x, y, x_ids, y_ids, scale)
    else:
        body = partial(_ring_forward, forward, _ring_axes(placement))
        found = _on_mesh(body, placement, (x, y, x_ids, y_ids), scale)
    return found, (x, y, x_ids, y_ids, scale, found.row_lse, found.column_lse)


def _backward(placement: PairSharding, kept, cotangents: Statistics):
    x, y, x_ids, y_ids, scale, row_lse, column_lse = kept
    sides = x, y, x_ids, y_ids, row_lse, column_lse, cotangents.row_lse, cotangents.column_lse
    backward = _chosen("backward", placement.implementation)
    if placement.mesh is None:
        sums = backward(*sides[:4], scale, *sides[4:])
    else:
        sums = _on_mesh(
            partial(_ring_backward, backward, _ring_axes(placement)), placement, sides, scale
        )
    d_scale = jnp.sum(x.astype(jnp.float32) * sums[0])
    dx, dy = ((scale * s).astype(side.dtype) for s, side in zip(sums, (x, y), strict=True))
    return dx, dy, None, None, d_scale


pair_statistics.defvjp(_forward, _backward)


def _chosen(direction: Literal["forward", "backward"], name: Implementation) -> Callable:
    tables = {"blockwise": blockwise, "tpu": pallas_tpu, "gpu": pallas_gpu}
    if name != "auto":
        kind, _, interpret = name.partition("-")
        function = getattr(tables[kind], direction)
        return partial(function, interpret=True) if interpret else function

    def by_platform(*arguments):
        return jax.lax.platform_dependent(
            *arguments,
            tpu=getattr(pallas_tpu, direction),
            cuda=getattr(pallas_gpu, direction),
            default=getattr(blockwise, direction),
        )

    return by_platform


def _ring_axes(placement: PairSharding) -> tuple[str, ...]:
    return placement.axes if placement.ring else ()


def _on_mesh(
    body: Callable, placement: PairSharding, sides: tuple[jax.Array, ...], scale: jax.Array
):
    sharded, whole = PartitionSpec(placement.axes), PartitionSpec()
    return jax.shard_map(
        body,
        mesh=placement.mesh,
        in_specs=(sharded,) * len(sides) + (whole,),
        out_specs=sharded,
        check_vma=False,
    )(*sides, scale)


def _ring_shift(tree, axes: tuple[str, ...]):
    """Arrays of this device to the next one round the ring."""
    size = jax.lax.axis_size(axes)
    around = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axes, around), tree)


def _ring_forward(forward: Callable, axes, x, y, x_ids, y_ids, scale) -> Statistics:
    if not axes:
        return forward(x, y, x_ids, y_ids, scale)
    no_rows = jnp.full(len(x), NEG_INF), jnp.full(len(x), NEG_INF)

    def step(carry, _):
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
    backward: Callable, axes, x, y, x_ids, y_ids, row_lse, column_lse, row_ct, column_ct, scale
) -> tuple[jax.Array, jax.Array]:
    if not axes:
        return backward(x, y, x_ids, y_ids, scale, row_lse, column_lse, row_ct, column_ct)

    def step(carry, _):
        columns, dy, dx = carry
        incoming, received = _ring_shift((columns, dy), axes)
        y, y_ids, column_lse, column_ct = columns
        more_x, more_y = backward(x, y, x_ids, y_ids, scale, row_lse, column_lse, row_ct, column_ct)
        return (incoming, received + more_y, dx + more_x), None

    zeros = jnp.zeros(y.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
    start = (y, y_ids, column_lse, column_ct), *zeros
    (_, dy, dx), _ = jax.lax.scan(step, start, length=jax.lax.axis_size(axes))
    return dx, _ring_shift(dy, axes)
