"""Runs that train adapters: the base stays, checkpoints are small, others load whole weights."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.models import load_adapters, load_model, save_model
from aria_jax.checkpoints.safetensors import export_model
from aria_jax.cli.main import main
from aria_jax.config import ComputeConfig
from aria_jax.models.heads import build_model
from aria_jax.train.loop import run
from aria_jax.train.tasks import build_task, resolve
from data_pipeline.errors import UserError

LORA = ("lora_rank=2", "peak_lr=0.02", "eval_every=4")


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    """A language model on disk."""
    folder = tmp_path_factory.mktemp("base") / "lm"
    save_model(folder, build_model(config().model, ComputeConfig(), rngs=nnx.Rngs(7)))
    return folder


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def differences(actual, desired):
    """Parameter -> rank of the greatest change of a layer, where there is any."""
    changed = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True)
    for (path, a), b in pairs:
        if (a != b).any():
            delta = (a - b).reshape(len(a), a.shape[1], -1)
            changed[path[-1].key] = max(np.linalg.matrix_rank(d, tol=1e-5) for d in delta)
    return changed


def test_continuing_with_adapters(config, corpus, base, tmp_path, recorder, weights):
    before, seen = weights(base), recorder()
    settings = config("continue", *LORA, "lora_targets=qkv,down", "steps=6")
    result = run(settings, corpus, tmp_path / "lora", init_from=base, sinks=[seen])
    assert result.init.kind == "checkpoint"
    losses = seen.losses("val")
    assert losses[6] < losses[4]
    after = weights(tmp_path / "lora")
    assert differences(after, before) == {"qkv": 2, "down": 2}
    jax.tree.map(np.testing.assert_array_equal, weights(base), before)
    # Adapters and both of their moments against the weights.
    assert size_of(tmp_path / "lora" / "checkpoints") < size_of(base / "checkpoints") / 5
    assert load_model(tmp_path / "lora" / "best").step in (4, 6)
    assert "val/loss" in result.metrics


@pytest.mark.optimized
def test_stopped_and_resumed_equals_straight(config, corpus, base, tmp_path, recorder, weights):
    settings = config("continue", *LORA, "ema_decay=0.5", "eval_every=1000")
    straight, resumed = recorder(), recorder()
    run(settings, corpus, tmp_path / "a", init_from=base, sinks=[straight])
    run(settings, corpus, tmp_path / "b", init_from=base, should_stop=lambda step: step == 2)
    run(settings, corpus, tmp_path / "b", sinks=[resumed])
    assert resumed.losses() == {s: loss for s, loss in straight.losses().items() if s > 2}
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["contrastive", "classify"])
def test_a_new_head_is_trained_whole(task, config, corpus, base, tmp_path, weights):
    settings = config(task, *LORA, "grad_accumulation=2")
    run(settings, corpus, tmp_path / "run", init_from=base)
    run(config(task, *LORA, "steps=0"), corpus, tmp_path / "fresh", init_from=base)
    after, fresh = weights(tmp_path / "run"), weights(tmp_path / "fresh")
    jax.tree.map(np.testing.assert_array_equal, fresh["backbone"], weights(base)["backbone"])
    assert (after["head"] != fresh["head"]).any()
    changed = differences(after["backbone"], fresh["backbone"])
    assert changed == dict.fromkeys(("qkv", "out", "gate", "up", "down"), 2)
    with pytest.raises(UserError, match="trained its head too"):
        load_adapters(tmp_path / "run")


@pytest.mark.slow
def test_on_a_mesh_equals_one_device(
    config, corpus, base, tmp_path, recorder, one_device, monkeypatch, weights
):
    single, sharded = recorder(), recorder()
    run(config("continue", *LORA), corpus, tmp_path / "one", init_from=base, sinks=[single])
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: one_device)
    settings = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    run(
        config("continue", *LORA, *settings),
        corpus, tmp_path / "eight", init_from=base, sinks=[sharded],
    )  # fmt: skip
    for step, loss in single.losses().items():
        assert sharded.losses()[step] == pytest.approx(loss, rel=1e-4)  # order of reductions


def test_merged_and_alone(config, corpus, base, tmp_path, capsys, weights):
    """Three ways to the same weights: the run, its merged copy, its adapters on the base."""
    run(config("continue", *LORA), corpus, tmp_path / "run", init_from=base)
    expected = weights(tmp_path / "run")
    small = tmp_path / "adapters.safetensors"
    for arguments in (
        ("merge", tmp_path / "run", tmp_path / "whole"),
        ("adapters", tmp_path / "run", small),
        ("merge", small, tmp_path / "again", "--base", base),
    ):
        assert main(["convert", *map(str, arguments)]) == 0
    assert small.stat().st_size < 4 * load_adapters(tmp_path / "run").n_params + 5000
    for folder in ("whole", "again"):
        jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / folder), expected)
    assert main(["convert", "merge", str(small), str(tmp_path / "x")]) == 2
    assert main(["convert", "adapters", str(base), str(tmp_path / "x.safetensors")]) == 2
    err = capsys.readouterr().err
    assert "--base" in err and "has no adapters" in err


@pytest.mark.slow
def test_a_base_that_moved_or_changed(config, corpus, base, tmp_path, weights):
    published = tmp_path / "lm.safetensors"
    export_model(load_model(base).model, published)
    run(config("continue", *LORA), corpus, tmp_path / "run", init_from=published)
    expected = weights(tmp_path / "run")
    published.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is gone"):
        load_model(tmp_path / "run")
    moved = weights(tmp_path / "run", base=tmp_path / "elsewhere.safetensors")
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    run(config("pretrain", "steps=1", "seed=5"), corpus, tmp_path / "other")
    with pytest.raises(UserError, match="changed since"):
        load_model(tmp_path / "run", base=tmp_path / "other")


def test_adapters_need_something_to_adapt(config, corpus, tmp_path):
    with pytest.raises(UserError, match="name them with --init-from"):
        run(config("continue", *LORA), corpus, tmp_path / "a")


def test_other_adapters_are_another_run(config, corpus, base, tmp_path):
    run(config("continue", *LORA, "steps=1"), corpus, tmp_path / "a", init_from=base)
    with pytest.raises(UserError, match=r"train\.lora_rank: was 2, is 3"):
        run(config("continue", *LORA, "lora_rank=3"), corpus, tmp_path / "a")
    with pytest.raises(UserError, match="between 1 and"):
        run(config("continue", "lora_rank=99"), corpus, tmp_path / "b", init_from=base)
    with pytest.raises(UserError, match="qkw"):
        run(config("continue", *LORA, "lora_targets=qkw"), corpus, tmp_path / "c", init_from=base)


def test_the_optimiser_knows_the_adapters_only(config, corpus, base, tmp_path):
    run(config("continue", *LORA, "steps=1"), corpus, tmp_path / "a", init_from=base)
    (metadata,) = (tmp_path / "a" / "checkpoints" / "1" / "opt_state").glob("_METADATA")
    shapes = [
        entry["value_metadata"]["write_shape"]
        for entry in json.loads(metadata.read_text())["tree_metadata"].values()
        if entry["value_metadata"].get("write_shape")
    ]
    n_moments = sum(int(np.prod(shape)) for shape in shapes)
    assert n_moments == 2 * load_adapters(tmp_path / "a").n_params


def test_one_epoch_of_short_pieces(config, corpus):
    """As many steps as it takes to see every window of the pieces that are short enough once."""
    once = config("continue", "epochs=1", "max_piece_tokens=600")
    few = build_task(once, corpus).train.n_examples
    assert few < build_task(config("continue"), corpus).train.n_examples
    assert resolve(once, corpus).train.steps == -(-few // 8)
    assert resolve(config("continue", "epochs=2.5"), corpus).train.steps > 2 * -(-few // 8)
    assert resolve(config("continue", "steps=3"), corpus).train.steps == 3
