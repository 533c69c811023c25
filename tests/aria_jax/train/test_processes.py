"""A process without a step says who it is, and where; nobody waits for one that is gone."""

import json
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest

from aria_jax.train import processes
from aria_jax.train.processes import Peers, Watchdog, leaving_together

QUICK = 0.002
"""Minutes: a tenth of a second and a bit."""


def stuck_here(seconds: float) -> None:
    time.sleep(seconds)


def record(workdir: Path) -> list[dict]:
    files = list((workdir / "stalls").glob("*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_stall_is_named_with_its_stack_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.jax, "process_index", lambda: 3)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 16)
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "host-3")
    said = pytest.warns(UserWarning, match="stalls behind step 7")
    with said as told, closing(Watchdog(tmp_path, QUICK)) as watchdog:
        watchdog.on_step(7, None, None)
        stuck_here(0.5)
        watchdog.on_step(8, None, None)
        stuck_here(0.05)
    (message,) = [str(warning.message) for warning in told]
    assert message.startswith("process 3 of 16 on host-3 stalls")
    assert "it is in stuck_here (test_processes.py:" in message
    stall, goes_on = record(tmp_path)
    assert (tmp_path / "stalls" / "process-3.jsonl").is_file()
    assert stall["event"] == "stall" and stall["step"] == 7 and stall["silent_s"] >= 60 * QUICK
    assert "stuck_here" in stall["threads"]["MainThread"]
    assert goes_on["event"] == "goes on" and "goes on with step 8" in goes_on["message"]


def test_steps_in_time_say_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with closing(Watchdog(tmp_path, 1.0)) as watchdog:
            for number in range(5):
                watchdog.on_step(number, None, None)
        with closing(Watchdog(tmp_path, None)):
            stuck_here(0.01)
    assert not record(tmp_path)


def test_before_the_first_step_too(tmp_path):
    said = pytest.warns(UserWarning, match="stalls before its first")
    with said, closing(Watchdog(tmp_path, QUICK)):
        stuck_here(0.4)


def test_compiled_code_that_keeps_the_interpreter_is_seen_as_well(tmp_path):
    """No thread of Python runs meanwhile; the stack comes from within a signal."""
    code = (
        "import ctypes, pathlib\n"
        "from aria_jax.train.processes import Watchdog\n"
        f"watchdog = Watchdog(pathlib.Path({str(tmp_path)!r}), {QUICK})\n"
        "def held(): ctypes.PyDLL(None).usleep(900_000)\n"
        "held(); watchdog.close()\n"
        "import signal; assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "most recent call first" in done.stderr and "in held" in done.stderr


class Store:
    """jax's coordination service, of which three calls are used."""

    def __init__(self):
        self.values, self.silent = {}, set()

    def key_value_set(self, key, value, allow_overwrite=False):
        if threading.get_ident() not in self.silent:
            assert allow_overwrite or key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_delete(self, key):
        self.values.pop(key, None)


class Run:
    """Several processes of one run, as threads; what each said when it left."""

    def __init__(self, n, after_s=0.2):
        self.store, self.said, self.left = Store(), {}, threading.Event()
        self.peers = [
            Peers(self.leave(i), after_s, every_s=0.01, client=self.store, index=i)
            for i in range(n)
        ]
        while len(self.store.values) < n:
            time.sleep(0.005)

    def leave(self, index):
        def say(reason):
            self.said.setdefault(index, []).append(reason)
            if len(self.said) == len(self.peers) - 1:
                self.left.set()

        return say

    def kill(self, index):
        """It gives no sign any more, and hears nothing."""
        self.store.silent.add(self.peers[index]._thread.ident)
        self.peers[index]._leave = lambda reason: None

    def close(self):
        for peers in self.peers:
            peers.close()


@pytest.mark.parametrize("victim", [1, 2])
def test_whoever_lives_is_told_who_is_gone(victim):
    with closing(Run(3)) as run:
        run.kill(victim)
        assert run.left.wait(20)
    assert run.said.keys() == {0, 1, 2} - {victim}
    for (reason,) in run.said.values():
        assert reason.startswith(f"process {victim} of ") and "no sign of life for 0 s" in reason
        assert reason.endswith("start all of them again to go on from the last checkpoint")


def test_what_one_learns_all_know_at_once():
    with closing(Run(3, after_s=3600)) as run:
        run.kill(1)  # nobody waits an hour for it
        run.peers[2].lost("process 2 of 3 lost contact with another")
        assert run.left.wait(20)
    assert run.said.keys() == {0, 2}
    assert all(reason.startswith("process 2 of 3 lost") for (reason,) in run.said.values())


def test_one_that_is_done_is_not_gone():
    with closing(Run(3)) as run:
        run.peers[1].close()
        time.sleep(0.5)
        assert not run.said
        assert {key[-1] for key in run.store.values} == {"0", "2"}


def test_a_pause_of_the_one_that_counts_is_not_the_others_death(monkeypatch):
    with closing(Run(2)) as run:
        monkeypatch.setattr(run.store, "key_value_dir_get", lambda folder: time.sleep(0.5) or [])
        time.sleep(0.4)  # twice as long as a sign of life may be out
        monkeypatch.undo()
        time.sleep(0.3)
        assert not run.said


def test_a_collective_that_fails_ends_all_and_other_mistakes_only_their_process(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    said, store = [], Store()
    with leaving_together(said.append, client=store, index=1, every_s=0.01):
        raise ValueError("UNKNOWN: [transport/tcp/pair.cc:547] Connection closed by peer")
    (reason,) = said
    assert "lost contact with another" in reason and "Connection closed" in reason
    assert any(key.startswith("aria_jax/lost/") for key in store.values)
    with (
        pytest.raises(ValueError, match="not a number"),
        leaving_together(said.append, client=Store(), index=1, every_s=0.01),
    ):
        raise ValueError("not a number")
    assert len(said) == 1


def test_alone_nobody_is_missed():
    with leaving_together():
        assert not any(thread.name == "peers" for thread in threading.enumerate())
