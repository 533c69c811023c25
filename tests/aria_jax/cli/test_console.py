"""Progress that tells the truth: rates of the whole, a resumed part not counted, present speed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.cli import console
from aria_jax.cli.console import Counter

SMALL = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=8"]


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 900), st.floats(0.01, 10.0), st.integers(2, 30))
def test_what_an_earlier_run_did_is_no_speed(before, seconds_per_file, n):
    clock = Clock()
    counter = Counter("embed", "file", clock)
    counter.report(before, 1000)
    assert counter.rate is None and counter.seconds_left is None
    for done in range(1, n + 1):
        clock.now += seconds_per_file
        counter.report(before + done, 1000)
    assert counter.rate == pytest.approx(1 / seconds_per_file)
    assert counter.seconds_left == pytest.approx((1000 - before - n) * seconds_per_file)


def test_the_time_left_follows_the_present_speed_and_the_rate_is_of_the_whole():
    clock = Clock()
    counter = Counter("train", "step", clock)
    counter.report(0, 1000)
    for step in range(1, 101):
        clock.now += 10
        counter.report(step, 1000)
    for step in range(101, 501):
        clock.now += 0.1
        counter.report(step, 1000)
    assert counter.seconds_left == pytest.approx(50, rel=0.05), "500 steps at ten a second"
    assert counter.rate == pytest.approx(500 / 1040)
    assert "50%" in counter.text() and "500/1,000 steps" in counter.text()


def test_a_counter_without_news_or_work_has_a_text():
    counter = Counter("build", "file", Clock())
    assert not counter.begun
    counter.report(0, 0)
    assert counter.text() == "build: 100% 0/0 files"
    counter.report(1, 1, "last one")
    assert counter.text(bar_width=4) == "build: 100% |####| 1/1 file, last one"


def test_listing_before_the_total_is_known_is_no_speed():
    clock = Clock()
    counter = Counter("build", "file", clock)
    counter.report(0, 4096)
    clock.now += 100
    counter.report(5000, 10_000)  # what an earlier run made
    clock.now += 10
    counter.report(5100, 10_000)
    assert counter.rate == pytest.approx(10) and counter.seconds_left == pytest.approx(490)


def interrupted(arguments: list[str], *after: str, **env: str) -> tuple[int, str]:
    """Status and stderr of a verb that gets Ctrl-C, with all its workers, once each is told."""
    waited_for = list(after)
    process = subprocess.Popen(
        [sys.executable, "-m", "aria_jax.cli.main", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", **env},
    )  # fmt: skip
    guard = threading.Timer(120, process.kill)
    guard.start()
    told = ""
    try:
        for line in process.stderr:
            told += line
            if waited_for and re.search(waited_for[0], line):
                os.killpg(process.pid, signal.SIGINT)
                del waited_for[0]
        return process.wait(), told
    finally:
        guard.cancel()


@pytest.fixture
def many_files(midi_corpus, tmp_path) -> Path:
    """A folder that takes some seconds to read."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(3000):
        os.link(midi_corpus / "lento_0.mid", folder / f"{i}.mid")
    return folder


def test_ctrl_c_in_training_saves_and_says_so(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(run), *SMALL]
    status, told = interrupted([*arguments, "steps=100000", "log_every=1"], "steps, ")
    assert status == 130, told
    assert "saving; Ctrl-C again to stop now" in told and "Traceback" not in told
    assert [step for step in (run / "checkpoints").iterdir() if step.name.isdigit()]


def test_a_second_ctrl_c_ends_it_at_once(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(run), *SMALL]
    status, told = interrupted([*arguments, "steps=100000"], "starting from scratch", "saving;")
    assert status == 130, told
    assert "Traceback" not in told and "pretrain: " not in told


def test_ctrl_c_while_libraries_load_is_not_lost(corpus, tmp_path):
    slow = tmp_path / "slow" / "jax"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import time; time.sleep(60)")
    path = os.pathsep.join([str(slow.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = tmp_path / "run"
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(run), *SMALL]
    status, told = interrupted([*arguments, "steps=9"], "train: loading jax", PYTHONPATH=path)
    assert status == 130, told
    assert "stopping; Ctrl-C again" in told and "Traceback" not in told
    assert not run.exists()


def test_a_ctrl_c_that_a_callback_swallowed_is_raised_again():
    def callback(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), console.working("train"):
        ref = weakref.ref(something := Clock(), callback)
        del something
        for _ in range(500):
            time.sleep(0.01)
        assert ref() is None, "it was lost"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_in_embedding_goes_on_later_and_no_worker_complains(workers, many_files, tmp_path):
    out = tmp_path / "emb.parquet"
    arguments = ["embed", str(many_files), str(out), "--baseline", "pitch-class"]
    arguments += ["--workers", workers]
    status, told = interrupted(arguments, "embed: .*files")
    assert status == 130, told
    assert "Traceback" not in told and "KeyboardInterrupt" not in told
    assert "stopping; Ctrl-C again to stop now" in told
    assert "run the same command again to go on" in told
    assert not out.exists()


def test_ctrl_c_in_building_is_one_sentence(many_files, tmp_path):
    arguments = ["data", "build", str(many_files), str(tmp_path / "data"), "--dedup", "none"]
    status, told = interrupted(arguments, "build: .*files")
    assert status == 130, told
    assert "Traceback" not in told and "run the same command again to go on" in told
