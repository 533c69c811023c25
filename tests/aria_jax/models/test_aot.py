"""What a TPU pod would run, compiled here: two layers of the medium model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from aria_jax.config import ComputeConfig, MeshConfig
from aria_jax.losses.cross_entropy import next_token_loss
from aria_jax.models import abstract_parameters
from aria_jax.models.heads import abstract_model, parameter_specs, split_model
from aria_jax.presets import MODELS
from aria_jax.sharding import batch_sharding, make_mesh
from tests.topologies import described

pytestmark = pytest.mark.aot


def topology_mesh(name, **axes):
    options = {"num_slices": axes.pop("slices")} if "slices" in axes else {}
    return make_mesh(MeshConfig(**axes), described(name, **options).devices)


def compiled_step(mesh, *, rows, length=8192, segments=False, n_layers=2, **compute):
    """Loss and gradients of `rows` sequences, compiled for the mesh."""
    config = dataclasses.replace(MODELS["medium"], n_layers=n_layers)
    compute = ComputeConfig(**{"dtype": "bfloat16", "remat": "full"} | compute)
    merge, _ = split_model(abstract_model(config, compute))
    params = abstract_parameters(parameter_specs(config), mesh)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))

    def step(params, inputs, targets, segment_ids):
        def loss(params):
            model = merge(params)
            hidden = model.hidden(inputs, segment_ids=segment_ids if segments else None)
            return next_token_loss(hidden, model.head[...], targets, targets >= 0)[0]

        return jax.value_and_grad(loss)(params)

    with jax.set_mesh(mesh):
        traced = jax.jit(step).trace(params, tokens, tokens, tokens)
        return traced.lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize(
    "name, axes, segments",
    [
        ("v5p:4x4x4", {"data": 1, "fsdp": 64}, False),
        ("v5p:4x4x4", {"data": 1, "fsdp": 64}, True),
        ("v5p:4x4x4", {"data": 1, "fsdp": 16, "tensor": 2, "sequence": 2}, True),
        ("v5e:8x8", {"data": 1, "fsdp": 64}, False),
    ],
)
def test_medium_compiles_without_all_scores(name, axes, segments):
    mesh = topology_mesh(name, **axes)
    rows = 2 * mesh.shape["fsdp"]
    compiled = compiled_step(mesh, rows=rows, segments=segments)
    memory = compiled.memory_analysis()
    # 24 heads × 8192² scores would take 6.4 GB a row; two layers, two rows and the chunked loss
    # must do with far less.
    assert memory.temp_size_in_bytes < 4e9
    if name.startswith("v5e"):  # the text of other families cannot be had
        assert "rotary_attention" in str(compiled.as_text())


def test_two_slices():
    mesh = topology_mesh("v5p:2x2x1", slices=2, data=2, fsdp=4)
    assert compiled_step(mesh, rows=8, length=1024).memory_analysis() is not None


def test_offloaded_inputs_leave_the_chip():
    mesh = topology_mesh("v5p:2x2x1", data=1, fsdp=4)
    memory = {
        remat: compiled_step(mesh, rows=8, length=2048, n_layers=8, remat=remat).memory_analysis()
        for remat in ("full", "offload")
    }
    assert memory["offload"].host_temp_size_in_bytes > 0
    assert memory["offload"].temp_size_in_bytes < memory["full"].temp_size_in_bytes
