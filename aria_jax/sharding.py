"""The mesh, and the one table from logical axes of arrays to axes of the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aria_jax.config import MeshConfig
from data_pipeline.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # Batches spread over every device that does not share a layer's matrices.
    "batch": ("data", "fsdp"),
    # Fully sharded data parallelism: weights and optimiser state cut along the model width,
    # gathered when a layer needs them.
    "embed": "fsdp",
    # Megatron's cut: heads and feed-forward columns, one reduction after attention and one after
    # the feed-forward.
    "heads": "tensor",
    "mlp": "tensor",
    # 17,727 divides by no mesh axis, and scanned layers must be whole on every device.
    "vocab": None,
    "layer": None,
    None: None,
}

# Logical axes of each parameter, by the name of its leaf.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "qkv": ("layer", "embed", None, "heads"),
    "out": ("layer", "heads", "embed"),
    "gate": ("layer", "embed", "mlp"),
    "up": ("layer", "embed", "mlp"),
    "down": ("layer", "mlp", "embed"),
    "head": ("embed", None),
    "adapter": (None, "embed"),
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default); the axis of -1 takes what is left.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and known > 0 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"{asked} do not multiply to the {len(devices)} devices there are")
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)


def named_sharding(mesh: Mesh, logical_axes: tuple[str | None, ...]) -> NamedSharding:
    """The sharding of an array whose axes have these logical names.

    Raises:
        ValueError: two of them would share a mesh axis.
    """
    spec = [LOGICAL_RULES[axis] for axis in logical_axes]
    used = [a for entry in spec if entry for a in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} put one mesh axis to use twice: {spec}")
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of anything whose first axis is the batch."""
    return named_sharding(mesh, ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return named_sharding(mesh, ())


def parameter_shardings(tree, mesh: Mesh):
    """A tree of shardings for parameters, or anything that mirrors them (optimiser state).

    Leaves are recognised by the last name of their path that is in `PARAMETER_AXES`; norms,
    counters and scalars are replicated.

    Raises:
        UserError: a size does not divide by its mesh axis.
    """

    def sharding(path, leaf) -> NamedSharding:
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        named = [name for name in names if name in PARAMETER_AXES]
        axes = PARAMETER_AXES[named[-1]] if named else ()
        if len(axes) > leaf.ndim:
            axes = ()
        found = named_sharding(mesh, axes)
        for size, axis in zip(leaf.shape, found.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{'.'.join(names)} of shape {leaf.shape} does not divide by "
                    f"mesh.{axis}={mesh.shape[axis]}; choose a divisor of {size}"
                )
        return found

    return jax.tree_util.tree_map_with_path(sharding, tree)
