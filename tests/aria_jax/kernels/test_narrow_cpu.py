"""The CPU's product is exact, for any number of rows and any cut over threads."""

import functools
import mmap
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.generate.cache import LayerCache, _cached_attention
from aria_jax.kernels import narrow_cpu

needs_compiler = pytest.mark.skipif(not narrow_cpu.available(), reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    ("n_rows", "n_outputs", "n_inputs"),
    [(1, 7, 33), (3, 64, 16), (2, 1, 5), (7, 403, 517), (1, 3, 40_000)],
)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_equals_the_product_in_float64(n_rows, n_outputs, n_inputs, n_threads, monkeypatch):
    monkeypatch.setattr(narrow_cpu, "usable_cpus", lambda: n_threads)
    rng = np.random.default_rng(0)
    rows = rng.integers(-128, 128, (n_outputs, n_inputs), dtype=np.int8)
    scale = rng.random(n_outputs, dtype=np.float32)
    x = rng.normal(size=(n_rows, n_inputs)).astype(np.float32)
    found = jax.jit(lambda *a: narrow_cpu.narrow_matmul(*a))(x, rows, scale)
    expected = (x.astype(np.float64) @ rows.T) * scale
    terms = np.abs(x).astype(np.float64) @ np.abs(rows.astype(np.float64)).T * scale
    np.testing.assert_array_less(np.abs(found - expected), 1e-6 * terms + 1e-30)


@needs_compiler
def test_activations_of_every_size_and_of_none():
    """Integers of a common step, which is at most 2^-22 of twice the greatest value."""
    rows = jnp.ones((2, 96), jnp.int8)
    run = jax.jit(lambda x: narrow_cpu.narrow_matmul(x, rows, jnp.ones(2)))
    for size in (0.0, 1e-30, 1.0, 1e30):
        x = np.float32(size) * np.linspace(1, 2, 96, dtype=np.float32)[None]
        np.testing.assert_allclose(run(x)[0], x.astype(np.float64).sum(), rtol=1e-6)
    for wrong in (np.nan, np.inf):
        x = np.ones((1, 96), np.float32)
        x[0, 5] = wrong
        assert not np.isfinite(run(x)).any()


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 9, 40), (4, 6, 17), (7, 401, 131)])
def test_bfloat16_equals_the_product_in_float64(shape):
    n_rows, n_outputs, n_inputs = shape
    rows = jax.random.normal(jax.random.key(0), (n_outputs, n_inputs)).astype(jnp.bfloat16)
    x = np.random.default_rng(1).normal(size=(n_rows, n_inputs)).astype(np.float32)
    found = jax.jit(lambda *a: narrow_cpu.narrow_matmul(*a))(x, rows)
    np.testing.assert_allclose(found, x @ np.asarray(rows, np.float64).T, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_many_calls_at_once(monkeypatch):
    """More threads than the pool has, programs side by side: every part is there."""
    monkeypatch.setattr(narrow_cpu, "usable_cpus", lambda: 9)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.integers(-128, 128, (1000, 300)), jnp.int8)
    xs = rng.integers(-3, 4, (400, 3, 300))  # one tile of two rows, one of one
    run = jax.jit(lambda x: narrow_cpu.narrow_matmul(x, rows, jnp.ones(1000)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: np.asarray(run(x.astype(np.float32))), xs))
    exact = xs.astype(np.float64) @ np.asarray(rows, np.float64).T
    np.testing.assert_array_equal(found, exact)


def test_other_kinds_of_numbers_are_refused():
    rows, scale = jnp.ones((4, 3), jnp.int8), jnp.ones(4)
    for wrong in (
        (jnp.ones((1, 3), jnp.bfloat16), rows, scale),
        (jnp.ones((1, 3)), rows, None),
        (jnp.ones((1, 3)), rows.astype(jnp.int16), scale),
    ):
        with pytest.raises(TypeError, match="rows of activations"):
            narrow_cpu.narrow_matmul(*wrong)


@needs_compiler
def test_inside_a_loop():
    rows = jnp.eye(5, dtype=jnp.int8)[::-1]

    def step(_, x):
        return narrow_cpu.narrow_matmul(x, rows, jnp.full(5, 2.0))

    x = jnp.arange(5.0)[None]
    found = jax.jit(lambda x: jax.lax.fori_loop(0, 3, step, x))(x)
    np.testing.assert_array_equal(found, 8 * x[:, ::-1])


def test_without_the_compiled_product_int8_is_a_sum(monkeypatch):
    monkeypatch.setattr(narrow_cpu, "available", lambda: False)
    rows = jnp.arange(-6, 6, dtype=jnp.int8).reshape(4, 3)
    x, scale = jnp.array([[1.0, 2, 3], [0, 1, 0]]), jnp.array([1.0, 2, 4, 8])
    found = narrow_cpu.narrow_matmul(x, rows, scale)
    np.testing.assert_array_equal(found, (x @ rows.T.astype(jnp.float32)) * scale)


@pytest.fixture
def not_loaded(monkeypatch, tmp_path):
    """As in a new process of a user with an empty cache."""
    monkeypatch.setattr(narrow_cpu, "_loaded", functools.cache(narrow_cpu._loaded.__wrapped__))
    monkeypatch.setenv("ARIA_JAX_CACHE", str(tmp_path))
    return tmp_path / "compiled"


def test_without_a_compiler_a_warning_says_what_to_install(not_loaded, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(narrow_cpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(narrow_cpu.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="pip install ziglang"):
        assert not narrow_cpu.available()
    assert not narrow_cpu.available()  # said once


def test_a_compiler_that_fails_leaves_nothing_behind(not_loaded, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho narrow_cpu.cc: no such header >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="c\\+\\+ ends with 1: narrow_cpu.cc: no such header"):
        assert not narrow_cpu.available()
    assert not list(not_loaded.iterdir())


def test_a_cache_that_cannot_be_written(not_loaded, monkeypatch):
    not_loaded.write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="decode slower than they could"):
        assert not narrow_cpu.available()


def test_what_was_built_is_tried_in_a_process_of_its_own(not_loaded, monkeypatch, tmp_path):
    """A library that cannot even be loaded is no more than a reason."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho no library > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="ends with 1: OSError"):
        assert not narrow_cpu.available()
    assert not list(not_loaded.iterdir())


def test_a_wrong_product_is_not_used(not_loaded, monkeypatch):
    monkeypatch.setattr(narrow_cpu, "built", lambda: narrow_cpu.SOURCE)
    monkeypatch.setattr(narrow_cpu, "register", lambda library: None)
    for wrong in ("int8", "bfloat16"):
        monkeypatch.setattr(
            narrow_cpu,
            "_call",
            lambda x, rows, scale, wrong=wrong: (
                x @ rows.astype(jnp.float32).T * (1 if scale is None else scale)
                + (rows.dtype.name == wrong)
            ),
        )
        narrow_cpu._loaded.cache_clear()
        with pytest.warns(UserWarning, match=f"the compiled product of {wrong} is wrong"):
            assert not narrow_cpu.available()


@needs_compiler
@pytest.mark.parametrize("filled", [0, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_equals_the_compilers(dtype, filled):
    """Two branches of five rows; slots that hold nothing are not read, whatever is in them."""
    rng = np.random.default_rng(0)

    def numbers(*shape):
        return jnp.asarray(2 * rng.normal(size=shape).astype(np.float32)).astype(dtype)

    q, k, v = numbers(3, 10, 3, 16).astype(jnp.float32)
    shared = LayerCache(numbers(2, 3, 70, 16), numbers(2, 3, 16, 70))
    past = LayerCache(numbers(10, 3, 50, 16), numbers(10, 3, 16, 50))
    visible = jnp.asarray(rng.random((2, 70)) < 0.5) & (jnp.arange(70) < 66)
    wide = [LayerCache(*(x.astype(jnp.float32) for x in cache)) for cache in (shared, past)]
    expected = _cached_attention(q, k, v, *wide, visible, jnp.int32(filled), on_cpu=False)
    garbage = jnp.arange(50) >= filled
    past = LayerCache(
        jnp.where(garbage[:, None], jnp.nan, past.keys).astype(dtype),
        jnp.where(garbage, jnp.nan, past.values).astype(dtype),
    )
    found = narrow_cpu.cached_attention(q, k, v, shared, past, visible, jnp.int32(filled))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # values reach 8


@needs_compiler
def test_attention_to_far_scores():
    """Weights that no float32 can hold are nothing, and none becomes infinite."""
    q = jnp.full((1, 1, 4), 100.0)
    keys = jnp.linspace(-1, 1, 24)[None, None, :, None] * jnp.ones((1, 1, 1, 4))
    values = jnp.arange(96.0).reshape(1, 1, 4, 24)
    cache, none = (keys, values), (keys[:, :, :0], values[..., :0])
    seen = jnp.ones((1, 24), bool)
    found = narrow_cpu.cached_attention(q, -q / 100, q, cache, none, seen, jnp.int32(0))
    np.testing.assert_allclose(found[0, 0], values[0, 0, :, -1], rtol=1e-6)


@needs_compiler
def test_wrong_attention_is_not_used(not_loaded, monkeypatch):
    monkeypatch.setattr(narrow_cpu, "built", lambda: narrow_cpu.SOURCE)
    monkeypatch.setattr(narrow_cpu, "register", lambda library: None)
    monkeypatch.setattr(narrow_cpu, "cached_attention", lambda q, *others: q)
    with pytest.warns(UserWarning, match="the compiled attention of float32 is wrong"):
        assert not narrow_cpu.available()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_large_pages_hold_the_same_numbers(dtype, monkeypatch):
    monkeypatch.setattr(narrow_cpu.LargePages, "MIN_ARRAY", 100)
    monkeypatch.setattr(narrow_cpu.LargePages, "CHUNK", 5000)
    pages = narrow_cpu.LargePages()
    arrays = [jnp.arange(n * 7).reshape(n, 7).astype(dtype) for n in (3, 50, 120, 400)]
    found = [pages.put(array) for array in arrays]
    for one, other in zip(found, arrays, strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
    assert found[0] is arrays[0]  # too small
    in_memory = np.frombuffer(pages._memory, np.uint8).ctypes.data
    if (maps := Path("/proc/self/maps")).is_file():  # of shared memory systems make none
        ranges = re.findall(r"^(\w+)-(\w+) (\S+)", maps.read_text(), re.M)
        places = {kind for a, b, kind in ranges if int(a, 16) <= in_memory < int(b, 16)}
        assert places == {"rw-p"}
    assert in_memory <= found[-1].unsafe_buffer_pointer() < in_memory + len(pages._memory)


def test_a_system_without_large_pages(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    array = jnp.zeros(narrow_cpu.LargePages.MIN_ARRAY, jnp.int8)
    assert narrow_cpu.LargePages().put(array) is array


def test_another_source_flag_or_processor_is_another_library(monkeypatch):
    before = {narrow_cpu._key()}
    for name, value in (
        ("SOURCE", narrow_cpu.SOURCE.with_suffix(".py")),
        ("FLAGS", (*narrow_cpu.FLAGS, "-g")),
        ("_processor", lambda: "flags: avx512f"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(narrow_cpu, name, value)
            before.add(narrow_cpu._key())
    assert len(before) == 4


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="of the instructions of x86")
@pytest.mark.parametrize("march", ["x86-64", "haswell", "skylake-avx512", "alderlake"])
def test_processors_with_fewer_instructions_get_the_same_product(march, tmp_path):
    """What this machine cannot run is only compiled."""
    library = tmp_path / "narrow_cpu.so"
    flags = [flag.replace("native", march) for flag in narrow_cpu.FLAGS]
    include = ("-I", jax.ffi.include_dir(), str(narrow_cpu.SOURCE), "-o", str(library))
    narrow_cpu._run(*narrow_cpu._compiler(), *flags, *include)
    needed = {"haswell": "avx2", "skylake-avx512": "avx512bw", "alderlake": "avx_vnni"}
    if needed.get(march, "") in narrow_cpu._processor():
        narrow_cpu._run(sys.executable, "-m", narrow_cpu.__name__, str(library))
