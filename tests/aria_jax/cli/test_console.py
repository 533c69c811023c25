"""Progress that tells the truth: rates of the whole, a resumed part not counted, present speed."""

import io
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.cli import console
from aria_jax.cli.console import Counter, Screen
from tests.first_hour.uses import SILENCE_S, Silence, first_threads
from tests.marks import slow_among

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


def test_the_time_left_runs_down_and_grows_where_a_unit_is_overdue():
    """Ten files at two seconds each, then one that takes its time."""
    clock = Clock()
    counter = Counter("render", "score", clock)
    for done in range(6):
        counter.report(done, 11)
        clock.now += 2
    clock.now -= 2
    assert counter.seconds_left == pytest.approx(12)
    clock.now += 1
    assert counter.seconds_left == pytest.approx(11)
    clock.now += 1
    due = counter.seconds_left
    assert due == pytest.approx(10)
    clock.now += 0.001
    assert counter.seconds_left == pytest.approx(due, abs=0.01)
    clock.now += 12
    assert counter.seconds_left == pytest.approx(5 * 24 / 6, abs=0.01)


def test_until_the_first_unit_is_done_the_stage_and_its_time_are_shown(monkeypatch):
    clock = Clock()
    screen, counter = Screen(clock), Counter("score", "token", clock)
    monkeypatch.setattr(sys, "stderr", heard := Heard(False, clock))
    screen.begin("score")
    screen.stage("compiling")
    screen.count(counter)
    counter.report(0, 10)
    clock.now += 3
    screen.tick()
    counter.report(5, 10)
    clock.now += 3
    screen.tick()
    lines = heard.getvalue().splitlines()
    assert lines[0] == "score: 0% 0/10 tokens (compiling, 3 s)"
    assert lines[1].startswith("score: 50% 5/10 tokens, 1.7 tokens/s") and "left" in lines[1]


def test_a_counter_without_news_or_work_has_a_text():
    counter = Counter("build", "file", Clock())
    assert not counter.started
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


class Heard(io.StringIO):
    """A stderr that is a terminal or not, and notes when something comes."""

    def __init__(self, terminal: bool, clock: Clock):
        super().__init__()
        self.isatty = lambda: terminal
        self.times, self._clock = [clock.now], clock

    def write(self, text: str) -> int:
        self.times.append(self._clock.now)
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["stage", "count", "report", "over"]), st.integers(0, 40)))
)
def test_nothing_that_a_verb_does_is_silent_for_two_seconds(terminal, actions):
    """Whatever follows on what: stages that are over soon, counts without news, and neither."""
    clock = Clock()
    screen, counter = Screen(clock), Counter("build", "file", clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", heard := Heard(terminal, clock))
        screen.begin("train")
        for action, ticks in [*actions, ("stage", 20)]:
            if action == "stage":
                screen.stage("loading")
            elif action == "count":
                screen.count(counter := Counter("build", "file", clock))
            elif action == "report":
                counter.report(1, 2)
            else:
                screen.count(None)
            for _ in range(ticks):
                clock.now += 0.2
                screen.tick()
    gaps = [b - a for a, b in itertools.pairwise([*heard.times, clock.now])]
    assert max(gaps) < 2


def test_a_terminal_is_not_left_waiting_while_libraries_load(tmp_path):
    """A real terminal and a real start: a line that is redrawn, gone where the result stands."""
    rng = np.random.default_rng(0)
    columns = {"composer": ["bach", "liszt"] * 20, "embedding": list(rng.normal(size=(40, 8)))}
    pq.write_table(pa.table(columns), table := tmp_path / "some.parquet")
    mine, terminal = pty.openpty()
    line = [sys.executable, "-m", "aria_jax.cli.main", "probe", str(table)]
    line += ["--label", "composer", "--cv", "2", "--classifier", "knn"]
    process = subprocess.Popen(line, stdout=terminal, stderr=terminal, stdin=terminal)
    os.close(terminal)
    silence, told = Silence(process.pid, lambda: first_threads(process.pid)), b""
    with suppress(OSError):  # the terminal is closed
        while True:
            told += os.read(mine, 4096)
            if b"accuracy" not in told:
                silence.word()
    os.close(mine)
    assert process.wait() == 0 and silence.longest < SILENCE_S
    text = told.decode()
    assert "\rprobe: loading the libraries (1 s)" in text, text
    lines = [part.rpartition("\r")[2] for part in text.replace("\r\n", "\n").splitlines()]
    assert any(part.removeprefix("\x1b[K").startswith("accuracy ") for part in lines), lines


@dataclass
class Stopped:
    """What became of a verb that got Ctrl-C.

    Attributes:
        status: exit status. told: all of its stderr.
        answered_s: from Ctrl-C to its answer, as far as the program could help it.
        silent_s: the longest time without a word, likewise.
        left: processes that it has left behind.
    """

    status: int
    told: str
    answered_s: float
    silent_s: float
    left: list[str]


def interrupted(arguments: list[str], *after: str, **env: str) -> Stopped:
    """Runs a verb that gets Ctrl-C, with all its workers, once each of the words is told."""
    waited_for = list(after)
    process = subprocess.Popen(
        [sys.executable, "-m", "aria_jax.cli.main", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", **env},
    )  # fmt: skip
    guard = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    guard.start()
    silence = Silence(process.pid, lambda: first_threads(process.pid))
    told, answered, answer = "", 0.0, None
    try:
        for line in process.stderr:
            silence.word()
            told += line
            if answer is not None and "Ctrl-C again to stop now" in line:
                answer.word()
                answered, answer = answer.longest, None
            if waited_for and re.search(waited_for[0], line):
                answer = Silence(process.pid, lambda: first_threads(process.pid))
                os.killpg(process.pid, signal.SIGINT)
                del waited_for[0]
        status = process.wait()
        return Stopped(status, told, answered, silence.longest, left_of(process.pid))
    finally:
        guard.cancel()


def left_of(group: int) -> list[str]:
    """Command lines of what still runs in a process group, given time to end."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return []
        time.sleep(0.1)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append((process / "cmdline").read_text().replace("\0", " "))
    os.killpg(group, signal.SIGKILL)
    return found


def check_stopped(stopped: Stopped, *answer: str) -> None:
    """At once, in order, and without a word from anybody else."""
    assert stopped.status == 130, stopped.told
    for words in answer:
        assert words in stopped.told
    for noise in ("Traceback", "KeyboardInterrupt", "resource_tracker"):
        assert noise not in stopped.told, stopped.told
    assert not stopped.left
    assert stopped.answered_s < 1, stopped.told
    assert stopped.silent_s < SILENCE_S, stopped.told


@pytest.fixture
def many_files(midi_corpus, tmp_path) -> Path:
    """A folder that takes some seconds to read."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(3000):
        os.link(midi_corpus / "lento_0.mid", folder / f"{i}.mid")
    return folder


AGAIN = "interrupted; run the same command again to go on"
SAVING, STOPPING = "saving; Ctrl-C again to stop now", "stopping; Ctrl-C again to stop now"


def test_ctrl_c_in_training_saves_and_says_so(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(run), *SMALL]
    check_stopped(interrupted([*arguments, "steps=100000", "log_every=1"], "steps, "), SAVING)
    assert [step for step in (run / "checkpoints").iterdir() if step.name.isdigit()]


def test_a_second_ctrl_c_ends_it_at_once(corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(run), *SMALL]
    stopped = interrupted([*arguments, "steps=100000"], "starting from scratch", "saving;")
    check_stopped(stopped, SAVING)
    assert "pretrain: " not in stopped.told


def test_ctrl_c_while_libraries_load_is_not_lost(corpus, tmp_path):
    slow = tmp_path / "slow" / "jax"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import time; time.sleep(60)")
    path = os.pathsep.join([str(slow.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = tmp_path / "run"
    arguments = ["train", "pretrain", "--data", str(corpus), "--workdir", str(run), *SMALL]
    stopped = interrupted([*arguments, "steps=9"], "train: loading jax", PYTHONPATH=path)
    check_stopped(stopped, STOPPING, AGAIN)
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


LONG = {
    "generate": ("--checkpoint {lm} --max-tokens 500000 --sliding --out out", "tokens, "),
    "score": ("{many} --checkpoint {lm}", "reading the files"),
    "search": ("{many}/0.mid {big} --checkpoint {encoder}", "loading jax"),
    "probe": ("{big} --label composer", "fitting"),
    "retrieve": ("{big} --by composer", "comparing"),
    "bench-suite": ("{many} --out out --workers 2", "embed: .*files"),
    "convert": ("to-safetensors {lm} out.safetensors", "loading"),
    "classify": ("{many} --checkpoint {classifier} --workers 2", "classify: .*files"),
    "listening-test": ("compare {many} {many}", "reading"),
    "tokenizers": ("compare {many}", "compare: .*files"),
    "demo": ("out --midi {many}", "build: .*files"),
    "data sample": ("out", "render: .*scores"),
    "data build": ("{many} out --dedup none", "build: .*files"),
    "embed": ("{many} out.parquet --baseline pitch-class --workers 2", "embed: .*files"),
    "embed alone": ("{many} out.parquet --baseline pitch-class --workers 0", "embed: .*files"),
}
"""verb -> arguments that keep it busy, and words after which it is."""
ALIKE = {"bench-suite", "classify", "embed alone", "listening-test", "retrieve", "tokenizers"}
"""Busy with what another verb is busy with."""


@pytest.fixture(scope="module")
def big_table(tmp_path_factory) -> Path:
    """Embeddings that take some seconds to compare or to learn from."""
    n, rng = 30_000, np.random.default_rng(0)
    columns = {
        "path": [f"{i}.mid" for i in range(n)],
        "composer": ["bach", "liszt"] * (n // 2),
        "embedding": list(rng.normal(size=(n, 128)).astype(np.float32)),
    }
    # As `embed` would say, or `search` refuses it before Ctrl-C can be answered.
    settings = {"slice_notes": 300, "max_tokens": 256, "tokenizer": "aria", "pooling": "eos"}
    table = pa.table(columns).replace_schema_metadata({"export_settings": json.dumps(settings)})
    pq.write_table(table, path := tmp_path_factory.mktemp("big") / "big.parquet")
    return path


def test_what_ctrl_c_broke_off_does_not_complain():
    """Compiled readers call back into a loop that has ended."""
    before, complaints = sys.unraisablehook, []
    sys.unraisablehook = complaints.append
    interrupts = console.Interrupts()
    try:
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError))
        assert len(complaints) == 1
        interrupts.count = 1
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError))
        interrupts.close()
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError))
        assert len(complaints) == 1
    finally:
        sys.unraisablehook = before


@pytest.mark.parametrize("verb", slow_among(LONG, ALIKE))
def test_ctrl_c_is_answered_and_nothing_stays_behind(
    verb, many_files, big_table, tiny_models, tmp_path, monkeypatch
):
    arguments, words = LONG[verb]
    places = {"many": many_files, "big": big_table, **tiny_models}
    monkeypatch.chdir(tmp_path)
    line = [*verb.removesuffix(" alone").split(), *arguments.format(**places).split()]
    check_stopped(interrupted(line, words), AGAIN)
    assert not [path for path in tmp_path.iterdir() if path.is_file()], "none is finished"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find a process")
def test_children_are_found_while_threads_end():
    """A thread that ended between two looks made Ctrl-C a traceback."""
    over = threading.Event()

    def start_threads():
        while not over.is_set():
            for _ in range(20):
                threading.Thread(target=int).start()

    starter = threading.Thread(target=start_threads)
    starter.start()
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            for _ in range(200):
                assert child.pid in {*console._children(), *console._children()}
        finally:
            over.set()
            starter.join()
            child.kill()
