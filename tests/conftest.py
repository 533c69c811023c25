"""Fixtures every room's tests may use."""

import os

# Before numpy is imported: tests run side by side, and each would start a thread per core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.golden.arrays import unpack_golden

# Many tests, and the programs they start, compile the same functions: they are kept for the
# session. Its workers find the folder in their environment.
_MADE_HERE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _MADE_HERE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="aria-jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

# Before jax is imported anywhere: eight virtual CPU devices, so that sharding is tested everywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# jax's CUDA plug-in asks for a driver when the first test computes anything, and is gone for those
# that compile for GPUs which are not here.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

# Fixtures for every room; imported once the environment above is set, for they import jax.
pytest_plugins = ("tests.buckets", "tests.corpora", "tests.hub", "tests.tiny_models")

_SHARED = Path(os.environ.get("ARIA_JAX_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session", params=["committed", "shared"])
def golden(request, tmp_path_factory) -> Path:
    """What the reference computed, twice: on pieces made up here, and on real performances.

    The second set is not part of the repository; its tests skip where it is absent.
    """
    if request.param == "committed":
        return unpack_golden(tmp_path_factory.mktemp("golden"))
    if not (_SHARED / "golden").is_dir():
        pytest.skip("needs the reference's golden files (shared/golden beside the checkout)")
    return _SHARED / "golden"


@pytest.fixture(scope="session")
def golden_midi(golden) -> Path:
    """The folder that the paths in the golden files are relative to."""
    if (golden / "data").is_dir():
        return golden / "data"
    return real_midi_folder()


@pytest.fixture(scope="session")
def real_midi() -> Path:
    """Real performances; tests that need them skip where they are absent."""
    return real_midi_folder()


def real_midi_folder() -> Path:
    if not (_SHARED / "data").is_dir():
        pytest.skip("needs the development performances (shared/data beside the checkout)")
    return _SHARED / "data"


def pytest_configure():
    """A suite in the background of a script has Ctrl-C ignored; the programs it starts must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Whatever is held against the reference's numbers runs the code that users run."""
    for item in items:
        if "golden" in item.fixturenames and item.path.is_relative_to(
            Path(__file__).parent / "aria_jax"
        ):
            item.add_marker("optimized")
            # On made-up pieces in `make test`, on real ones beside the slow tests: the same code.
            if item.callspec.params["golden"] == "shared":
                item.add_marker("slow")


def pytest_collection_finish():
    """What was imported stays: the collector, which jax's many small objects call often, is not to
    walk through it each time.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def pytest_unconfigure():
    """Removes what this process made."""
    if _MADE_HERE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
