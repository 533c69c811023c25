"""A process without a step for long says who it is, and where."""

import json
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest

from aria_jax.train import processes
from aria_jax.train.processes import Watchdog

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
