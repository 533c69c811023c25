"""The decoder and its heads; here, what their parameters are: each is declared where it is created.

A module makes its parameters with `parameter`; everything that has to know all of them (sharding,
counting, safetensors, adapters, the decoder, ahead-of-time compilation) is a loop over the specs
that `models.heads.parameter_specs` collects.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aria_jax.sharding import LOGICAL_RULES, named_sharding
from data_pipeline.errors import UserError

Parameters = dict[str, Any]
"""Nested dict of arrays: what is optimised, saved and sharded."""
Specs = Mapping[str, Any]
"""Nested dict like `Parameters`, or a part of it, with a `ParameterSpec` for each array."""


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is besides its value, which is float32.

    Attributes:
        shape: of the array.
        axes: logical name of each axis, see `sharding.LOGICAL_RULES`; None is whole everywhere.
            A parameter with one slice per layer starts with "layer".
        published: name of its tensor in the published checkpoints, with {} for the layer's number;
            None where they have no such tensor.
        linear: the matrix of a linear layer: inputs [I], then outputs (one axis or several), behind
            the layer axis; published as [outputs, I].
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    published: str | None = None
    linear: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the first axis numbers the layers."""
        return self.axes[:1] == ("layer",)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape within one layer."""
        return self.shape[self.stacked :]


def parameter(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    published: str | None = None,
    linear: bool = False,
) -> nnx.Param:
    """A parameter that says what it is; arguments as the attributes of `ParameterSpec`.

    Raises:
        ValueError: an axis without a name, or a name that the table of logical axes lacks.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} needs {value.ndim} axes, not {axes}")
    if unknown := [axis for axis in axes if axis not in LOGICAL_RULES]:
        raise ValueError(f"unknown logical axes {unknown}: sharding.LOGICAL_RULES lacks them")
    # Of a type that arithmetic does not change, or whatever takes it would be compiled twice.
    value = value.astype(value.dtype)
    return nnx.Param(value, spec=ParameterSpec(value.shape, axes, published, linear))


def uniform_init(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """PyTorch's default for linear layers, as the reference has it: U(-1/√fan_in, 1/√fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def specs_of(module: nnx.Module) -> Specs:
    """The spec of every parameter of a module.

    Raises:
        ValueError: one was not made with `parameter`, so that nothing says how it is sharded.
    """

    def spec(path: tuple, variable: nnx.Variable) -> ParameterSpec:
        found = variable.get_metadata().get("spec")
        if not isinstance(found, ParameterSpec):
            name = ".".join(map(str, path))
            raise ValueError(f"{name} declares no logical axes: make it with parameters.parameter")
        return found

    specs: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        *parents, last = map(str, path)
        place = specs
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = spec(path, variable)
    return specs


def named_specs(specs: Specs) -> dict[str, ParameterSpec]:
    """Every spec by its dotted path, sorted."""
    leaves = jax.tree_util.tree_leaves_with_path(specs)
    return {".".join(part.key for part in path): spec for path, spec in leaves}


def parameter_count(specs: Specs) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))


def parameter_shardings(
    specs: Specs, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> dict[str, Any]:
    """How each parameter is sharded over a mesh, by the table of logical axes.

    Raises:
        UserError: a size does not divide by its mesh axis.
        ValueError: an unknown logical axis, or a mesh with other axes.
    """

    def sharding(path: tuple, spec: ParameterSpec) -> jax.sharding.NamedSharding:
        found = named_sharding(mesh, spec.axes)
        for size, axis in zip(spec.shape, found.spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{'.'.join(part.key for part in path)} of shape {spec.shape} does not divide "
                    f"by mesh.{axis}={mesh.shape[axis]}; choose a divisor of {size}"
                )
        return found

    return jax.tree_util.tree_map_with_path(sharding, specs)


def abstract_parameters(
    specs: Specs,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Parameters:
    """Shapes, types and shardings of parameters; without a mesh on one device.

    Args:
        dtype: of the arrays; None is float32.
    """
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, specs)
    else:
        shardings = parameter_shardings(specs, mesh)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(
            spec.shape, jnp.float32 if dtype is None else dtype, sharding=sharding
        ),
        specs,
        shardings,
    )
