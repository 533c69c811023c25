"""Two real processes train one model, and one that dies takes the run down in bounded time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import main

SETTINGS = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=8", "steps=4"]
SETTINGS += ["log_every=1", "eval_every=9", "augment=false"]


ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
TWO = ("launch.local", "-n", "2", "--")


def command(corpus, workdir, *before, settings=()):
    words = [sys.executable, "-m", *before, "train", "pretrain", "--data", str(corpus)]
    return [*words, "--workdir", str(workdir), *SETTINGS, *settings]


def train(corpus, workdir, *before, settings=()):
    return subprocess.run(
        command(corpus, workdir, *before, settings=settings),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if row["split"] == "train"}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Losses by step of one process that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("alone")
    one = train(corpus, workdir, "aria_jax.cli.main", settings=["steps=6"])
    assert one.returncode == 0, one.stderr[-2000:]
    return losses(workdir)


def agree(found, expected):
    return found == {step: pytest.approx(expected[step], rel=1e-4) for step in found}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def started(corpus, workdir, *settings):
    """A launcher whose two processes have done a few of very many steps, and saved some."""
    endless = ["steps=100000", "checkpoint_every=2", *settings]
    launcher = subprocess.Popen(
        command(corpus, workdir, *TWO, settings=endless),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not saved_steps(workdir):
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[1]
        time.sleep(0.1)
    return launcher


def saved_steps(workdir):
    """Steps whose checkpoint is complete."""
    return [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]


def children(pid):
    """Process ids by ARIA_JAX_PROCESS_INDEX."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, listed))  # started in that order


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_one_goes_on(corpus, tmp_path, alone):
    two = train(corpus, tmp_path, *TWO)
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.startswith("step 4: "), "nothing but the result: no library's chatter"
    assert losses(tmp_path).keys() == {1, 2, 3, 4}
    one = train(corpus, tmp_path, "aria_jax.cli.main", settings=["steps=6"])
    assert one.returncode == 0 and "at step 4" in one.stderr, one.stderr[-2000:]
    assert losses(tmp_path).keys() == alone.keys() and agree(losses(tmp_path), alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find a process")
def test_one_process_is_killed_and_the_run_goes_on(corpus, tmp_path, alone):
    launcher = started(corpus, tmp_path)
    os.kill(children(launcher.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, told = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 45
    assert launcher.returncode
    # The survivor says what happened, without a traceback; so does the launcher.
    assert "process 0 of 2 lost contact with another" in told and "Traceback" not in told
    assert "run the same command again to go on" in told
    assert agree({step: loss for step, loss in losses(tmp_path).items() if step in alone}, alone)

    done = max(losses(tmp_path))
    steps = done + 2
    again = train(corpus, tmp_path, *TWO, settings=[f"steps={steps}"])
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"resuming {tmp_path} at step" in again.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    redone = rows[[row["step"] for row in rows].index(done) + 1 :]
    assert [row["step"] for row in redone][-1] == steps
    # Steps since the checkpoint are done again, with the same losses.
    first = {row["step"]: row["loss"] for row in rows[: len(rows) - len(redone)]}
    for row in redone:
        assert row["loss"] == pytest.approx(first.get(row["step"], row["loss"]), rel=1e-5)


@pytest.mark.slow
def test_ctrl_c_saves_a_step_that_all_agree_on(corpus, tmp_path):
    launcher = started(corpus, tmp_path)
    launcher.send_signal(signal.SIGINT)
    out, told = launcher.communicate(timeout=90)
    assert launcher.returncode == 1, told[-2000:]
    assert "interrupted; run the same command again to go on" in out
    assert max(saved_steps(tmp_path)) == max(losses(tmp_path)), "the last step done is saved"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find a process")
def test_both_trace_steps_asked_for_and_name_the_one_that_stalls(corpus, tmp_path):
    """One process is stopped: the other, which waits for it, says where it waits."""
    launcher = started(corpus, tmp_path, "stall_minutes=0.05")
    asked = subprocess.run(
        [sys.executable, "-m", "aria_jax.cli.main", "train", "--profile-next", "2", str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    folders = [tmp_path / "profile" / f"process-{i}" for i in (0, 1)]
    wait_for(lambda: all(list(folder.rglob("*.xplane.pb")) for folder in folders))
    second = children(launcher.pid)[1]
    os.kill(second, signal.SIGSTOP)
    stalls = tmp_path / "stalls" / "process-0.jsonl"
    wait_for(lambda: stalls.is_file() and '"stall"' in stalls.read_text().splitlines()[-1])
    status = subprocess.run(
        [sys.executable, "-m", "aria_jax.cli.main", "train", "--status", str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"process 0 of 2 on {socket.gethostname()} stalls behind step" in status.stdout
    os.kill(second, signal.SIGCONT)
    wait_for(lambda: '"goes on"' in stalls.read_text().splitlines()[-1])
    launcher.send_signal(signal.SIGINT)
    _, told = launcher.communicate(timeout=90)
    assert "process 0 of 2" in told and "stalls" in told


def test_a_process_that_fails_ends_the_run(tmp_path):
    result = train(tmp_path / "nothing", tmp_path / "run", "launch.local", "-n", "2", "--")
    assert result.returncode == 2
    assert "no token shards here" in result.stderr and "run the same command again" in result.stderr


def test_a_dry_run_shows_every_process(capsys):
    assert main(["-n", "3", "--dry-run", "--", "train", "pretrain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.endswith("aria-jax train pretrain") for line in lines)
    assert [f"PROCESS_INDEX={i} " in line for i, line in enumerate(lines)] == [True] * 3
