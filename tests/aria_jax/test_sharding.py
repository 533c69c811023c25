"""Every layout of the mesh computes what one device computes."""

import jax
import numpy as np
import pytest
from flax import nnx

from aria_jax.config import ComputeConfig, MeshConfig, ModelConfig
from aria_jax.losses.language_model import next_token_loss
from aria_jax.models.heads import init_sharded
from aria_jax.sharding import batch_sharding, make_mesh, named_sharding
from data_pipeline.errors import UserError

CONFIG = ModelConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=61)


def loss_and_grads(mesh):
    model = init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), mesh)
    tokens = np.random.default_rng(0).integers(0, 61, (8, 33))
    graph, params = nnx.split(model)
    inputs, targets = (
        jax.device_put(t, batch_sharding(mesh)) for t in (tokens[:, :-1], tokens[:, 1:])
    )

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graph, params)
            hidden = model.hidden(inputs)
            return next_token_loss(hidden, model.head[...], targets, targets >= 0)[0]

        return jax.value_and_grad(loss)(params)

    value, grads = run(params)
    return float(value), jax.tree.leaves(jax.tree.map(np.asarray, grads))


@pytest.fixture(scope="module")
def single():
    return loss_and_grads(make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    "n, axes", [(2, (2, 1, 1)), (4, (1, 2, 2)), (8, (-1, 2, 2)), (8, (1, 8, 1)), (4, (1, 1, 4))]
)
def test_layouts_agree(single, n, axes):
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[:n])
    value, grads = loss_and_grads(mesh)
    assert value == pytest.approx(single[0], rel=1e-5)  # reductions in another order
    for ours, theirs in zip(grads, single[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_parameters_are_cut_by_the_table():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    model = init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), mesh)
    qkv = model.backbone.blocks.qkv[...]
    assert qkv.sharding.shard_shape(qkv.shape) == (2, 32 // 4, 3, 32 // 2)


def test_user_mistakes_are_explained():
    with pytest.raises(UserError, match="do not multiply to the 8 devices"):
        make_mesh(MeshConfig(3, 1, 1), jax.devices()[:8])
    with pytest.raises(UserError, match="choose a divisor of 32"):
        mesh = make_mesh(MeshConfig(1, 3, 1), jax.devices()[:3])
        init_sharded(CONFIG, ComputeConfig(), jax.random.key(0), mesh)


def test_two_logical_axes_never_share_a_mesh_axis():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match="twice"):
        named_sharding(mesh, ("batch", "embed"))
