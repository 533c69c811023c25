"""Two real processes train one model, and one that dies takes the run down in bounded time."""

import json
import os
import subprocess
import sys

import pytest

from launch.local import main

SETTINGS = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=32", "global_batch=8", "steps=4"]
SETTINGS += ["log_every=1", "eval_every=9", "augment=false"]


def train(corpus, workdir, *before):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *before, "train", "pretrain", "--data", str(corpus)]
    return subprocess.run(
        [*command, "--workdir", str(workdir), *SETTINGS],
        env=environment, capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if row["split"] == "train"}


def test_two_processes_learn_what_one_learns(corpus, tmp_path):
    two = train(corpus, tmp_path / "two", "launch.local", "-n", "2", "--")
    assert two.returncode == 0, two.stderr[-2000:]
    one = train(corpus, tmp_path / "one", "aria_jax.cli.main")
    assert one.returncode == 0, one.stderr[-2000:]
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert found == {step: pytest.approx(loss, rel=1e-4) for step, loss in expected.items()}


def test_a_process_that_fails_ends_the_run(tmp_path):
    result = train(tmp_path / "nothing", tmp_path / "run", "launch.local", "-n", "2", "--")
    assert result.returncode == 2
    assert "no token shards here" in result.stderr and "run the same command again" in result.stderr


def test_a_dry_run_shows_every_process(capsys):
    assert main(["-n", "3", "--dry-run", "--", "train", "pretrain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.endswith("aria-jax train pretrain") for line in lines)
    assert [f"PROCESS_INDEX={i} " in line for i, line in enumerate(lines)] == [True] * 3
