"""What a run does besides its steps, and when; every process must decide alike."""

import json
import math

import jax.numpy as jnp
import pytest

from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.train import hooks
from aria_jax.train.hooks import KeepBest, Profile, SaveCheckpoints, StepMonitor
from aria_jax.train.step import TrainState
from aria_jax.train.trackers import JsonlSink, Log, TensorBoardSink
from data_pipeline.errors import UserError


def monitor(sink, **options):
    settings = {"log_every": 2, "max_bad": 2, "last_good": lambda: "at step 7",
                "flops_per_token": 100.0, "peak_flops": None}  # fmt: skip
    return StepMonitor(Log([sink]), **{**settings, **options})


def step(loss=1.0, *, skipped=0.0, n_tokens=10):
    values = {"loss": loss, "skipped": skipped, "n_tokens": n_tokens}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_metrics_are_read_one_step_late(recorder):
    sink = recorder()
    seen = monitor(sink, log_every=1)
    seen.on_step(1, None, step(3.0))
    assert not sink.rows, "step 1 may still be running"
    seen.on_step(2, None, step(2.0))
    assert sink.losses() == {1: 3.0}
    seen.flush()
    assert sink.losses() == {1: 3.0, 2: 2.0}


def test_means_are_over_steps_that_counted(recorder):
    sink = recorder()
    seen = monitor(sink, max_bad=9)
    for number, metrics in enumerate([step(1), step(math.nan, skipped=1)], start=1):
        seen.on_step(number, None, metrics)
    seen.flush()
    ((number, _, metrics),) = sink.rows
    assert number == 2 and metrics["loss"] == 1.0 and metrics["skipped"] == 1
    seen.on_step(3, None, step(math.nan, skipped=1))
    seen.on_step(4, None, step(math.nan, skipped=1))
    seen.flush()
    assert "loss" not in sink.rows[1][2] and sink.rows[1][2]["skipped"] == 2


def test_what_is_left_is_written_at_the_end(recorder):
    sink = recorder()
    seen = monitor(sink)
    for number in (1, 2, 3):
        seen.on_step(number, None, step(float(number)))
    seen.finish()
    seen.finish()
    assert sink.losses() == {2: 1.5, 3: 3.0}


def test_throughput_leaves_evaluation_out_but_no_step(recorder):
    now = [0.0]
    sink = recorder()
    seen = monitor(sink, clock=lambda: now[0])
    now[0] = 1.0
    seen.on_step(1, None, step(n_tokens=10))
    with seen.paused():
        now[0] = 101.0
    now[0] = 104.0
    seen.on_step(2, None, step(n_tokens=10))
    seen.finish()
    assert sink.rows[0][2]["step_s"] == 2.0 and sink.rows[0][2]["tokens_per_s"] == 5.0


def test_bad_steps_in_a_row_end_the_run(recorder):
    seen = monitor(recorder())
    seen.on_step(1, None, step(math.nan, skipped=1))
    seen.on_step(2, None, step(1.0))
    seen.on_step(3, None, step(math.nan, skipped=1))
    seen.on_step(4, None, step(math.nan, skipped=1))
    with pytest.raises(UserError, match="not finite for 2 steps up to step 4; at step 7"):
        seen.flush()


def test_mfu_is_tokens_times_flops_over_the_peak(recorder):
    sink = recorder()
    seen = monitor(sink, peak_flops=1e6)
    seen.on_step(1, None, step(n_tokens=50))
    seen.on_step(2, None, step(n_tokens=70))
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


@pytest.fixture
def saved(monkeypatch):
    """Steps for which a save was begun, in order; each is really written."""
    begun = []
    real = Checkpointer.save

    def save(self, step, *args, **options):
        begun.append(step)
        real(self, step, *args, **options)

    monkeypatch.setattr(hooks.Checkpointer, "save", save)
    return begun


def offer(best, step, loss):
    best.offer(step, loss, {"w": jnp.ones(2)})


def test_a_slower_process_decides_as_if_the_faster_had_written_nothing(saved, tmp_path):
    # Two processes begin on an empty folder; the first has written before the second looks.
    faster, slower = KeepBest(tmp_path, {}), KeepBest(tmp_path, {})
    offer(faster, 1, 2.0)
    offer(slower, 1, 2.0)
    assert saved == [1, 1], "a save is a barrier: both processes must begin it"


def test_only_a_better_loss_is_kept_also_by_a_resumed_run(saved, tmp_path):
    best = KeepBest(tmp_path, {})
    for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0)):
        offer(best, step, loss)
    assert saved == [1, 3]
    resumed = KeepBest(tmp_path, {})
    offer(resumed, 4, 1.5)
    offer(resumed, 5, 0.5)
    assert saved == [1, 3, 5]


class FakeCheckpointer:
    """Remembers which steps were saved, and with what record."""

    def __init__(self):
        self.saved = {}

    def save(self, step, params, record, **items):
        self.saved[step] = record


STATE = TrainState({}, {})


def run_saves(seconds_per_step, n_steps, **options):
    """Steps that are saved where each takes so long on a clock of the test."""
    now, checkpointer = [0.0], FakeCheckpointer()
    settings = {"every": 1000, "every_minutes": None, "ask_every": 1, "agree": bool}
    save = SaveCheckpoints(
        checkpointer, lambda step: {"at": step}, clock=lambda: now[0], **{**settings, **options}
    )
    for number in range(1, n_steps + 1):
        now[0] += seconds_per_step
        save.on_step(number, STATE, {})
    assert all(record == {"at": n, "ema": False} for n, record in checkpointer.saved.items())
    return list(checkpointer.saved)


def test_saves_by_step_and_by_time():
    assert run_saves(1, 10, every=4) == [4, 8]
    assert run_saves(25, 12, every_minutes=1) == [3, 6, 9, 12]
    assert run_saves(25, 12, every_minutes=1, every=5) == [3, 5, 8, 10]  # counted from any save
    assert run_saves(25, 12, every_minutes=1, ask_every=2) == [4, 8, 12]
    assert run_saves(25, 12, every_minutes=None) == []


def test_the_clock_of_another_process_decides():
    assert run_saves(1e6, 5, every_minutes=1, agree=lambda due: False) == []
    assert run_saves(0, 3, every_minutes=1, agree=lambda due: True) == [1, 2, 3]


@pytest.fixture
def traces(monkeypatch):
    """What was asked of jax's profiler."""
    asked = []
    monkeypatch.setattr(hooks.jax.profiler, "start_trace", lambda folder: asked.append("start"))
    monkeypatch.setattr(hooks.jax.profiler, "stop_trace", lambda: asked.append("stop"))
    return asked


@pytest.mark.parametrize(
    "steps, done, expected",
    [
        ((3, 4), 0, [1, 2, "start", 3, 4, "stop", 5]),
        ((1, 1), 0, ["start", 1, "stop", 2, 3, 4, 5]),
        ((4, 9), 3, ["start", 4, 5, "stop"]),
    ],
)
def test_the_steps_named_are_traced(steps, done, expected, traces, tmp_path):
    profile = Profile(tmp_path, steps, done)
    for number in range(done + 1, 6):
        traces.append(number)
        profile.on_step(number, None, step())
    profile.finish()
    assert traces == expected


def profiled(profile, asked, n_steps, traces):
    """Steps 1 … n_steps, where `asked` says how many to trace behind which."""
    for number in range(1, n_steps + 1):
        traces.append(number)
        asked[0] = asked.get(number, 0)
        profile.on_step(number, None, step())
    profile.finish()
    return traces


@pytest.mark.parametrize(
    "steps, requests, every, expected",
    [
        (None, {2: 2}, 1, [1, 2, "start", 3, 4, "stop", 5, 6]),
        (None, {5: 9}, 1, [1, 2, 3, 4, 5, "start", 6, "stop"]),
        (None, {1: 1, 3: 1}, 2, [1, 2, 3, 4, 5, 6]),  # all processes ask together
        ((5, 5), {1: 1}, 1, [1, "start", 2, "stop", 3, 4, "start", 5, "stop", 6]),
        ((3, 3), {2: 2}, 1, [1, 2, "start", 3, 4, "stop", 5, 6]),
    ],
)
def test_steps_asked_for_meanwhile_are_traced(steps, requests, every, expected, traces, tmp_path):
    asked = dict(requests)
    profile = Profile(tmp_path, steps, 0, asked=lambda: asked[0], ask_every=every)
    assert profiled(profile, asked, 6, traces) == expected


def test_the_answer_of_another_process_starts_the_trace(traces, tmp_path):
    profile = Profile(tmp_path, None, 0, agree=lambda n: 1)  # process 0 was asked for one step
    profile.on_step(1, None, step())
    profile.on_step(2, None, step())
    assert traces == ["start", "stop"]


def test_steps_that_never_come_are_named(traces, tmp_path):
    profile = Profile(tmp_path, (7, 9), 0)
    profile.on_step(1, None, step())
    with pytest.warns(UserWarning, match="profile_steps=7-9"):
        profile.finish()
    assert traces == []


def test_the_best_weights_wait_for_the_runs_own_checkpoint(tmp_path):
    written = []

    def before():
        written.append((tmp_path / "best").exists())

    best = KeepBest(tmp_path, {}, before)
    best.offer(1, 2.0, {"w": jnp.zeros(2)})
    best.offer(2, 3.0, {"w": jnp.zeros(2)})
    assert written == [False]
