"""A run: resumed bit for bit, sharded without a difference, stopped and started in every way."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from aria_jax.config import MeshConfig, ModelConfig, for_task, with_overrides
from aria_jax.interop.safetensors import export_model
from aria_jax.models.heads import split_model
from aria_jax.train.checkpoint import Checkpointer, load_model
from aria_jax.train.loop import run
from aria_jax.train.metrics import JsonlSink, TensorBoardSink
from data_pipeline.errors import UserError

TINY = ModelConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=256)


def config(task="pretrain", *settings):
    made = for_task("tiny", task)
    model = dataclasses.replace(made.model, d_model=32, n_heads=2, n_layers=2, max_seq_len=256)
    if task == "contrastive":
        model = dataclasses.replace(model, emb_size=16)
    made = dataclasses.replace(made, model=model, mesh=MeshConfig(1, 1, 1))
    common = (
        "seq_len=64 global_batch=8 steps=4 log_every=1 eval_every=1000 eval_batches=2 "
        "min_slice_notes=8 max_slice_notes=16 warmup_steps=2"
    )
    return with_overrides(made, [*common.split(), *settings])


class Recorder:
    def __init__(self):
        self.rows = []

    def write(self, step, metrics, split):
        self.rows.append((step, split, dict(metrics)))

    def close(self):
        pass

    def losses(self, split="train"):
        return {step: metrics["loss"] for step, s, metrics in self.rows if s == split}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs use one device unless a test asks for more: compiling for eight takes longer."""
    devices = jax.devices()
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: devices[:1])
    return devices


def final(workdir):
    return jax.tree.map(np.asarray, split_model(load_model(workdir).model)[1])


def test_stopped_and_resumed_equals_straight_bit_for_bit(corpus, tmp_path):
    settings = ("steps=40", "checkpoint_every=15")
    straight, first, second = Recorder(), Recorder(), Recorder()
    run(config("pretrain", *settings), corpus, tmp_path / "a", sinks=[straight])
    stopped = run(
        config("pretrain", *settings),
        corpus,
        tmp_path / "b",
        sinks=[first],
        should_stop=lambda step: step == 20,
    )
    assert stopped.interrupted and stopped.final_step == 20
    resumed = run(config("pretrain", *settings), corpus, tmp_path / "b", sinks=[second])
    assert resumed.start.kind == "resume" and resumed.final_step == 40
    assert straight.losses() == {**first.losses(), **second.losses()}
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path / "a"), final(tmp_path / "b"))


@pytest.mark.parametrize("task", ["pretrain", "contrastive"])
def test_eight_devices_equal_one(task, corpus, tmp_path, one_device, monkeypatch):
    single, sharded = Recorder(), Recorder()
    run(config(task), corpus, tmp_path / "one", sinks=[single])
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: one_device)
    eight = dataclasses.replace(config(task), mesh=MeshConfig(2, 2, 2))
    run(eight, corpus, tmp_path / "eight", sinks=[sharded])
    for step, loss in single.losses().items():
        assert sharded.losses()[step] == pytest.approx(loss, rel=1e-4)  # order of reductions


def test_a_checkpoint_restores_onto_another_mesh(corpus, tmp_path, one_device, monkeypatch):
    run(config(), corpus, tmp_path, should_stop=lambda step: step == 2)
    before = final(tmp_path)
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: one_device)
    moved = dataclasses.replace(config(), mesh=MeshConfig(1, 4, 2))
    result = run(moved, corpus, tmp_path, should_stop=lambda step: step == 3)
    assert result.start.kind == "resume" and result.final_step == 3
    assert jax.tree.structure(final(tmp_path)) == jax.tree.structure(before)


def test_gradient_accumulation_changes_nothing(corpus, tmp_path):
    whole, parts = Recorder(), Recorder()
    run(config(), corpus, tmp_path / "whole", sinks=[whole])
    run(config("pretrain", "grad_accumulation=4"), corpus, tmp_path / "parts", sinks=[parts])
    for step, loss in whole.losses().items():
        assert parts.losses()[step] == pytest.approx(loss, rel=1e-3)  # row masks differ a little


@pytest.mark.parametrize("task", ["continue", "classify"])
def test_every_task_trains_and_evaluates(task, corpus, tmp_path):
    recorder = Recorder()
    settings = ["label=composer"] if task == "classify" else []
    run(config(task, "eval_every=2", *settings), corpus, tmp_path, sinks=[recorder])
    assert set(recorder.losses("val")) == {2, 4}
    assert all(np.isfinite(loss) for loss in recorder.losses().values())
    if task == "classify":
        assert load_model(tmp_path).config.class_names == ("bach", "chopin", "liszt")


def test_a_signal_stops_with_a_checkpoint(corpus, tmp_path):
    def preempt(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    result = run(config("pretrain", "steps=50"), corpus, tmp_path, should_stop=preempt)
    assert result.interrupted and result.final_step == 2
    assert load_model(tmp_path).step == 2


def test_a_diverged_run_stops_and_keeps_the_weights_finite(corpus, tmp_path):
    with pytest.raises(UserError, match="not finite for 3 steps"):
        run(
            config("pretrain", "steps=20", "peak_lr=1e38", "warmup_steps=0", "max_bad_steps=3",
                   "clip_norm=none", "checkpoint_every=1"),
            corpus, tmp_path,
        )  # fmt: skip


def test_a_damaged_checkpoint_falls_back_to_the_one_before(corpus, tmp_path):
    run(config("pretrain", "checkpoint_every=2"), corpus, tmp_path)
    for path in (tmp_path / "checkpoints" / "4" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        result = run(
            config("pretrain", "checkpoint_every=2"),
            corpus,
            tmp_path,
            should_stop=lambda step: True,
        )
    assert result.final_step == 3


class TestStart:
    def test_own_checkpoint_first(self, corpus, tmp_path):
        run(config(), corpus, tmp_path / "run", should_stop=lambda step: step == 1)
        run(config(), corpus, tmp_path / "other", should_stop=lambda step: step == 2)
        result = run(config(), corpus, tmp_path / "run", init_from=tmp_path / "other",
                     should_stop=lambda step: True)  # fmt: skip
        assert result.start.kind == "resume" and result.final_step == 2

    def test_given_checkpoint_gives_backbone_and_new_head(self, corpus, tmp_path):
        run(config(), corpus, tmp_path / "lm", should_stop=lambda step: step == 1)
        result = run(
            config("contrastive", "steps=0"), corpus, tmp_path / "emb", init_from=tmp_path / "lm"
        )
        assert result.start.kind == "checkpoint"
        ours, theirs = final(tmp_path / "emb"), final(tmp_path / "lm")
        jax.tree.map(np.testing.assert_array_equal, ours["backbone"], theirs["backbone"])
        assert ours["head"].shape == (32, 16)

    def test_published_weights_are_converted(self, corpus, tmp_path):
        run(config("pretrain", "steps=1"), corpus, tmp_path / "lm")
        export_model(load_model(tmp_path / "lm").model, tmp_path / "lm.safetensors")
        result = run(
            config("pretrain", "steps=0"), corpus, tmp_path / "b",
            init_from=tmp_path / "lm.safetensors",
        )  # fmt: skip
        assert result.start.kind == "published"
        jax.tree.map(np.testing.assert_array_equal, final(tmp_path / "b"), final(tmp_path / "lm"))

    def test_scratch_otherwise(self, corpus, tmp_path):
        result = run(config("pretrain", "steps=0"), corpus, tmp_path)
        assert result.start.kind == "scratch" and "scratch" in result.start.sentence

    def test_anything_else_is_a_user_error(self, corpus, tmp_path):
        with pytest.raises(UserError, match="neither a checkpoint nor"):
            run(config(), corpus, tmp_path, init_from=tmp_path / "nothing")


def test_a_changed_setting_is_refused_by_name(corpus, tmp_path):
    run(config(), corpus, tmp_path, should_stop=lambda step: step == 1)
    with pytest.raises(UserError, match=r"optimizer.peak_lr: was 0.001, is 0.5"):
        run(config("pretrain", "peak_lr=0.5"), corpus, tmp_path)


def test_sinks_write_what_tools_read(corpus, tmp_path):
    sinks = [JsonlSink(tmp_path / "metrics.jsonl"), TensorBoardSink(tmp_path / "tb")]
    run(config(), corpus, tmp_path / "run", sinks=sinks)
    for sink in sinks:
        sink.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "tokens_per_s", "n_tokens"} <= rows[0].keys()
    assert list((tmp_path / "tb").glob("events.*"))


def test_retention_keeps_the_newest(corpus, tmp_path):
    run(config("pretrain", "checkpoint_every=1", "keep_checkpoints=2"), corpus, tmp_path)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [3, 4]
    checkpointer.close()


def test_batches_that_do_not_divide_are_explained(corpus, tmp_path, one_device, monkeypatch):
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: one_device)
    eight = dataclasses.replace(config("pretrain", "global_batch=6"), mesh=MeshConfig(8, 1, 1))
    with pytest.raises(UserError, match="choose a multiple of 8"):
        run(eight, corpus, tmp_path)
