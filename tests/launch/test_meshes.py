"""Rows follow the sharding: real processes on any mesh learn what one process learns.

Losses agree to 1e-5: collectives add in another order, and nothing else differs.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aria_jax.checkpoints.models import save_model
from aria_jax.config import ComputeConfig
from launch.local import environments, free_port
from tests.launch.meshes import Case, train

SAVES = ("checkpoint_every_minutes=1e-9", "keep_checkpoints=9")
ROOT = Path(__file__).parents[2]
REL = 1e-5


def run_processes(n, cases, corpus, folder, devices_each=1):
    """Runs all cases in turn in `n` processes; rows logged, by case."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices_each}"
    command = [sys.executable, "-m", "tests.launch.meshes", str(corpus), str(folder)]
    command.append(json.dumps([dataclasses.asdict(case) for case in cases]))
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **extra, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        )
        for extra in environments(n, free_port())
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=1200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), told[0][-3000:] + told[-1][-3000:]
    return {case: json.loads((folder / f"{case.name}.json").read_text()) for case in cases}


@pytest.fixture
def run_alone(corpus, tmp_path, monkeypatch):
    """(case, devices) -> rows logged by this process with so many of its virtual devices."""
    every = jax.devices()

    def alone(case, n_devices):
        monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: every[:n_devices])
        return train(case, corpus, tmp_path / "alone")

    return alone


def assert_same_run(found, expected):
    assert len(found) == len(expected) >= 3
    for (step, split, loss, n_tokens), (*at, expected_loss, expected_n) in zip(
        found, expected, strict=True
    ):
        assert [step, split] == at and n_tokens == expected_n
        assert loss == pytest.approx(expected_loss, rel=REL), (step, split)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model that runs start from."""
    from flax import nnx

    from aria_jax.models.heads import build_model

    folder = tmp_path_factory.mktemp("base") / "lm"
    config = Case("pretrain", (1, 1, 1, 1)).config
    save_model(folder, build_model(config.model, ComputeConfig(), rngs=nnx.Rngs(7)))
    return str(folder)


def test_two_processes_that_share_a_matrix_learn_from_the_same_rows(corpus, tmp_path, run_alone):
    case = Case("pretrain", (1, 1, 2, 1))
    assert_same_run(run_processes(2, [case], corpus, tmp_path)[case], run_alone(case, 2))


@pytest.mark.slow
def test_two_processes_with_rows_of_their_own(corpus, tmp_path, run_alone, base):
    case = Case("contrastive", (2, 1, 1, 1), SAVES, init_from=base, embed=True)
    assert_same_run(run_processes(2, [case], corpus, tmp_path)[case], run_alone(case, 2))
    saved = {path.name for path in (tmp_path / case.name / "checkpoints").iterdir()}
    assert saved >= {"1", "2", "3"}, "the clock of process 0 said so, and both saved"


MESHES = {
    (2, 1): [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    (2, 2): [(2, 2, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2)],
    (4, 1): [(4, 1, 1, 1), (1, 1, 4, 1), (1, 2, 2, 1), (2, 1, 1, 2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices_each", MESHES)
@pytest.mark.parametrize("task", ["pretrain", "contrastive"])
def test_every_mesh(task, processes, devices_each, corpus, tmp_path, run_alone):
    embed = task == "contrastive"
    cases = [Case(task, mesh, embed=embed) for mesh in MESHES[processes, devices_each]]
    found = run_processes(processes, cases, corpus, tmp_path, devices_each)
    for case, rows in found.items():
        assert_same_run(rows, run_alone(case, processes * devices_each))


@pytest.mark.slow
def test_a_mixture_on_two_processes(corpus, tmp_path, run_alone):
    """Losses of each corpus too, where both hold all rows and where each has its own."""
    second = str(shutil.copytree(corpus, tmp_path / "second"))
    cases = [
        Case("pretrain", (2, 1, 1, 1), beside=second),
        Case("pretrain", (1, 1, 2, 1), beside=second),
        Case("contrastive", (1, 2, 1, 1), beside=second),
    ]
    for case, rows in run_processes(2, cases, corpus, tmp_path).items():
        assert any(split == "train loss/second" for _, split, *_ in rows)
        assert_same_run(rows, run_alone(case, 2))


@pytest.mark.slow
def test_adapters_and_classes_on_two_processes(corpus, tmp_path, run_alone, base):
    lora = ("lora_rank=2", "peak_lr=0.02")
    cases = [
        Case("continue", (1, 1, 2, 1), lora, base),
        Case("continue", (1, 2, 1, 1), lora, base),
        Case("classify", (1, 1, 2, 1), (), base),
        Case("classify", (2, 1, 1, 1), ("lora_rank=2",), base),
    ]
    for case, rows in run_processes(2, cases, corpus, tmp_path).items():
        assert_same_run(rows, run_alone(case, 2))


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_another_mesh(corpus, tmp_path, run_alone):
    """Two processes stop after two steps, four go on for two, then one."""
    whole = Case("pretrain", (1, 1, 1, 1), ("steps=6", "schedule=constant", "eval_every=6"))
    expected = run_alone(whole, 1)
    for n, mesh, steps in ((2, (1, 1, 2, 1), 2), (4, (2, 1, 2, 1), 4), (1, (1, 1, 1, 1), 6)):
        settings = (f"steps={steps}", *whole.settings[1:])
        case = Case("pretrain", mesh, settings)
        workdir = tmp_path / case.name
        if (before := tmp_path / "before").exists():
            before.rename(workdir)
        found = run_processes(n, [case], corpus, tmp_path)[case]
        workdir.rename(tmp_path / "before")
        own = [row for row in found if row[1] == "train"]
        assert [row[0] for row in own] == [steps - 1, steps]
        for step, _, loss, n_tokens in own:
            _, _, expected_loss, expected_n = next(r for r in expected if r[:2] == [step, "train"])
            assert n_tokens == expected_n and loss == pytest.approx(expected_loss, rel=REL)
