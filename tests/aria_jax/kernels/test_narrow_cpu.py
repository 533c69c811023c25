"""The CPU's product is exact, for any number of rows and any cut over threads."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.kernels import narrow_cpu

pytestmark = pytest.mark.skipif(
    not narrow_cpu.available(), reason="needs a CPU backend whose interface is known"
)


@pytest.mark.parametrize(("n_rows", "n_outputs", "n_inputs"), [(1, 7, 33), (3, 64, 16), (2, 1, 5)])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_equals_the_product_in_float64(n_rows, n_outputs, n_inputs, n_threads, monkeypatch):
    monkeypatch.setattr(narrow_cpu, "usable_cpus", lambda: n_threads)
    rng = np.random.default_rng(0)
    rows = rng.integers(-128, 128, (n_outputs, n_inputs), dtype=np.int8)
    scale = rng.random(n_outputs, dtype=np.float32)
    x = rng.normal(size=(n_rows, n_inputs)).astype(np.float32)
    found = jax.jit(lambda *a: narrow_cpu.narrow_matmul(*a))(x, rows, scale)
    expected = (x.astype(np.float64) @ rows.T) * scale
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)  # sums of up to 33 * 128


@pytest.mark.parametrize("shape", [(1, 9, 40), (4, 6, 17)])
def test_bfloat16_equals_the_product_in_float64(shape):
    n_rows, n_outputs, n_inputs = shape
    rows = jax.random.normal(jax.random.key(0), (n_outputs, n_inputs)).astype(jnp.bfloat16)
    x = np.random.default_rng(1).normal(size=(n_rows, n_inputs)).astype(np.float32)
    found = jax.jit(lambda *a: narrow_cpu.narrow_matmul(*a))(x, rows)
    np.testing.assert_allclose(found, x @ np.asarray(rows, np.float64).T, rtol=1e-5, atol=1e-5)


def test_many_calls_at_once(monkeypatch):
    """More threads than the pool has, programs side by side: every part is there."""
    monkeypatch.setattr(narrow_cpu, "usable_cpus", lambda: 9)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.integers(-128, 128, (50, 300)), jnp.int8)
    xs = rng.integers(-3, 4, (400, 2, 300))
    run = jax.jit(lambda x: narrow_cpu.narrow_matmul(x, rows, jnp.ones(50)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: np.asarray(run(x.astype(np.float32))), xs))
    np.testing.assert_array_equal(found, xs @ np.asarray(rows, np.int64).T)  # small integers: exact


def test_other_kinds_of_numbers_are_refused():
    rows, scale = jnp.ones((4, 3), jnp.int8), jnp.ones(4)
    for wrong in (
        (jnp.ones((1, 3), jnp.bfloat16), rows, scale),
        (jnp.ones((1, 3)), rows, None),
        (jnp.ones((1, 3)), rows.astype(jnp.int16), scale),
    ):
        with pytest.raises(TypeError, match="rows of activations"):
            narrow_cpu.narrow_matmul(*wrong)


def test_inside_a_loop():
    rows = jnp.eye(5, dtype=jnp.int8)[::-1]

    def step(_, x):
        return narrow_cpu.narrow_matmul(x, rows, jnp.full(5, 2.0))

    x = jnp.arange(5.0)[None]
    found = jax.jit(lambda x: jax.lax.fori_loop(0, 3, step, x))(x)
    np.testing.assert_array_equal(found, 8 * x[:, ::-1])


def test_without_the_compiled_product_int8_is_a_sum(monkeypatch):
    monkeypatch.setattr(narrow_cpu, "_KNOWN_INTERFACE", ("1", "0"))
    assert not narrow_cpu.available.__wrapped__()
    monkeypatch.setattr(narrow_cpu, "available", lambda: False)
    rows = jnp.arange(-6, 6, dtype=jnp.int8).reshape(4, 3)
    x, scale = jnp.array([[1.0, 2, 3], [0, 1, 0]]), jnp.array([1.0, 2, 4, 8])
    found = narrow_cpu.narrow_matmul(x, rows, scale)
    np.testing.assert_array_equal(found, (x @ rows.T.astype(jnp.float32)) * scale)
