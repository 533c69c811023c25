"""Attention on GPUs: packed rows by Triton against the plain one, and what becomes of it all."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.config import ComputeConfig, MeshConfig, ModelConfig
from aria_jax.kernels import attention as kernels
from aria_jax.kernels import gpu
from aria_jax.kernels import packed_attention as packed
from aria_jax.kernels.attention import attention
from aria_jax.models.heads import abstract_model, split_model
from aria_jax.sharding import make_mesh


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in each direction without long rows."""
    monkeypatch.setattr(gpu, "ATTENTION_FORWARD", gpu._Blocks(32, 16, 4, 2))
    monkeypatch.setattr(gpu, "ATTENTION_BACKWARD", {64: gpu._Blocks(32, 16, 4, 2)})
    monkeypatch.setattr(gpu, "ALIGNMENT", 32)


def segments(kind: str, batch: int, length: int):
    """Ids of rows: as packing makes them, one piece, one piece a token, or in no order at all."""
    rng = np.random.default_rng(length)
    if kind == "packed":  # the last one padding
        ends = np.sort(rng.integers(0, length, (batch, 4)), axis=1)
        ids = (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1) + 1
        ids[:, -length // 8 :] = 0
    else:
        ids = {
            "one": np.ones((batch, length)),
            "each": np.tile(np.arange(length), (batch, 1)),
            "shuffled": rng.integers(0, 3, (batch, length)),
        }[kind]
    return jnp.asarray(ids, jnp.int32)


def case(kind, length, width=16, dtype=jnp.float32, batch=2, heads=2):
    rng = np.random.default_rng(length)
    arrays = (rng.normal(size=(batch, length, heads, width)) for _ in "qkv")
    ids = None if kind == "none" else segments(kind, batch, length)
    return *(jnp.asarray(array, dtype) for array in arrays), ids


def values_and_gradients(arguments, implementation):
    weights = jnp.cos(jnp.arange(arguments[0].size).reshape(arguments[0].shape))

    def scalar(*qkv):
        out = attention(*qkv, segment_ids=arguments[3], implementation=implementation)
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(*arguments[:3])
    return out, *grads


@pytest.mark.parametrize(
    "kind, length",
    [
        ("packed", 150),
        ("each", 70),
        ("shuffled", 100),
        ("none", 65),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("packed", 31), ("one", 96))),
    ],
)
def test_equals_the_plain_attention(small_blocks, kind, length):
    arguments = case(kind, length)
    expected = values_and_gradients(arguments, "plain")
    for a, b in zip(values_and_gradients(arguments, "triton"), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_bfloat16_sums_in_float32():
    arguments = case("packed", 200, dtype=jnp.bfloat16, batch=1)
    wide = [a.astype(jnp.float32) for a in arguments[:3]]
    expected = values_and_gradients((*wide, arguments[3]), "plain")
    for a, b in zip(values_and_gradients(arguments, "triton"), expected, strict=True):
        # bfloat16 has 8 bits: inputs, weights and outputs are rounded once each
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 1e-2


def test_blocks_of_other_pieces_are_not_read(small_blocks):
    """Of 4 pieces of 64, a block of 32 queries reads at most 4 blocks of 16 keys, of one piece."""
    ids = jnp.repeat(jnp.arange(4), 64)[None]
    forward = np.asarray(gpu._key_ranges(ids, gpu.ATTENTION_FORWARD))[0]
    blocks = np.arange(8) // 2 * 4  # where a query's piece begins
    np.testing.assert_array_equal(forward, np.stack([blocks, blocks], -1))
    backward = np.asarray(gpu._query_ranges(ids, gpu.ATTENTION_FORWARD))[0]
    np.testing.assert_array_equal(backward, np.stack([blocks + 4, blocks + 4], -1))


def test_a_block_with_two_pieces_compares_ids():
    ids = jnp.repeat(jnp.arange(2), jnp.array([40, 88]), total_repeat_length=128)[None]
    blocks = gpu._Blocks(32, 16, 4, 2)
    # the third block of keys, 32 to 47, has both
    assert gpu._key_ranges(ids, blocks)[0].tolist() == [[0, 0], [0, 2], [2, 3], [2, 3]]
    assert gpu._query_ranges(ids, blocks)[0].tolist() == [[2, 3], [4, 8], [8, 8], [8, 8]]


def test_cut_over_a_mesh(small_blocks):
    arguments = case("packed", 64)
    expected = values_and_gradients(arguments, "plain")
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])):
        found = values_and_gradients(arguments, "triton")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_width_that_triton_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="heads of 24"):
        values_and_gradients(case("one", 32, width=24), "triton")


def attending(monkeypatch, platform: str, *, packed_rows: bool, **compute):
    """The traced gradient of two layers as that platform computes it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    for module in (kernels, gpu, packed):
        monkeypatch.setattr(module, "platform", lambda: platform)
    monkeypatch.setattr(packed, "fits_chip", lambda: packed_rows)
    monkeypatch.setattr(packed, "_matrix_unit", lambda: 128)
    config = ModelConfig(d_model=128, n_heads=2, n_layers=2, max_seq_len=128, vocab_size=64)
    compute = ComputeConfig(dtype="bfloat16", **compute)
    merge, params = split_model(abstract_model(config, compute))

    def loss(params, tokens):
        ids = tokens if packed_rows else None
        return merge(params)(tokens, segment_ids=ids).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((1, 128), jnp.int32))


def live_calls(jaxpr, name: str) -> int:
    """Kernels of that name whose results are used: XLA drops others, tracing cannot."""
    found = 0
    for eqn in jaxpr.eqns:
        used = {id(v) for other in jaxpr.eqns for v in other.invars} | {*map(id, jaxpr.outvars)}
        own = eqn.params.get("name") or eqn.primitive.name
        found += own == name and any(id(out) in used for out in eqn.outvars)
        found += sum(live_calls(inner, name) for inner in jax.core.jaxprs_in_params(eqn.params))
    return found


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "platform, packed_rows, kernel",
    [
        ("gpu", False, "dot_product_attention_fwd_wrapper"),
        ("gpu", True, "segment_attention"),
        ("tpu", True, "rotary_attention"),
        ("tpu", False, "splash_mha_fwd_residuals"),
    ],
)
def test_remat_dots_attends_once_for_each_layer(monkeypatch, platform, packed_rows, kernel, scan):
    """Of two layers; everything else of them but matrix products is computed again."""

    def calls(remat: str) -> int:
        options = dict(packed_rows=packed_rows, remat=remat, scan_layers=scan)
        return live_calls(attending(monkeypatch, platform, **options).jaxpr.jaxpr, kernel)

    layers = 1 if scan else 2
    assert (calls("dots"), calls("full")) == (layers, 2 * layers)


def test_on_gpus_rotated_queries_and_keys_are_kept_and_not_made_again(monkeypatch):
    """Of each of two layers, either is one concatenation of two halves."""

    def rotations(remat: str) -> int:
        options = dict(packed_rows=False, remat=remat, scan_layers=False)
        return live_calls(attending(monkeypatch, "gpu", **options).jaxpr.jaxpr, "concatenate")

    assert rotations("full") - rotations("dots") == 2 * 2


def test_a_program_for_gpus_calls_cudnn_once_for_each_layer(monkeypatch):
    traced = attending(monkeypatch, "gpu", packed_rows=False, remat="dots", scan_layers=False)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$\w+", text)
    assert sorted(calls) == ["__cudnn$fmhaSoftmax"] * 2 + ["__cudnn$fmhaSoftmaxBackward"] * 2


@pytest.mark.aot_gpu
@pytest.mark.parametrize("device", ["a100", "l4", "h100", "b200"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_no_gpu_spills_registers_or_leaves_tensor_cores_idle(device, width):
    """sm_80, sm_89, sm_90a, sm_100a."""
    from aria_jax.aot.gpu import compile_for_gpus

    rows = jax.ShapeDtypeStruct((1, 512, 2, width), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(q, k, v, ids):
        out = attention(q, k, v, segment_ids=ids)
        return out.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    made = compile_for_gpus(gradients, rows, rows, rows, ids, topology=f"{device}:1")
    found = [kernel for kernel in made.kernels if kernel.name.startswith("segment_attention")]
    assert len(found) == 3
    for kernel in found:
        assert not kernel.spills and kernel.tensor_core, kernel
