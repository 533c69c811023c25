"""A published medium checkpoint converts in little more memory than the model itself takes."""

import json
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from aria_jax.config import MODELS
from aria_jax.interop.architecture import reference_names, reference_shape
from aria_jax.interop.safetensors import _write

pytestmark = pytest.mark.slow


def write_bfloat16(path, config):
    """A file of the published one's names, shapes and type, with cheap random weights."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    names = [
        name
        for listed in reference_names(config).values()
        for name in ([listed] if isinstance(listed, str) else listed)
    ]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape = reference_shape(name, config)
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    sizes = (int(np.prod(reference_shape(name, config))) for name in names)
    _write(path, header, (np.resize(noise, size).view(np.uint16) for size in sizes))


def test_medium_converts_there_and_back_without_a_second_copy(tmp_path, record_property):
    config = MODELS["medium"]
    source, checkpoint, back = (tmp_path / n for n in ("in.safetensors", "out", "back.safetensors"))
    write_bfloat16(source, config)
    for arguments in (
        ["from-safetensors", source, checkpoint],
        ["to-safetensors", checkpoint, back],
    ):
        began = time.perf_counter()
        code = (
            "import json, resource, sys; from aria_jax.cli.main import main; "
            "code = main(sys.argv[1:]); "
            "print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "convert", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        peak = 1024 * json.loads(done.stdout.splitlines()[-1])
        record_property(f"{arguments[0]} seconds", time.perf_counter() - began)
        record_property(f"{arguments[0]} peak bytes", peak)
        print(f"{arguments[0]}: {time.perf_counter() - began:.1f} s, peak {peak / 1e9:.2f} GB")
        # Resident memory counts what is mapped of the files too.
        assert peak < 2 * 4 * config.n_params
    with safe_open(source, framework="flax") as given, safe_open(back, framework="flax") as found:
        assert set(given.keys()) == set(found.keys())
        for name in ("lm_head.weight", "model.encode_layers.7.mixed_qkv.weight"):
            expected = np.asarray(given.get_tensor(name)).astype(np.float32)
            np.testing.assert_array_equal(found.get_tensor(name), expected)
