"""What is written down, and when."""

import json
import math

import jax.numpy as jnp
import pytest

from aria_jax.train.metrics import JsonlSink, Log, TensorBoardSink, Watch
from data_pipeline.errors import UserError


def watch(sink, **options):
    settings = {"log_every": 2, "max_bad": 2, "last_good": lambda: "at step 7",
                "flops_per_token": 100.0, "peak_flops": None}  # fmt: skip
    return Watch(Log([sink]), **{**settings, **options})


def step(loss=1.0, *, skipped=0.0, n_tokens=10):
    values = {"loss": loss, "skipped": skipped, "n_tokens": n_tokens}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_metrics_are_read_one_step_late(recorder):
    sink = recorder()
    seen = watch(sink, log_every=1)
    seen.after(1, step(3.0))
    assert not sink.rows, "step 1 may still be running"
    seen.after(2, step(2.0))
    assert sink.losses() == {1: 3.0}
    seen.flush()
    assert sink.losses() == {1: 3.0, 2: 2.0}


def test_means_are_over_steps_that_counted(recorder):
    sink = recorder()
    seen = watch(sink, max_bad=9)
    for number, metrics in enumerate([step(1), step(math.nan, skipped=1)], start=1):
        seen.after(number, metrics)
    seen.flush()
    ((number, _, metrics),) = sink.rows
    assert number == 2 and metrics["loss"] == 1.0 and metrics["skipped"] == 1
    seen.after(3, step(math.nan, skipped=1))
    seen.after(4, step(math.nan, skipped=1))
    seen.flush()
    assert "loss" not in sink.rows[1][2] and sink.rows[1][2]["skipped"] == 2


def test_what_is_left_is_written_at_the_end(recorder):
    sink = recorder()
    seen = watch(sink)
    for number in (1, 2, 3):
        seen.after(number, step(float(number)))
    seen.finish()
    seen.finish()
    assert sink.losses() == {2: 1.5, 3: 3.0}


def test_throughput_leaves_evaluation_out_but_no_step(recorder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("aria_jax.train.metrics.time.perf_counter", lambda: now[0])
    sink = recorder()
    seen = watch(sink)
    now[0] = 1.0
    seen.after(1, step(n_tokens=10))
    with seen.paused():
        now[0] = 101.0
    now[0] = 104.0
    seen.after(2, step(n_tokens=10))
    seen.finish()
    assert sink.rows[0][2]["step_s"] == 2.0 and sink.rows[0][2]["tokens_per_s"] == 5.0


def test_bad_steps_in_a_row_end_the_run(recorder):
    seen = watch(recorder())
    seen.after(1, step(math.nan, skipped=1))
    seen.after(2, step(1.0))
    seen.after(3, step(math.nan, skipped=1))
    seen.after(4, step(math.nan, skipped=1))
    with pytest.raises(UserError, match="not finite for 2 steps up to step 4; at step 7"):
        seen.flush()


def test_mfu_is_tokens_times_flops_over_the_peak(recorder):
    sink = recorder()
    seen = watch(sink, peak_flops=1e6)
    seen.after(1, step(n_tokens=50))
    seen.after(2, step(n_tokens=70))
    seen.flush()
    metrics = sink.rows[0][2]
    assert metrics["mfu"] == pytest.approx(metrics["tokens_per_s"] * 100 / 1e6)
    assert metrics["tokens_per_s"] * metrics["step_s"] * 2 == pytest.approx(120)


def test_jsonl_is_appended_valid_json(tmp_path):
    for number, loss in enumerate([0.5, math.inf]):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write(number, {"loss": loss}, "train")
        sink.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "split": "train", "loss": 0.5},
                    {"step": 1, "split": "train", "loss": None}]  # fmt: skip


def test_tensorboard_gets_every_curve(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(3, {"loss": 0.5}, "val")
    sink.close()
    (events,) = tmp_path.glob("events.*")
    assert b"val/loss" in events.read_bytes()
