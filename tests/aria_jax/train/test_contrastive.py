"""The contrastive task: batches in parts, and what its settings change."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.checkpoints.models import load_model
from aria_jax.config import MeshConfig, with_overrides
from aria_jax.sharding import batch_sharding, make_mesh
from aria_jax.train.loop import run
from aria_jax.train.objectives import (
    BatchLoss,
    join_microbatches,
    loss_function,
    split_microbatches,
)
from aria_jax.train.state import Network, abstract_state
from aria_jax.train.step import make_train_step, weighted_gradients
from aria_jax.train.tasks import batch_shapes
from data_pipeline.errors import UserError

TWINS = jnp.array([0, 0, 1, 1, 2, 2, 3, 3])


def compare(settings, z_Bx2xE, composition=TWINS, mesh=None):
    """The task's loss of given embeddings."""
    loss = loss_function(settings, mesh)
    assert isinstance(loss, BatchLoss)
    model = SimpleNamespace(log_temperature=None)
    batch = {"composition": composition, "eos": jnp.ones((len(z_Bx2xE), 2), int)}
    return loss.compare(model, z_Bx2xE, batch)[0]


def small_gradients(settings, mesh=None):
    """Metrics and gradients by the task's loss of a network of one matrix."""
    loss = loss_function(settings, mesh)
    embed = lambda model, rows, key: jnp.tanh(rows["x"] @ model.w)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jax.random.normal(keys[0], (12, 5)), "log_t": jnp.float32(0.3)}
    batch = {
        "x": jax.random.normal(keys[1], (8, 2, 12)),
        "composition": TWINS,
        "eos": jnp.ones((8, 2), int),
    }
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(mesh))
    gradients = weighted_gradients(
        settings.train.grad_accumulation,
        lambda p: SimpleNamespace(w=p["w"], log_temperature=p["log_t"]),
        dataclasses.replace(loss, embed=embed),
    )
    return jax.jit(gradients)(params, batch, None)


SETTINGS = {
    "defaults": (),
    "all": ("variant=nt-xent", "hardness=0.5", "learned_temperature=true", "pooling=mean"),
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_parts_give_the_gradient_of_one_pass(config, options, one_device):
    """Gradient caching: to rounding the loss, metrics and gradients of the whole batch."""
    whole = small_gradients(config("contrastive", *options))
    mesh = make_mesh(MeshConfig(2, 2, 2), one_device)
    for parts, devices in ((2, None), (8, None), (2, mesh)):
        found = small_gradients(
            config("contrastive", f"grad_accumulation={parts}", *options), devices
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    (_, gradient) = whole
    assert np.abs(gradient["w"]).max() > 0.1 and abs(gradient["log_t"]) > 0.1


@pytest.mark.slow
def test_a_run_in_parts_trains_and_evaluates_alike(config, corpus, tmp_path, recorder, weights):
    """The real network, with every setting that is not the default."""
    whole, parts = recorder(), recorder()
    common = config("contrastive", *SETTINGS["all"], "eval_every=2", "peak_lr=0.01")
    in_parts = with_overrides(common, ["grad_accumulation=4"])
    run(common, corpus, tmp_path / "whole", sinks=[whole])
    result = run(in_parts, corpus, tmp_path / "parts", sinks=[parts])
    for split in ("train", "val"):
        for step, loss in whole.losses(split).items():
            assert parts.losses(split)[step] == pytest.approx(loss, rel=1e-3)  # Adam on rounding
    assert load_model(tmp_path / "parts").pooling == "mean"
    learned = weights(tmp_path / "parts")["log_temperature"]
    assert abs(learned) > 1e-3
    assert result.metrics["val/temperature"] == pytest.approx(0.1 * np.exp(learned), rel=1e-5)


@pytest.mark.slow
def test_parts_hold_the_activations_of_one_part(config):
    """8,192 pairs by the compiler's count: a laptop's memory instead of a rack's."""

    def temporary_bytes(parts):
        settings = config("contrastive", "global_batch=8192", f"grad_accumulation={parts}")
        mesh = make_mesh(settings.mesh)
        network = Network.of(settings)
        state = abstract_state(settings, network, mesh)
        step = make_train_step(settings, network.build, loss_function(settings, mesh))
        with jax.set_mesh(mesh):
            number = jax.ShapeDtypeStruct((), np.int32)
            compiled = step.lower(state, batch_shapes(settings), number).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = temporary_bytes(1), temporary_bytes(512)
    assert parts < 2e8 and whole > 50 * parts


def test_rows_come_back_in_order():
    x = jnp.arange(24).reshape(12, 2)
    parts = split_microbatches({"x": x}, 4)["x"]
    assert parts.shape == (4, 3, 2) and parts[1, 2].tolist() == x[9].tolist()
    np.testing.assert_array_equal(join_microbatches(parts), x)


def test_negatives_may_be_local(config, one_device):
    """Where all embeddings are alike the loss is the log of the number of choices."""
    mesh = make_mesh(MeshConfig(4, 1, 1), one_device[:4])
    z = jax.device_put(jnp.ones((8, 2, 4)), batch_sharding(mesh))
    own = jnp.arange(8)
    for negatives, choices in (("global", 8), ("local", 2)):
        settings = config("contrastive", f"negatives={negatives}")
        assert compare(settings, z, own, mesh) == pytest.approx(np.log(choices), abs=1e-4)


def test_performances_of_one_composition_can_be_made_negatives(config):
    for mask, choices in (("true", 7), ("false", 8)):
        settings = config("contrastive", f"mask_composition={mask}")
        assert compare(settings, jnp.ones((8, 2, 4))) == pytest.approx(np.log(choices), abs=1e-4)


@pytest.mark.parametrize(
    "setting,message", [("hardness=-1", "hardness"), ("composer_group=0", "composer_group")]
)
def test_impossible_settings_are_named(config, setting, message):
    with pytest.raises(UserError, match=message):
        config("contrastive", setting).validate()
