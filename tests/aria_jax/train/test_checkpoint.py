"""Checkpoints: other meshes and types, damage, retention, and what the record says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.checkpoints.models import load_model, save_model
from aria_jax.config import MeshConfig, ModelConfig
from aria_jax.embed.encode import slicing_of
from aria_jax.models.heads import split_model
from aria_jax.sharding import make_mesh
from aria_jax.train.loop import run
from data_pipeline.errors import UserError


@pytest.fixture(scope="module")
def trained(config, corpus, tmp_path_factory):
    """A finished run of 4 steps with checkpoints at 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained")
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aria_jax.sharding.jax.devices", lambda: device)
        run(config("pretrain", "checkpoint_every=2"), corpus, workdir)
    return workdir


def damage(workdir, step):
    for path in (workdir / "checkpoints" / str(step) / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def copy(source, target):
    """Copies a run's checkpoints."""
    import shutil

    shutil.copytree(source, target)
    return target


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(config, corpus, trained, tmp_path, recorder, eight_devices):
    workdir, moved, still = copy(trained, tmp_path / "run"), recorder(), recorder()
    run(config("pretrain", "steps=6", mesh=MeshConfig(1, 4, 2)), corpus, workdir, sinks=[moved])
    same = copy(trained, tmp_path / "same")
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr("aria_jax.sharding.jax.devices", lambda: one)
        run(config("pretrain", "steps=6"), corpus, same, sinks=[still])
    assert moved.losses().keys() == {5, 6}
    for step, loss in still.losses().items():
        assert moved.losses()[step] == pytest.approx(loss, rel=1e-4)  # order of reductions


def test_a_model_loads_onto_a_mesh_and_in_another_type(trained, weights, eight_devices):
    mesh = make_mesh(MeshConfig(1, 4, 2))
    sharded = split_model(load_model(trained, mesh=mesh, dtype=jnp.bfloat16).model)[1]
    qkv = sharded["backbone"]["blocks"]["qkv"]
    assert qkv.dtype == jnp.bfloat16 and len(qkv.sharding.device_set) == 8
    expected = weights(trained)["backbone"]["blocks"]["qkv"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(qkv), expected)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(config, corpus, trained, tmp_path):
    workdir = copy(trained, tmp_path / "run")
    damage(workdir, 4)
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        assert load_model(workdir).step == 2
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        result = run(config("pretrain", "checkpoint_every=2"), corpus, workdir)
    assert result.init.kind == "resume" and result.final_step == 4
    # Done again, bit for bit, beside the damage, which is kept.
    actual, desired = (split_model(load_model(d).model)[1] for d in (workdir, trained))
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def test_where_all_are_damaged_the_run_says_so(config, corpus, trained, tmp_path):
    workdir = copy(trained, tmp_path / "run")
    damage(workdir, 2)
    damage(workdir, 4)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no checkpoint here can be"):
        run(config("pretrain", "checkpoint_every=2"), corpus, workdir)


def test_an_unfinished_write_is_no_checkpoint(trained, tmp_path):
    workdir = copy(trained, tmp_path / "run")
    unfinished = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "params").write_text("half")
    assert load_model(workdir).step == 4


def test_retention_keeps_the_newest(config, corpus, tmp_path):
    run(config("pretrain", "checkpoint_every=1", "keep_checkpoints=2"), corpus, tmp_path)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [3, 4]
    checkpointer.close()


def test_the_record_says_where_to_go_on(trained):
    checkpointer = Checkpointer(trained)
    record = checkpointer.record(4)
    checkpointer.close()
    assert record["position"]["step"] == 4 and record["position"]["seed"] == 0
    assert record["tokenizer"]["preset"] == "aria" and len(record["tokenizer"]["hash"]) == 64
    assert record["config"]["data"]["seq_len"] == 64


def test_saved_models_load_and_are_told_apart(trained, tmp_path):
    loaded = load_model(trained)
    assert loaded.reading == "aria-utils", "as of every corpus whose manifest does not say it"
    assert loaded.slices == (16, 64), "shorter than the paper's: embedded as it was trained"
    save_model(tmp_path / "copy", loaded.model, step=loaded.step)
    again = load_model(tmp_path / "copy")
    assert (again.config, again.step, again.tokenizer) == (loaded.config, 4, "aria")
    assert again.reading == "standard" and again.slices == (300, 2048)
    found = [slicing_of(model, *given) for model in (loaded, again) for given in ((), (5, 300))]
    sizes = [(slicing.slice_notes, slicing.max_tokens) for slicing in found]
    assert sizes == [(16, 64), (5, 256), (300, 256), (5, 256)], "256 is the model's context"
    assert isinstance(again.config, ModelConfig)
    assert again.fingerprint == loaded.fingerprint
    loaded.model.backbone.norm_scale[...] *= 2
    save_model(tmp_path / "other", loaded.model, step=4)
    assert load_model(tmp_path / "other").fingerprint != again.fingerprint


def test_nothing_is_written_over(trained):
    with pytest.raises(UserError, match="already holds checkpoints"):
        save_model(trained, load_model(trained).model)
