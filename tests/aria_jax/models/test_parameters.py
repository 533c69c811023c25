"""Each parameter says what it is, or there is an error; what is derived of that fits the arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.safetensors import tensor_shapes
from aria_jax.config import ComputeConfig, MeshConfig, ModelConfig
from aria_jax.generate.weights import abstract_decoder_weights, decoder_weights
from aria_jax.models import (
    ParameterSpec,
    abstract_parameters,
    named_specs,
    parameter,
    parameter_count,
    parameter_shardings,
    specs_of,
)
from aria_jax.models.heads import abstract_model, build_model, parameter_specs, split_model
from aria_jax.models.lora import DEFAULT_TARGETS
from aria_jax.sharding import make_mesh

CONFIG = ModelConfig(d_model=16, n_heads=2, n_layers=3, vocab_size=50)
CONFIGS = [
    CONFIG,
    dataclasses.replace(CONFIG, emb_size=6),
    dataclasses.replace(CONFIG, head="embedding", emb_size=6, learned_temperature=True),
    dataclasses.replace(CONFIG, head="class", class_names=("a", "b", "c")),
    dataclasses.replace(CONFIG, head="none"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.head}-{c.emb_size}")
def test_specs_describe_the_arrays(config):
    params = split_model(build_model(config, ComputeConfig(), rngs=nnx.Rngs(0)))[1]
    specs = parameter_specs(config)
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    assert parameter_count(specs) == sum(leaf.size for leaf in jax.tree.leaves(params))
    for array, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs), strict=True):
        assert (array.shape, array.dtype) == (spec.shape, jnp.float32)
        assert len(spec.axes) == array.ndim
    published = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
    assert published == parameter_count(specs) - config.learned_temperature


def test_the_default_adapters_are_those_of_every_matrix_of_a_block():
    blocks = parameter_specs(CONFIG)["backbone"]["blocks"]
    assert set(DEFAULT_TARGETS) == {name for name, spec in blocks.items() if spec.linear}


@pytest.mark.parametrize("axes", [(), ("embed",), ("embed", "heads", "mlp")])
def test_a_parameter_without_a_name_for_each_axis_is_an_error(axes):
    with pytest.raises(ValueError, match="needs 2 axes"):
        parameter(jnp.zeros((4, 2)), axes)


def test_a_parameter_with_an_unknown_axis_is_an_error():
    with pytest.raises(ValueError, match=r"unknown logical axes \['width'\]"):
        parameter(jnp.zeros((4, 2)), ("embed", "width"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    with pytest.raises(ValueError, match="unknown logical axes"):
        parameter_shardings({"w": ParameterSpec((8, 8), ("embed", "width"))}, mesh)


def test_a_parameter_that_declares_nothing_is_an_error():
    class Layer(nnx.Module):
        def __init__(self):
            self.declared = parameter(jnp.zeros(2), ("embed",))
            self.scale = nnx.Param(jnp.ones(2))

    with pytest.raises(ValueError, match="scale declares no logical axes"):
        specs_of(Layer())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
def test_the_decoders_shapes_are_those_of_its_arrays(sizes):
    config, mesh = CONFIGS[1], make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    shardings = parameter_shardings(parameter_specs(config), mesh)
    merge, params = split_model(build_model(config, ComputeConfig(), rngs=nnx.Rngs(0)))
    real = decoder_weights(merge(jax.device_put(params, shardings)))
    shapes = abstract_decoder_weights(config, mesh, "float32")
    for array, shape in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert mesh.size == 1 or array.sharding.is_equivalent_to(shape.sharding, array.ndim)


def test_shapes_without_a_mesh_lie_on_one_device():
    specs = parameter_specs(CONFIG)
    shapes = abstract_parameters(specs, None, jnp.bfloat16)
    names = named_specs(specs)
    assert len(names) == len(jax.tree.leaves(shapes)) and "backbone.blocks.qkv" in names
    for shape in jax.tree.leaves(shapes):
        assert shape.dtype == jnp.bfloat16 and len(shape.sharding.device_set) == 1


def test_models_of_shapes_hold_no_arrays():
    leaves = jax.tree.leaves(split_model(abstract_model(CONFIG, ComputeConfig()))[1])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
