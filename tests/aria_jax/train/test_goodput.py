"""The record of a run's time, and what it says after kills and restarts."""

import json
import shutil
import time
from contextlib import closing

import pytest

from aria_jax.cli.main import main
from aria_jax.train.goodput import (
    FILE,
    REQUEST,
    STALLS,
    GoodputRecorder,
    ProfileRequests,
    read_status,
    status_text,
)
from aria_jax.train.processes import Watchdog
from data_pipeline import storage
from data_pipeline.errors import UserError


class Time:
    """A clock that is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(workdir, clock, begin, end, *, step_s=2.0, every=2, ends=True):
    """Steps `begin` + 1 … `end` after 10 s of start-up and 30 s of compiling."""
    recorder = GoodputRecorder(workdir / FILE, begin, every=every, hosts=1, devices=8, clock=clock)
    if end == begin:
        if ends:
            recorder.end()
        return
    clock.now += 10
    recorder._begin()
    for step in range(begin + 1, end + 1):
        with recorder.spent_on("data_s"):
            clock.now += 0.5
        with recorder.dispatching():
            clock.now += 30 if step == begin + 1 else 0
        clock.now += step_s
        if step % 4 == 0:
            with recorder.spent_on("checkpoint_s"):
                clock.now += 1
        recorder.on_step(step)
    if ends:
        recorder.end()


def until(condition, seconds=10):
    """Waits for another thread."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_an_undisturbed_run(tmp_path):
    clock = Time()
    run(tmp_path, clock, 0, 8)
    status = read_status(tmp_path, clock.now)
    assert (status.step, status.starts, status.lost_steps, status.running) == (8, 1, [], False)
    assert status.wall_s == 10 + 30 + 8 * 2.5 + 2
    assert status.goodput == pytest.approx(16 / status.wall_s)
    assert status.badput_s == {
        "startup": 10, "compile": 30, "data": 4, "evaluation": 0, "checkpoint": 2, "recovery": 0,
        "redone": 0, "other": 0,
    }  # fmt: skip
    assert status.step_s == {"p50": 2, "p90": 2, "p99": 2, "max": 2}


def test_steps_that_are_done_again_are_lost(tmp_path):
    clock = Time()
    run(tmp_path, clock, 0, 7, ends=False)  # killed behind step 7, of which 6 are in the record
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "ste')  # cut off
        file.write("\n")
    clock.now += 100
    run(tmp_path, clock, 3, 9)
    status = read_status(tmp_path, clock.now + 3600)
    assert (status.step, status.starts, status.lost_steps) == (9, 2, [3])
    assert status.badput_s["redone"] == pytest.approx(3 * 2)
    assert status.badput_s["recovery"] == pytest.approx(100 + 2.5)  # from the last line on
    assert status.goodput == pytest.approx((3 * 2 + 6 * 2) / status.wall_s)
    assert status.wall_s == pytest.approx(
        sum(status.badput_s.values()) + status.goodput * status.wall_s
    )
    assert not status.running and status.silent_s == 3600


def test_a_run_is_running_until_it_is_silent_for_long(tmp_path):
    clock = Time()
    run(tmp_path, clock, 0, 2, ends=False)
    assert read_status(tmp_path, clock.now + 60).running
    assert not read_status(tmp_path, clock.now + 3600).running
    with pytest.raises(UserError, match=r"no such folder; name the --workdir"):
        read_status(tmp_path / "none")


def test_status_is_told_of_a_real_run(corpus, tmp_path, capsys):
    small = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=8", "log_every=1",
             "checkpoint_every=1"]  # fmt: skip
    for steps in (2, 3):
        assert main(["train", "pretrain", "--data", str(corpus), "--workdir", str(tmp_path / "run"),
                     *small, f"steps={steps}"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["train", "--status", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "step 3, not running" in text and "started 2 times, steps done again: 0" in text
    assert "compile" in text and "a step, of late: p50" in text
    assert main(["train", f"--status={tmp_path / 'run'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lost_steps"] == [0] and 0 < found["goodput"] < 1
    assert found["badput_s"]["compile"] > 0 and found["badput_s"]["checkpoint"] > 0
    assert main(["train", "--status", str(corpus)]) == 2


def stall(workdir, process, event, at):
    (workdir / STALLS).mkdir(exist_ok=True)
    with (workdir / STALLS / f"process-{process}.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "time": at, "message": f"process {process}"}) + "\n")


def test_status_names_who_stalls_and_nobody_else(tmp_path):
    clock = Time()
    run(tmp_path, clock, 0, 2, ends=False)
    stall(tmp_path, 0, "stall", clock.now - 1e4)  # of a start before this one
    stall(tmp_path, 1, "stall", clock.now)
    stall(tmp_path, 2, "stall", clock.now)
    stall(tmp_path, 2, "goes on", clock.now)
    status = read_status(tmp_path, clock.now)
    assert status.stalls == ["process 1"]
    assert status_text("run", status).splitlines()[-1] == "process 1"


def test_a_run_under_way_finds_what_it_is_asked_for(tmp_path, capsys):
    run(tmp_path, time.time, 0, 0, ends=False)
    assert main(["train", "--profile-next", "3", str(tmp_path)]) == 0
    assert "trace of the next 3 steps" in capsys.readouterr().out
    with closing(ProfileRequests(tmp_path, look=False)) as deaf:
        assert deaf.take() == 0
    with closing(ProfileRequests(tmp_path)) as requests:
        until(lambda: requests._steps)
        assert requests.take() == 3
        assert requests.take() == 0 and not (tmp_path / REQUEST).exists()


def test_what_is_no_request_is_none(tmp_path):
    (tmp_path / REQUEST).write_text("soon")
    with closing(ProfileRequests(tmp_path)) as requests:
        until(lambda: not (tmp_path / REQUEST).exists())
        assert requests.take() == 0


@pytest.mark.parametrize(
    "steps, ends, says", [("0", False, "at least 1"), ("3", True, "no run is under way there")]
)
def test_requests_that_nobody_would_answer(steps, ends, says, tmp_path, capsys):
    run(tmp_path, time.time, 0, 0, ends=ends)
    assert main(["train", "--profile-next", steps, str(tmp_path)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / REQUEST).exists()


def test_a_run_in_a_bucket_is_asked_and_watched_there(bucket, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run(tmp_path / "run", time.time, 0, 0, ends=False)
    workdir = bucket.put("run", tmp_path / "run")
    assert main(["train", "--profile-next", "2", workdir]) == 0
    assert f"writes it to {workdir}/profile" in capsys.readouterr().out
    shutil.rmtree(storage.mirror())  # the run is on another machine
    place = storage.place(workdir)
    with closing(ProfileRequests(place)) as requests:
        until(lambda: requests._steps == 2)
    assert "run/profile-next" not in bucket.names()
    said = pytest.warns(UserWarning, match=f"all threads: {workdir}/stalls/process-0.jsonl")
    with said, closing(Watchdog(place, 0.002)):
        until(lambda: "run/stalls/process-0.jsonl" in bucket.names())
