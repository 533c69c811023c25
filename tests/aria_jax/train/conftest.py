"""A network small enough to train for a few steps in a test, and what records its losses."""

import dataclasses

import jax
import numpy as np
import pytest

from aria_jax.checkpoints.models import load_model
from aria_jax.config import MeshConfig, RunConfig, with_overrides
from aria_jax.models.heads import split_model
from aria_jax.presets import for_task
from tests.tiny_models import SOLO_PIANO

COMMON = (
    "seq_len=64 global_batch=8 steps=4 log_every=1 eval_every=1000 eval_batches=2 "
    "min_slice_notes=8 max_slice_notes=16 warmup_steps=2"
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs use one device unless a test asks for more: compiling for eight takes longer."""
    devices = jax.devices()
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: devices[:1])
    return devices


@pytest.fixture
def eight_devices(one_device, monkeypatch):
    """Runs use all eight devices."""
    monkeypatch.setattr("aria_jax.sharding.jax.devices", lambda: one_device)


@pytest.fixture(scope="session")
def config():
    """(task, *settings) -> a tiny run on one device."""

    def make(task: str = "pretrain", *settings: str, mesh: MeshConfig | None = None) -> RunConfig:
        made = for_task("tiny", task)
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}
        model = dataclasses.replace(made.model, **sizes, vocabulary=SOLO_PIANO)
        if task == "contrastive":
            model = dataclasses.replace(model, emb_size=16)
        made = dataclasses.replace(made, model=model, mesh=mesh or MeshConfig(1, 1, 1))
        if task == "classify":
            settings = ("label=composer", *settings)
        # A rate of their own: the preset's may change.
        rate = "peak_lr=1e-3" if task in ("pretrain", "continue") else "peak_lr=3e-4"
        return with_overrides(made, [*COMMON.split(), rate, *settings])

    return make


class Recorder:
    """A sink that remembers."""

    def __init__(self):
        self.rows = []

    def write(self, step, metrics, split):
        self.rows.append((step, split, dict(metrics)))

    def close(self):
        pass

    def losses(self, split="train"):
        return {step: metrics["loss"] for step, s, metrics in self.rows if s == split}


@pytest.fixture
def recorder():
    """Makes sinks that remember."""
    return Recorder


@pytest.fixture(scope="session")
def weights():
    """(workdir) -> the weights `load_model` finds there, as NumPy arrays."""

    def read(workdir, **options):
        params = split_model(load_model(workdir, **options).model)[1]
        return jax.tree.map(np.asarray, params)

    return read
