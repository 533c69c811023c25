"""The decoder: ways to compute it agree, segments are separate, dropout ramps up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.losses.cross_entropy import next_token_loss
from aria_jax.models.heads import build_model, split_model
from aria_jax.models.transformer import (
    LayerWeights,
    attn_out_and_mlp,
    project_qkv,
)

CONFIG = ModelConfig(d_model=32, n_heads=4, n_layers=3, max_seq_len=32, vocab_size=61)


def model(config=CONFIG, **compute):
    return build_model(config, ComputeConfig(**compute), rngs=nnx.Rngs(params=0))


def compiled(m):
    """The model as one program, in place of one for each of its operations."""
    merge, params = split_model(m)
    call = jax.jit(lambda params, tokens, inputs: merge(params)(tokens, **inputs))
    return lambda tokens, **inputs: call(params, tokens, inputs)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 24)))


def loss_and_grads(tokens, dropout_key=None, config=CONFIG, **compute):
    merge, params = split_model(model(config, **compute))

    @jax.jit
    def run(params):
        def loss(params):
            m = merge(params)
            hidden = m.hidden(tokens, dropout_key=dropout_key)
            return next_token_loss(hidden, m.head[...], tokens, tokens >= 0)[0]

        return jax.value_and_grad(loss)(params)

    return run(params)


@pytest.fixture(scope="module")
def straight(tokens):
    """Without and with dropout: loss and gradients, nothing computed twice."""

    @functools.cache
    def of(dropout):
        config = dataclasses.replace(CONFIG, resid_dropout=0.3 if dropout else 0.0)
        key = jax.random.key(1) if dropout else None
        return loss_and_grads(tokens, key, config, remat="none")

    return of


@pytest.mark.parametrize(
    "compute, dropout",
    [
        pytest.param({"scan_layers": False}, False, marks=pytest.mark.slow),
        ({"scan_layers": False}, True),
        ({"remat": "dots"}, False),
        ({"remat": "full"}, True),
        pytest.param({"remat": "full", "scan_layers": False}, False, marks=pytest.mark.slow),
        ({"remat": "offload"}, False),
        ({"attention": "plain"}, False),
    ],
    ids=str,
)
def test_ways_to_compute_agree(tokens, straight, compute, dropout):
    config = dataclasses.replace(CONFIG, resid_dropout=0.3 if dropout else 0.0)
    key = jax.random.key(1) if dropout else None
    value, grads = straight(dropout)
    other, other_grads = loss_and_grads(tokens, key, config, **compute)
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    for actual, desired in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        # Entries near zero carry the rounding of the terms they are sums of, up to 0.2.
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_more_is_recomputed_the_less_memory_a_step_takes():
    config = dataclasses.replace(CONFIG, n_layers=8)
    tokens = jnp.zeros((8, 128), jnp.int32)

    def temporaries(policy):
        merge, params = split_model(model(config, remat=policy))
        step = jax.grad(lambda params: merge(params).hidden(tokens).sum())
        return jax.jit(step).lower(params).compile().memory_analysis().temp_size_in_bytes

    full, dots, none = (temporaries(policy) for policy in ("full", "dots", "none"))
    assert full < dots < none and full < none / 2


def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters(tokens):
    value, grads = loss_and_grads(tokens)
    half, half_grads = loss_and_grads(tokens, dtype="bfloat16")
    assert float(half) == pytest.approx(float(value), rel=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_grads)} == {jnp.dtype("float32")}
    for actual, desired in zip(jax.tree.leaves(half_grads), jax.tree.leaves(grads), strict=True):
        similarity = jnp.vdot(actual, desired) / (
            jnp.linalg.norm(actual) * jnp.linalg.norm(desired)
        )
        assert similarity > 0.99


def test_a_packed_segment_is_computed_as_if_alone(tokens):
    m = compiled(model())
    first, second = tokens[:1, :10], tokens[1:, :14]
    packed = jnp.concatenate([first, second], axis=1)
    segments = jnp.array([[1] * 10 + [2] * 14])
    positions = jnp.concatenate([jnp.arange(10), jnp.arange(14)])[None]
    logits = m(packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(logits[:, :10], m(first), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[:, 10:], m(second), rtol=1e-4, atol=1e-5)


def test_the_future_does_not_change_the_past(tokens):
    m = compiled(model())
    changed = tokens.at[:, 12:].set(0)
    np.testing.assert_allclose(m(tokens)[:, :12], m(changed)[:, :12], rtol=1e-5, atol=1e-6)


def test_dropout_ramps_up_from_nothing(tokens):
    """Reference: layer i of n drops with resid_dropout * i / (n - 1)."""
    config = dataclasses.replace(CONFIG, n_layers=1, resid_dropout=0.9)
    single = compiled(model(config))
    np.testing.assert_array_equal(
        single(tokens, dropout_key=jax.random.key(0)), single(tokens)
    )  # the first layer drops nothing
    config = dataclasses.replace(CONFIG, n_layers=2, resid_dropout=0.5)
    double = compiled(model(config))
    assert not np.allclose(double(tokens, dropout_key=jax.random.key(0)), double(tokens))


def test_dropout_drops_the_share_it_is_asked_for_and_keeps_the_mean():
    d = 64
    weights: LayerWeights = {
        "out": jnp.eye(d),
        "gate": jnp.zeros((d, 4 * d)),
        "up": jnp.zeros((d, 4 * d)),
        "down": jnp.zeros((4 * d, d)),
        "norm2_scale": jnp.ones(d),
        "norm2_bias": jnp.zeros(d),
    }
    drop = ((jax.random.key(0), 0.25), None)
    attended = jnp.ones((4, 128, d))
    out = attn_out_and_mlp(weights, jnp.zeros((4, 128, d)), attended, drop)
    assert np.mean(out == 0) == pytest.approx(0.25, abs=0.01)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.02)


def test_queries_keys_and_values_lie_as_the_docstring_says():
    d = 16
    qkv = jax.random.normal(jax.random.key(0), (d, 3, d))
    weights = {"qkv": qkv, "norm1_scale": jnp.zeros(d), "norm1_bias": jnp.arange(d) / d}
    for part, actual in enumerate(project_qkv(weights, jnp.ones((1, 1, d)))):
        np.testing.assert_allclose(
            actual.reshape(d), (jnp.arange(d) / d) @ qkv[:, part], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scan_layers", [pytest.param(True, marks=pytest.mark.slow), False])
def test_reading_one_position_is_the_same_for_less(tokens, scan_layers):
    """Values and gradients of what an embedding needs, with segments and positions of its own."""
    config = dataclasses.replace(CONFIG, n_layers=3, head="embedding", emb_size=8)
    merge, params = split_model(model(config, scan_layers=scan_layers))
    length = tokens.shape[1]
    eos = jnp.array([3, length - 1])
    inputs = {
        "segment_ids": jnp.asarray(np.arange(length)[None] // jnp.array([[2], [9]])),
        "positions": jnp.asarray([np.arange(length), 5 + np.arange(length)]),
    }

    def embed(params, whole):
        if whole:
            return merge(params)(tokens, **inputs)[jnp.arange(2), eos]
        return merge(params).pooled(tokens, eos, **inputs)

    def scalar(params, whole):
        return jnp.sum(jnp.sin(jnp.arange(16).reshape(2, 8)) * embed(params, whole))

    both = [
        jax.jit(jax.value_and_grad(scalar), static_argnums=1).lower(params, whole).compile()
        for whole in (False, True)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),  # order of sums
        *[compiled(params) for compiled in both],
    )
    flops = [compiled.cost_analysis()["flops"] for compiled in both]
    if not scan_layers:
        assert flops[0] < 0.9 * flops[1], "a third of the layers does a fifth of its work"


def test_pooling_reads_the_end_or_averages_up_to_it(tokens):
    config = dataclasses.replace(CONFIG, head="none")
    merge, params = split_model(model(config))
    eos = jnp.array([3, 23])

    @jax.jit
    def run(params):
        m = merge(params)
        return m(tokens), m.pooled(tokens, eos), m.pooled(tokens, eos, "mean")

    hidden, end, mean = run(params)
    np.testing.assert_allclose(end[0], hidden[0, 3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean[0], hidden[0, :4].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_only_full_remat_multiplies_again(tokens):
    flops = {}
    for remat in ("none", "dots", "full"):
        merge, params = split_model(model(remat=remat, scan_layers=False))
        grad = jax.grad(lambda params, merge=merge: merge(params).hidden(tokens).sum())
        flops[remat] = jax.jit(grad).lower(params).compile().cost_analysis()["flops"]
    forward = flops["none"] / 3
    assert flops["dots"] - flops["none"] < forward / 4, "norms, rotation and gating only"
    assert flops["full"] - flops["none"] > forward / 2
