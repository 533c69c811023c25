"""A published medium checkpoint converts in little more memory than the model itself takes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from aria_jax.checkpoints.safetensors import tensor_shapes, write_tensors
from aria_jax.models import parameter_count
from aria_jax.models.heads import parameter_specs
from aria_jax.presets import MODELS

pytestmark = pytest.mark.slow


def write_bfloat16(path, config):
    """A file of the published one's names, shapes and type, with cheap random weights."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    shapes = tensor_shapes(config)
    values = (np.resize(noise, shape).view(np.uint16) for shape in shapes.values())
    write_tensors(path, shapes, values, {"format": "pt"}, "BF16")


def peak_memory(arguments):
    """Greatest memory of `aria-jax ARGUMENTS` in bytes, without what is mapped of files."""
    process = subprocess.Popen([sys.executable, "-m", "aria_jax.cli.main", *arguments])
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            peak = max(peak, 1024 * int(found.group(1)))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_medium_converts_there_and_back_without_a_second_copy(tmp_path, record_property):
    config = MODELS["medium"]
    source, checkpoint, back = (tmp_path / n for n in ("in.safetensors", "out", "back.safetensors"))
    write_bfloat16(source, config)
    for arguments in (
        ["from-safetensors", source, checkpoint],
        ["to-safetensors", checkpoint, back],
    ):
        began = time.perf_counter()
        peak = peak_memory(["convert", *map(str, arguments)])
        record_property(f"{arguments[0]} seconds", time.perf_counter() - began)
        record_property(f"{arguments[0]} peak bytes", peak)
        print(f"{arguments[0]}: {time.perf_counter() - began:.1f} s, peak {peak / 1e9:.2f} GB")
        # The model, the program, and on the way in the greatest of its parameters (a quarter), on
        # the way out what Orbax unpacks at once: never two models.
        assert peak < 1.8 * 4 * parameter_count(parameter_specs(config))
    with safe_open(source, framework="flax") as given, safe_open(back, framework="flax") as found:
        assert set(given.keys()) == set(found.keys())
        for name in ("lm_head.weight", "model.encode_layers.7.mixed_qkv.weight"):
            expected = np.asarray(given.get_tensor(name)).astype(np.float32)
            np.testing.assert_array_equal(found.get_tensor(name), expected)
