"""The chunked loss against the plain one: value, gradients, memory; and that of classes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.config import MeshConfig
from aria_jax.losses import cross_entropy
from aria_jax.losses.cross_entropy import classification_loss, next_token_loss, token_nll
from aria_jax.sharding import make_mesh


def case(batch=4, length=12, d=8, vocab=29):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, d))
    head = jax.random.normal(keys[1], (d, vocab))
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    return hidden, head, targets, jax.random.bernoulli(keys[3], 0.7, (batch, length))


def plain(hidden, head, targets, mask, z_loss=0.0):
    logits = hidden @ head
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return ((nll + z_loss * log_z**2) * mask).sum() / mask.sum()


def check(found, expected):
    # float32 sums in another order
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for actual, desired in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [7, 16, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_the_plain_loss(chunk, z_loss):
    hidden, head, targets, mask = case()

    def actual(hidden, head):
        # the factor: a cotangent other than one
        loss = next_token_loss(hidden, head, targets, mask, z_loss=z_loss, chunk_tokens=chunk)[0]
        return 3 * loss

    wanted = jax.value_and_grad(
        lambda hidden, head: 3 * plain(hidden, head, targets, mask, z_loss), (0, 1)
    )
    expected = jax.jit(wanted)(hidden, head)
    check(jax.jit(jax.value_and_grad(actual, (0, 1)))(hidden, head), expected)
    alone = jax.jit(actual)(hidden, head)  # without gradients
    assert alone == pytest.approx(float(expected[0]), rel=1e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 4, 2, 1), (1, 2, 4, 1), (1, 2, 2, 2)])
def test_cut_over_a_mesh_with_a_vocabulary_that_does_not_divide(sizes):
    hidden, head, targets, mask = case(batch=8)

    def loss(hidden, head):
        return next_token_loss(hidden, head, targets, mask, z_loss=1e-2, chunk_tokens=5)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, aux), grads = grad(hidden, head)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[:8])):
        (cut_value, cut_aux), cut_grads = grad(hidden, head)
        only_value, _ = jax.jit(loss)(hidden, head)
    check((cut_value, cut_grads), (value, grads))
    assert only_value == pytest.approx(float(value), rel=1e-6)
    assert cut_aux["accuracy"] == pytest.approx(float(aux["accuracy"]))


@pytest.mark.parametrize("sizes", [None, (1, 2, 4, 1)])
def test_columns_that_align_the_head_on_a_gpu_have_no_probability(monkeypatch, sizes):
    hidden, head, targets, mask = case(batch=8)
    monkeypatch.setattr(cross_entropy, "platform", lambda: "gpu")

    def loss(hidden, head):
        return next_token_loss(hidden, head, targets, mask)[0]

    grad, without = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(loss)
    wanted = jax.value_and_grad(lambda *z: plain(*z, targets, mask), (0, 1))
    expected = jax.jit(wanted)(hidden, head)
    mesh = make_mesh(MeshConfig(*(sizes or (1, 1, 1, 1))), jax.devices()[: np.prod(sizes or 1)])
    with jax.set_mesh(mesh):
        check(grad(hidden, head), expected)
        assert without(hidden, head) == pytest.approx(float(expected[0]), rel=1e-6)
        widths = re.findall(
            r"f32\[8,(\d+)\] = dot_general", str(jax.make_jaxpr(grad)(hidden, head))
        )
    assert widths and {int(width) % 128 for width in widths} == {0}


def test_counts_and_accuracy():
    hidden, head, targets, mask = case()
    best = (hidden @ head).argmax(-1)
    targets = jnp.where(jnp.arange(12) % 3 == 0, best, (best + 1) % 29)
    _, aux = next_token_loss(hidden, head, targets, mask, chunk_tokens=5)
    assert aux["n_tokens"] == mask.sum()
    expected = (mask & (targets == best)).sum() / mask.sum()
    assert aux["accuracy"] == pytest.approx(expected)


def test_never_holds_the_logits_of_the_batch():
    tokens, vocab = 4096, 2048
    hidden = jax.ShapeDtypeStruct((4, tokens // 4, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((8, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)

    def loss(hidden, head, targets):
        return next_token_loss(hidden, head, targets, targets >= 0, chunk_tokens=128)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 4


def test_bfloat16_sums_in_float32():
    hidden, head, targets, mask = case(length=64, vocab=500)
    half = hidden.astype(jnp.bfloat16)
    loss = jax.value_and_grad(
        lambda hidden, head: next_token_loss(hidden, head, targets, mask)[0], (0, 1)
    )
    value, grads = jax.jit(loss)(half, head)
    rounded = half.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32)
    wanted = jax.value_and_grad(lambda hidden, head: plain(hidden, head, targets, mask), (0, 1))
    plain_value, expected = jax.jit(wanted)(*rounded)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for actual, desired in zip(grads, expected, strict=True):  # rounded once to 8 bits
        scale = np.abs(desired).max()
        np.testing.assert_allclose(
            actual.astype(jnp.float32), desired, rtol=2e-2, atol=4e-3 * scale
        )


@pytest.mark.parametrize("chunk", [7, 1024])
def test_likelihood_of_each_token(chunk):
    hidden, head, targets, _ = case()
    nll, log_z = token_nll(hidden.reshape(-1, 8), head, targets.reshape(-1), chunk)
    logits = (hidden @ head).reshape(-1, 29)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets.reshape(-1, 1), 1)[:, 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_z, jax.nn.logsumexp(logits, -1), rtol=1e-6)


def test_a_fully_masked_batch_is_zero_not_nan():
    hidden, head = jnp.ones((1, 4, 8)), jnp.ones((8, 5))
    targets, mask = jnp.zeros((1, 4), int), jnp.zeros((1, 4), bool)
    (loss, aux), grads = jax.value_and_grad(next_token_loss, (0, 1), has_aux=True)(
        hidden, head, targets, mask
    )
    assert loss == 0 and aux["n_tokens"] == 0
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def test_that_of_classes_equals_the_definition():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    loss, aux = classification_loss(logits, jnp.array([0, 2]))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert loss == pytest.approx(-(np.log(p[0, 0]) + np.log(p[1, 2])) / 2, rel=1e-6)
    assert aux["accuracy"] == 0.5


def test_masked_rows_of_classes_count_for_nothing():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 3, 1, 0, 0])
    mask = jnp.array([True, True, True, False, False])
    masked, aux = classification_loss(logits, labels, mask)
    expected, expected_aux = classification_loss(logits[:3], labels[:3])
    assert masked == pytest.approx(float(expected), rel=1e-6)
    assert aux["accuracy"] == pytest.approx(float(expected_aux["accuracy"]))
    grad = jax.jit(jax.grad(lambda logits: classification_loss(logits, labels, mask)[0]))(logits)
    assert np.all(np.asarray(grad[3:]) == 0)
