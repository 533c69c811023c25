"""Every kernel of attention against the plain one: values and gradients."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.config import MeshConfig
from aria_jax.kernels import attention as kernels
from aria_jax.kernels.attention import attention, blockwise, causal_mask
from aria_jax.sharding import make_mesh


def case(batch, length, heads=2, width=8, segments=False, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, length, heads, width)), dtype) for _ in "qkv")
    ids = None
    if segments:  # of unequal lengths, the last one padding
        cuts = np.sort(rng.integers(0, length, (batch, 3)), axis=1)
        ids = jnp.asarray((np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1), jnp.int32)
    return q, k, v, ids


def values_and_gradients(q, k, v, segment_ids, implementation):
    weights = jnp.cos(jnp.arange(q.size).reshape(q.shape))

    def scalar(q, k, v):
        if callable(implementation):
            out = implementation(q, k, v, segment_ids)
        else:
            out = attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def check(arguments, implementation, tolerance=2e-5):
    expected = values_and_gradients(*arguments, "plain")
    for actual, desired in zip(
        values_and_gradients(*arguments, implementation), expected, strict=True
    ):
        # float32 sums in another order
        np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)


def test_the_mask_of_two_segments():
    mask = causal_mask(4, jnp.array([[1, 1, 2, 2]]))[0].astype(int)
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("length, kv_lens", [(1, 8), (8, 8), (20, 8), (33, 8), (33, 2), (64, 4)])
def test_blockwise(length, kv_lens, segments):
    check(
        case(3, length, segments=segments),
        partial(blockwise, tile=8, max_kv_lens=kv_lens),
    )


@pytest.mark.parametrize("at_once", [1, 8 * 20 * 3])
def test_blockwise_takes_few_rows_together(at_once):
    check(case(3, 20, segments=True), partial(blockwise, tile=8, scores_at_once=at_once))


def test_blockwise_never_holds_the_scores_of_a_head():
    q = jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)

    def scalar(q, k, v):
        return attention(q, k, v, implementation="blockwise").sum()

    compiled = jax.jit(jax.grad(scalar, (0, 1, 2))).lower(q, q, q).compile()
    scores_of_one_head = 8192**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores_of_one_head / 2


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("length", [128, 300])
def test_splash(length, segments):
    check(case(2, length, segments=segments), "splash")


@pytest.mark.parametrize("implementation", ["blockwise", "splash"])
def test_bfloat16_sums_in_float32(implementation):
    arguments = case(1, 256, segments=True, dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in arguments[:3]]
    out = attention(*arguments[:3], segment_ids=arguments[3], implementation=implementation)
    expected = attention(*wide, segment_ids=arguments[3], implementation="plain")
    # bfloat16 has 8 bits: weights, values and output are rounded once each
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "implementation, sizes",
    [("blockwise", (2, 1, 2, 2)), ("splash", (1, 2, 2, 2)), ("splash", (2, 1, 1, 4))],
)
def test_cut_over_a_mesh(implementation, sizes):
    arguments = case(2, 256, segments=True)
    expected = values_and_gradients(*arguments, "plain")
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    with jax.set_mesh(mesh):
        found = values_and_gradients(*arguments, implementation)
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "platform, dtype, length, segments, expected",
    [
        ("cpu", jnp.float32, 512, False, "blockwise"),
        ("tpu", jnp.bfloat16, 512, True, "splash"),
        ("tpu", jnp.bfloat16, 64, True, "blockwise"),
        ("gpu", jnp.bfloat16, 512, False, "cudnn"),
        ("gpu", jnp.bfloat16, 512, True, "triton"),
        ("gpu", jnp.float32, 512, False, "blockwise"),
    ],
)
def test_automatic_choice(monkeypatch, platform, dtype, length, segments, expected):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    q, _, _, ids = case(1, length, width=16, segments=segments, dtype=dtype)
    assert kernels.automatic(q, ids) == expected


@pytest.mark.parametrize("segments", [False, True])
def test_cudnn_becomes_one_call_forward_and_one_backward(monkeypatch, segments):
    """What can be shown without a GPU: the program that one would run."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    arguments = case(2, 128, width=64, segments=segments, dtype=jnp.bfloat16)

    def step(q, k, v):
        return jax.grad(
            lambda q: attention(q, k, v, segment_ids=arguments[3], implementation="cudnn").sum()
        )(q)

    program = jax.jit(step).trace(*arguments[:3]).lower(lowering_platforms=("cuda",)).as_text()
    name = "__cudnn$fmhaScaleBiasSoftmax" if segments else "__cudnn$fmhaSoftmax"
    assert re.findall(r"__cudnn\$\w+", program) == [name, f"{name}Backward"]
