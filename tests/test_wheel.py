"""The wheel alone, in an environment of its own and far from the checkout, is a whole server."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.midi import midi_bytes
from tests.corpora import random_performance

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
WANTED = (
    "aria_jax/serve/web/index.html", "aria_jax/serve/web/piano/C4.ogg",
    "aria_jax/serve/web/piano/ATTRIBUTION.txt", "aria_jax/released/mini.safetensors",
    "aria_jax/released/mini-embedding.safetensors", "aria_jax/kernels/narrow_cpu.cc",
    "launch/templates/",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves files behind in what it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in tracked.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            target = folder / "checkout" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, folder / "checkout")
    (built,) = folder.glob("*.whl")
    return built


def pip(python: str | Path, *arguments: str | Path) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and re.search("No matching distribution|Connection|Network", done.stderr):
        pytest.skip(f"no packages can be fetched: {done.stderr.strip()[-200:]}")
    assert not done.returncode, done.stderr


def test_a_wheel_holds_the_page_the_piano_and_the_models(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    missing = [want for want in WANTED if not any(name.startswith(want) for name in names)]
    assert not missing
    assert sum(name.endswith(".ogg") for name in names) == 16
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_an_empty_environment_serves_with_what_the_wheel_brings(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    scripts = tmp_path / "venv" / "bin"
    pip(scripts / "python", "install", f"aria-jax[serve] @ {wheel.as_uri()}")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = subprocess.Popen(
        [scripts / "aria-jax", "serve", "--port", "0", "--save", tmp_path / "saved"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=clean,
    )  # fmt: skip
    ready = program.stdout.readline()
    found = re.search(r"ready: (http://127.0.0.1:\d+)/", ready)
    assert found, program.communicate()
    try:
        assert b"piano" in get(f"{found[1]}/")
        assert get(f"{found[1]}/piano/C4.ogg").startswith(b"OggS")
        piece = midi_bytes(random_performance(np.random.default_rng(0), 40))
        assert b'"embedding":[' in get(f"{found[1]}/v1/embed", piece)
        asked = urllib.request.Request(
            f"{found[1]}/v1/continue", b'{"seconds": 5}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert b'"pitch"' in answer.read()
    finally:
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=60)
    assert program.returncode == 0


def get(address: str, body: bytes | None = None) -> bytes:
    """What is there, or the answer to a MIDI file."""
    asked = urllib.request.Request(address, body, {"Content-Type": "audio/midi"} if body else {})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read()
