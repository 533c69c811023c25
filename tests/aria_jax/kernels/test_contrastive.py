"""Every implementation of the pairwise statistics against plain NumPy and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.config import MeshConfig
from aria_jax.kernels import contrastive, contrastive_tpu, gpu
from aria_jax.kernels.contrastive import NEG_INF, PairSharding, pair_statistics
from aria_jax.sharding import make_mesh

IMPLEMENTATIONS = ("blockwise", "tpu-interpret", "gpu-interpret")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction without large arrays."""
    monkeypatch.setattr(contrastive_tpu, "TILE_ROWS", 128)
    monkeypatch.setattr(contrastive_tpu, "TILE_COLUMNS", 128)
    monkeypatch.setattr(contrastive, "LOGITS_AT_ONCE", 60 * 7)  # seven rows
    monkeypatch.setattr(gpu, "LOGITS_AT_ONCE", 0)  # one tile of rows


def case(n, m, dtype=jnp.float32, n_compositions=10_000):
    rng = np.random.default_rng(n * m)
    x, y = (rng.normal(size=(size, 40)) for size in (n, m))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    ids = [jnp.asarray(rng.integers(0, n_compositions, size), jnp.int32) for size in (n, m)]
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype), *ids, jnp.float32(12.0)


def naive(x, y, x_ids, y_ids, scale):
    logits = scale * jnp.matmul(x, y.T, preferred_element_type=jnp.float32)
    logits = jnp.where(x_ids[:, None] == y_ids, NEG_INF, logits)

    def lse(axis):
        return jax.nn.logsumexp(logits, axis=axis)

    return lse(1), logits.max(1), lse(0), logits.max(0)


def weighed(statistics, n, m):
    """A scalar whose gradient reaches every log-sum-exp with another weight."""
    row_lse, _, column_lse, _ = statistics
    return row_lse @ jnp.linspace(-1, 2, n) + column_lse @ jnp.linspace(3, 0, m)


def with_gradients(statistics, x, y, x_ids, y_ids, scale):
    """Statistics, as they are without a gradient, and the gradients by x, y and scale."""

    def scalar(x, y, scale):
        return weighed(statistics(x, y, x_ids, y_ids, scale), len(x), len(y))

    @jax.jit  # one program in place of a hundred of one operation each
    def both(x, y, scale):
        gradients = jax.grad(scalar, (0, 1, 2))(x, y, scale)
        return statistics(x, y, x_ids, y_ids, scale), gradients

    return both(x, y, scale)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n,m", [(1, 2), pytest.param(60, 60, marks=pytest.mark.slow), (129, 300)])
def test_equals_the_plain_computation(implementation, n, m):
    arguments = case(n, m, n_compositions=40)
    where = PairSharding(implementation)
    found, found_grads = with_gradients(lambda *a: pair_statistics(*a, where), *arguments)
    expected, expected_grads = with_gradients(naive, *arguments)
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)
    for a, b in zip(found_grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_sums_in_float32(implementation):
    """Inputs of 8 bits, sums of 24: values to 1e-5, gradients to the rounding of their weights."""
    arguments = case(60, 200, jnp.bfloat16)
    where = PairSharding(implementation)
    statistics, (found, *_) = with_gradients(lambda *a: pair_statistics(*a, where), *arguments)
    for actual, desired in zip(statistics, jax.jit(naive)(*arguments), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)
    wide = [a.astype(jnp.float32) for a in arguments[:2]]
    _, (expected, *_) = with_gradients(naive, *wide, *arguments[2:])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected, rtol=1e-2, atol=4e-3 * np.abs(expected).max()
    )


def test_three_bfloat16_are_a_float32_whatever_the_compiler_simplifies():
    x = jax.random.normal(jax.random.key(0), (1000,)) * 10.0 ** jnp.linspace(-20, 20, 1000)
    pieces = jax.jit(lambda x: gpu._pieces(x, exact=True))(x)
    assert [piece.dtype for piece in pieces] == [jnp.bfloat16] * 3
    np.testing.assert_array_equal(sum(np.asarray(piece, np.float64) for piece in pieces), x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_any_pair_is_silent(implementation):
    x, y, _, _, scale = case(3, 4)
    ids = jnp.array([5, 1, 1], jnp.int32), jnp.array([1, 1, 1, 1], jnp.int32)
    where = PairSharding(implementation)
    found = pair_statistics(x, y, *ids, scale, where)
    assert (found.row_lse[1:] == NEG_INF).all() and found.row_lse[0] > -20
    grads = jax.grad(
        lambda x: jax.nn.softplus(pair_statistics(x, y, *ids, scale, where).row_lse).sum()
    )
    gradient = jax.jit(grads)(x)
    assert np.isfinite(gradient).all() and not gradient[1:].any() and gradient[0].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tiny_temperatures_neither_overflow_nor_vanish(implementation):
    """A fixed maximum would lose rows whose similarities all lie far below it."""
    x = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    y = jnp.array([[-1.0, 0.0], [-0.6, -0.8]])
    ids = jnp.arange(2, dtype=jnp.int32), jnp.arange(2, dtype=jnp.int32)
    found = pair_statistics(x, y, *ids, jnp.float32(1000.0), PairSharding(implementation))
    np.testing.assert_allclose(found.row_lse, [-600.0, -600.0], rtol=1e-5)


def test_memory_grows_with_the_batch_and_not_its_square(monkeypatch):
    """64 k pairs of 512: the matrix alone would be 17 GB, and its gradient as much again."""
    from aria_jax.losses.contrastive import contrastive_loss

    def loss(z1, z2):
        return contrastive_loss(z1, z2, temperature=0.1)[0]

    def compiled_bytes(n):
        z = jax.ShapeDtypeStruct((n, 512), jnp.float32)
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(z, z).compile()
        sizes = compiled.memory_analysis()
        return sum(
            (sizes.temp_size_in_bytes, sizes.argument_size_in_bytes, sizes.output_size_in_bytes)
        )

    monkeypatch.undo()  # tiles as large as they are
    few, many = compiled_bytes(32_768), compiled_bytes(65_536)
    assert many < 2.5e9
    assert many < 2.1 * few


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_an_nvidia_gpu(dtype):
    """No GPU here: the kernels must at least become Triton programs, one per direction."""
    sides = [jax.ShapeDtypeStruct((1000, 512), dtype)] * 2
    ids = [jax.ShapeDtypeStruct((1000,), jnp.int32)] * 2
    scale = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(x, y, x_ids, y_ids, scale):
        return weighed(pair_statistics(x, y, x_ids, y_ids, scale, PairSharding()), 1000, 1000)

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*sides, *ids, scale)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert "pair_statistics" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.aot_gpu
@pytest.mark.parametrize("device", ["a100", "l4", "h100", "b200"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_gpu_spills_registers_or_leaves_tensor_cores_idle(monkeypatch, device, dtype):
    """sm_80, sm_89, sm_90a, sm_100a; a kernel in float32 multiplies bfloat16 as well."""
    from aria_jax.aot.gpu import compile_for_gpus

    monkeypatch.undo()  # tiles as large as they are
    side, ids = jax.ShapeDtypeStruct((512, 512), dtype), jax.ShapeDtypeStruct((512,), jnp.int32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(x, y, x_ids, y_ids, scale):
        return weighed(pair_statistics(x, y, x_ids, y_ids, scale, PairSharding()), 512, 512)

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    made = compile_for_gpus(gradients, side, side, ids, ids, scale, topology=f"{device}:1")
    kernels = {k.name: k for k in made.kernels if k.name.startswith("contrastive_")}
    assert kernels.keys() == {"contrastive_statistics", "contrastive_weights"}
    for kernel in kernels.values():
        assert not kernel.spills and kernel.mma, kernel
        assert not any("tf32" in kind for kind in kernel.mma)  # three digits


@pytest.mark.aot
def test_compiles_for_a_tpu_pod_as_a_ring(tpu_topology):
    """Half a million pairs on 64 chips: kernels, no gathered batch, transfers beside kernels."""
    from aria_jax.losses.contrastive import contrastive_loss

    mesh = make_mesh(MeshConfig(data=16, fsdp=4), list(tpu_topology.devices))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    z = jax.ShapeDtypeStruct((64 * 8192, 512), jnp.bfloat16, sharding=cut)

    def loss(z1, z2):
        return contrastive_loss(z1, z2, temperature=0.1, mesh=mesh)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).trace(z, z)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 150e6
    assert _kernels_between_start_and_done(text) >= 2  # forward, backward


@pytest.mark.aot
@pytest.mark.parametrize(
    "dtype,n,megabytes", [(jnp.bfloat16, 32_768, 280), (jnp.float32, 8192, 70)]
)
def test_compiles_for_one_tpu_chip_in_linear_memory(tpu_topology, dtype, n, megabytes):
    from aria_jax.losses.contrastive import contrastive_loss

    one = jax.sharding.SingleDeviceSharding(tpu_topology.devices[0])
    z = jax.ShapeDtypeStruct((n, 512), dtype, sharding=one)

    def loss(z1, z2):
        return contrastive_loss(z1, z2, temperature=0.1)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).trace(z, z)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < megabytes * 1e6


def _kernels_between_start_and_done(scheduled: str) -> int:
    """Computations in which a Pallas kernel is scheduled while a transfer is under way."""
    found = 0
    for computation in scheduled.split("\n\n"):
        under_way, overlapped = 0, False
        for line in computation.splitlines():
            under_way += " collective-permute-start(" in line
            under_way -= " collective-permute-done(" in line
            overlapped |= under_way > 0 and 'custom_call_target="tpu_custom_call"' in line
        found += overlapped
    return found
