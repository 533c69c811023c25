"""The mesh, and the one table from logical axes of arrays to axes of the mesh.

A program that runs on several devices sets its mesh around what it compiles:

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step(params, batch)

Code inside finds it by `active_mesh()`: activations are pinned by `constrain`, and kernels that
the compiler cannot partition by itself run under `shard_map`. Without a mesh none of it does
anything.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from aria_jax.config import MeshConfig, RunConfig, with_overrides
from data_pipeline.errors import UserError
from data_pipeline.loaders import Batch, BatchStream, RowRange

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

LOGICAL_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # Batches spread over every device that does not share a layer's matrices.
    "batch": ("data", "fsdp"),
    # Long contexts: each device holds a part of every sequence's activations; attention gathers
    # the keys and values of all parts.
    "length": "sequence",
    # Fully sharded data parallelism: weights and optimiser state sharded along the model width,
    # gathered when a layer needs them.
    "embed": "fsdp",
    # As Megatron shards: heads and feed-forward columns, one reduction after attention and one
    # after the feed-forward.
    "heads": "tensor",
    "mlp": "tensor",
    # Logits. 17,727 divides by no mesh axis, so parameters keep their vocabulary whole and the
    # loss pads it (losses/language_model.py).
    "vocab": "tensor",
    # Scanned layers must be whole on every device.
    "layer": None,
    None: None,
}


def make_mesh(config: MeshConfig, devices: Sequence | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default); the axis of -1 takes what is left.

    Neighbours on the mesh are neighbours on the interconnect. Where the devices are several TPU
    slices, the data axis goes across them: one sum of gradients a step is all that the slow
    network between slices carries.

    Raises:
        UserError: the axes do not multiply to the number of devices, or the data axis does not
            divide by the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices) or min(sizes.values()) < 1:
        given = {axis: n for axis, n in sizes.items() if n != getattr(MeshConfig(), axis)}
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in (given or sizes).items())
        raise UserError(
            f"{asked}: the axes do not multiply to the {len(devices)} devices there are; leave "
            "them out, or choose numbers whose product divides that"
        )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(_device_grid(tuple(sizes.values()), devices), MESH_AXES, axis_types=kinds)


def mesh_of(text: str) -> Mesh:
    """The mesh of an option --mesh, such as "data=2,tensor=4"; UserError where it is none."""
    assignments = [f"mesh.{part}" for part in text.split(",") if part]
    if not all("=" in part for part in assignments):
        raise UserError(f"--mesh {text}: expected AXIS=N,… such as data=2,tensor=4")
    try:
        return make_mesh(with_overrides(RunConfig(), assignments).mesh)
    except UserError as error:
        raise UserError(f"--mesh {text}: {error}") from None


def local_mesh() -> Mesh | None:
    """The devices of this process, batches spread over them; None where it has one."""
    devices = jax.local_devices()
    return make_mesh(MeshConfig(), devices) if len(devices) > 1 else None


def _device_grid(shape: tuple[int, ...], devices: list) -> np.ndarray:
    """`devices` as an array of `shape`, data axis first, by the interconnect's topology."""
    n_slices = 1
    if devices[0].platform == "tpu":
        n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *within = shape
    if data % n_slices:
        raise UserError(
            f"mesh.data={data} must divide by the {n_slices} slices: only the data axis may cross "
            "the network between them"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // n_slices, *within),
        (n_slices, *(1 for _ in within)),
        devices,
        allow_split_physical_axes=True,
    )


def named_sharding(
    mesh: Mesh | AbstractMesh, logical_axes: tuple[str | None, ...]
) -> NamedSharding:
    """The sharding of an array whose axes have these logical names.

    Raises:
        ValueError: an unknown name, a mesh with other axes, or two names for one mesh axis.
    """
    _check_mesh(mesh)
    if unknown := [axis for axis in logical_axes if axis not in LOGICAL_RULES]:
        raise ValueError(f"unknown logical axes {unknown}: LOGICAL_RULES lacks them")
    spec = [LOGICAL_RULES[axis] for axis in logical_axes]
    used = [axis for entry in spec for axis in _axes(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} put one mesh axis to use twice: {spec}")
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of anything whose first axis is the batch."""
    return named_sharding(mesh, ("batch",))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return named_sharding(mesh, ())


def put_rows(stream: BatchStream, step: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Batch `step` as global arrays, of which this process makes the rows its devices hold.

    The batch is the same on any mesh and any number of processes. Rows that several devices of
    this process hold are made once.

    Raises:
        UserError: the rows do not divide over the devices.
    """
    ranges = local_rows(sharding, stream.global_batch)
    return _global_arrays(stream.rows(step, *ranges), ranges, stream.global_batch, sharding)


def iterate_rows(
    stream: BatchStream, sharding: NamedSharding, start_step: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """`put_rows` of steps `start_step`, `start_step` + 1, … whose rows are read ahead."""
    ranges = local_rows(sharding, stream.global_batch)
    for rows in stream.iterate(start_step, *ranges):
        yield _global_arrays(rows, ranges, stream.global_batch, sharding)


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """A tree of whole arrays [B, …] that every process has, as global arrays."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def row_shards(sharding: NamedSharding) -> int:
    """In how many parts the first axis is sharded."""
    axes = _axes(sharding.spec[0]) if sharding.spec else ()
    return int(np.prod([sharding.mesh.shape[axis] for axis in axes]))


def local_rows(sharding: NamedSharding, n_rows: int) -> tuple[RowRange, ...]:
    """Which of `n_rows` rows the devices of this process hold: ascending, disjoint ranges.

    Raises:
        UserError: the rows do not divide over the devices.
    """
    if n_rows % (parts := row_shards(sharding)):
        axes = " × ".join(f"mesh.{axis}" for axis in _axes(sharding.spec[0]))
        raise UserError(
            f"a batch of {n_rows} rows does not divide over {parts} devices ({axes}); "
            f"choose a multiple of {parts}"
        )
    indices = sharding.addressable_devices_indices_map((n_rows,)).values()
    merged: list[RowRange] = []
    for start, stop in sorted({index[0].indices(n_rows)[:2] for index in indices if index}):
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _global_arrays(
    rows: Batch, ranges: Sequence[RowRange], n_rows: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Arrays of `n_rows` rows, of which `rows` are those in `ranges`, one range after the other."""
    starts = [start for start, _ in ranges]
    before = np.cumsum([0, *(stop - start for start, stop in ranges)])

    def array(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            rows, *others = index or (slice(None),)
            start, stop, _ = rows.indices(n_rows)
            which = bisect_right(starts, start) - 1
            at = int(before[which]) + start - starts[which]
            return local[(slice(at, at + stop - start), *others)]

        return jax.make_array_from_callback((n_rows, *local.shape[1:]), sharding, shard)

    return {name: array(local) for name, local in rows.items()}


def active_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` set, if it has several devices and may still be sharded over.

    Inside `shard_map`, which has done that, it is None.

    Raises:
        ValueError: a mesh with other axes, over which nothing would be sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    _check_mesh(mesh)
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError("the axes of the mesh are explicit, not automatic; use make_mesh")
    return mesh


def _check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Raises `ValueError` unless the mesh has the axes that `LOGICAL_RULES` speaks of."""
    if mesh.axis_names != MESH_AXES:
        raise ValueError(f"a mesh with the axes {mesh.axis_names}: {MESH_AXES} are expected, as "
                         "aria_jax.sharding.make_mesh makes it")  # fmt: skip


def usable_cpus() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def platform() -> str:
    """What the program being compiled runs on: "cpu", "gpu" or "tpu".

    Described devices of another machine count, so that ahead-of-time compilation is the same.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def divisible_spec(
    mesh: AbstractMesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """How an activation is sharded: by the table, but for axes whose size does not divide."""
    spec = named_sharding(mesh, logical_axes).spec
    parts = [int(np.prod([mesh.shape[axis] for axis in _axes(entry)])) for entry in spec]
    return PartitionSpec(
        *(
            entry if size % n == 0 else None
            for entry, size, n in zip(spec, shape, parts, strict=True)
        )
    )


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x`, sharded over the active mesh by the table; unchanged without one."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(mesh, logical_axes, x.shape))


def mirrored_shardings(tree: Any, params: Any, shardings: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of what an optimiser keeps: copies of the parameters (moments) and counters.

    Args:
        tree: of arrays or shapes.
        params: what it was made for; every sub-tree of the same structure and shapes is sharded
            likewise, scalars are replicated.
        shardings: of `params`.

    Raises:
        ValueError: another array, of which nothing says how it is sharded.
    """

    def form(part: Any) -> tuple:
        leaves, structure = jax.tree.flatten(part)
        return structure, [leaf.shape for leaf in leaves]

    def mirrors(part: Any) -> bool:
        return form(part) == form(params)

    def sharding(path: tuple, part: Any) -> Any:
        if mirrors(part):
            return shardings
        if part.ndim:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name} of shape {part.shape} is neither a copy of the parameters "
                             "nor a scalar: nothing says how it is sharded")  # fmt: skip
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=mirrors)
