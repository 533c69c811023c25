"""The contrastive loss: the reference's values, and its invariances."""

import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.config import MeshConfig
from aria_jax.losses.contrastive import contrastive_loss, grad_cache
from aria_jax.sharding import batch_sharding, make_mesh
from tests.marks import slow_among

compiled_loss = jax.jit(
    contrastive_loss,
    static_argnames=("variant", "hardness", "implementation", "mesh", "global_negatives"),
)


def value(z1, z2, **options):
    return compiled_loss(z1, z2, **options)[0]


@pytest.mark.parametrize("temperature", ["0.5", "0.1", "0.05"])
def test_value_and_gradients_are_the_references(golden, temperature):
    case = np.load(golden / "loss.npz")
    found, grads = jax.jit(jax.value_and_grad(value, (0, 1)))(
        case["z1"], case["z2"], temperature=float(temperature)
    )
    np.testing.assert_allclose(found, case[f"loss_{temperature}"], rtol=1e-5)
    for actual, name in zip(grads, ("dz1", "dz2"), strict=True):
        desired = case[f"{name}_{temperature}"]
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-5 * np.abs(desired).max())


@pytest.fixture
def views():
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (6, 8)), jax.random.normal(keys[1], (6, 8))


def test_equals_the_definition(views):
    z1, z2 = (np.asarray(z, np.float64) for z in views)
    z1, z2 = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2))
    logits = z1 @ z2.T / 0.2
    rows = -np.log(np.exp(np.diag(logits)) / np.exp(logits).sum(1)).mean()
    columns = -np.log(np.exp(np.diag(logits)) / np.exp(logits).sum(0)).mean()
    assert value(*views, temperature=0.2) == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_scale_and_order_of_pairs_do_not_matter(views):
    z1, z2 = views
    order = jnp.array([3, 1, 5, 0, 2, 4])
    expected = float(value(z1, z2, temperature=0.1))
    assert value(z1 * 7, z2 / 3, temperature=0.1) == pytest.approx(expected, rel=1e-5)
    assert value(z1[order], z2[order], temperature=0.1) == pytest.approx(expected, rel=1e-5)


def test_performances_of_one_composition_are_no_negatives(views):
    z1, z2 = views
    twins = jnp.array([0, 0, 1, 2, 3, 4])
    masked = float(value(z1, z2, temperature=0.1, composition=twins))
    # Moving the twin's embedding changes nothing for row 0 once it is no negative of it.
    logits = (
        np.asarray(z1 / jnp.linalg.norm(z1, axis=1, keepdims=True))
        @ np.asarray(z2 / jnp.linalg.norm(z2, axis=1, keepdims=True)).T
        / 0.1
    )
    logits[0, 1] = logits[1, 0] = -np.inf
    rows = (np.log(np.exp(logits).sum(1)) - np.diag(logits)).mean()
    columns = (np.log(np.exp(logits).sum(0)) - np.diag(logits)).mean()
    assert masked == pytest.approx((rows + columns) / 2, rel=1e-5)


# --- the other variants, against their definitions ---


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def nt_xent(z1, z2, temperature, composition, hardness=0.0):
    """SimCLR over 2B views, with everything written out."""
    z, ids = jnp.concatenate([unit(z1), unit(z2)]), jnp.concatenate([composition] * 2)
    logits = z @ z.T / temperature
    positive = jnp.concatenate([jnp.diagonal(logits, len(z1)), jnp.diagonal(logits, -len(z1))])
    return _weighed_loss(logits, ids[:, None] != ids, positive, hardness)


def symmetric(z1, z2, temperature, composition, hardness=0.0):
    logits = unit(z1) @ unit(z2).T / temperature
    negative = composition[:, None] != composition
    positive = jnp.diagonal(logits)
    one = _weighed_loss(logits, negative, positive, hardness)
    return (one + _weighed_loss(logits.T, negative.T, positive, hardness)) / 2


def _weighed_loss(logits, negative, positive, hardness):
    weights = jnp.where(negative, jnp.exp(hardness * logits), 0)
    weights = weights * negative.sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    total = (weights * jnp.exp(logits)).sum(1) + jnp.exp(positive)
    return (jnp.log(total) - positive).mean()


@pytest.fixture(scope="module")
def pairs():
    keys = jax.random.split(jax.random.key(1), 2)
    z1 = jax.random.normal(keys[0], (16, 12))
    composition = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 13, 3, 0])
    return z1, 0.5 * z1 + jax.random.normal(keys[1], (16, 12)), composition


VARIANTS = {"symmetric": symmetric, "nt-xent": nt_xent}


@pytest.fixture(scope="module")
def definitions(pairs):
    """(variant, hardness) -> value and gradients by its definition."""
    z1, z2, composition = pairs

    @functools.cache
    def of(variant, hardness):
        def desired(z1, z2, temperature):
            return VARIANTS[variant](z1, z2, temperature, composition, hardness)

        return jax.jit(jax.value_and_grad(desired, (0, 1, 2)))(z1, z2, 0.2)

    return of


INTERPRETED = ("tpu-interpret", "gpu-interpret")
EACH_ONCE = {("symmetric", 0.0), ("nt-xent", 0.7)}
CASES = list(itertools.product(["symmetric", "nt-xent"], [0.0, 0.7], ["blockwise", *INTERPRETED]))


@pytest.mark.parametrize(
    "variant, hardness, implementation",
    slow_among(CASES, [c for c in CASES if c[2] in INTERPRETED and c[:2] not in EACH_ONCE]),
)
def test_variants_equal_their_definitions(pairs, definitions, variant, hardness, implementation):
    """Value and gradients of both views and of a learned temperature."""
    z1, z2, composition = pairs

    def actual(z1, z2, temperature):
        return value(
            z1, z2, temperature=temperature, composition=composition, variant=variant,
            hardness=hardness, implementation=implementation,
        )  # fmt: skip

    found = jax.jit(jax.value_and_grad(actual, (0, 1, 2)))(z1, z2, 0.2)
    expected = definitions(variant, hardness)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def _whole_batch(composition, mesh, **options):
    """Compiled: (z1, z2, temperature) -> ((loss, metrics), gradients)."""

    def of(z1, z2, temperature):
        return contrastive_loss(
            z1, z2, temperature=temperature, composition=composition, mesh=mesh, **options
        )

    return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))


@pytest.fixture(scope="module")
def on_one_device(pairs):
    """Options -> what the whole batch gives on one device."""
    z1, z2, composition = pairs
    return functools.cache(
        lambda **options: _whole_batch(composition, None, **options)(z1, z2, 0.2)
    )


@pytest.mark.parametrize(
    "devices,axes",
    [(2, (2, 1)), pytest.param(4, (2, 2), marks=pytest.mark.slow), (8, (4, 2))],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_global_negatives_equal_one_device(pairs, on_one_device, devices, axes, variant):
    """Loss, metrics and gradients of the ring are those of the whole batch on one device."""
    z1, z2, composition = pairs
    mesh = make_mesh(MeshConfig(*axes, 1), jax.devices()[:devices])
    options = {"variant": variant, "hardness": 0.3}
    expected = on_one_device(**options)
    cut = jax.device_put((z1, z2), batch_sharding(mesh))
    found = _whole_batch(composition, mesh, **options)(*cut, 0.2)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_local_negatives_equal_the_mean_over_parts(pairs):
    """What the reference computes: each process on its own, gradients averaged."""
    z1, z2, composition = pairs
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:4])
    local = partial(value, temperature=0.2, hardness=0.3, mesh=mesh, global_negatives=False)
    alone = partial(value, temperature=0.2, hardness=0.3)
    parts = [
        alone(a, b, composition=c)
        for a, b, c in zip(*(np.split(v, 4) for v in (z1, z2, composition)), strict=True)
    ]
    found = float(local(z1, z2, composition=composition))
    assert found == pytest.approx(float(np.mean(parts)), rel=1e-5)
    assert found < float(alone(z1, z2))  # fewer negatives make an easier task


def test_gradient_caching_equals_one_pass(pairs):
    """Any micro-batch size, with a learned temperature among the parameters."""
    z1, z2, composition = pairs
    views = jnp.stack([z1, z2], 1)
    params = {"w": jax.random.normal(jax.random.key(2), (12, 5)), "log_t": jnp.float32(-1.5)}

    def embed(params, views_bx2xD):
        return jnp.tanh(views_bx2xD @ params["w"])

    def loss(params, z):
        z = z.reshape(-1, 2, 5)
        return contrastive_loss(
            z[:, 0], z[:, 1], temperature=jnp.exp(params["log_t"]), composition=composition
        )

    whole = jax.value_and_grad(lambda p: loss(p, embed(p, views)), has_aux=True)
    expected = jax.jit(whole)(params)
    for size in (1, 4, 16):
        found = jax.jit(grad_cache, static_argnums=(0, 1))(
            embed, loss, params, views.reshape(-1, size, 2, 12)
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_filler_rows_count_nowhere(pairs, variant):
    z1, z2, composition = pairs
    options = {"temperature": 0.2, "variant": variant, "hardness": 0.3}
    expected = compiled_loss(z1, z2, composition=composition, **options)
    found = compiled_loss(
        *(jnp.pad(z, ((0, 3), (0, 0)), constant_values=0.3) for z in (z1, z2)),
        composition=jnp.pad(composition, (0, 3), constant_values=-1),
        **options,
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_metrics_say_what_they_claim():
    z = jnp.eye(4)
    _, perfect = contrastive_loss(z, z, temperature=0.1)
    assert perfect["retrieval"] == 1 and perfect["alignment"] == pytest.approx(0, abs=1e-6)
    assert perfect["uniformity"] == pytest.approx(-4, abs=1e-5)  # all at right angles: e^-4
    _, swapped = contrastive_loss(z, z[::-1], temperature=0.1)
    assert swapped["retrieval"] == 0 and swapped["alignment"] == pytest.approx(2, abs=1e-5)
    _, collapsed = contrastive_loss(jnp.ones((4, 4)), jnp.ones((4, 4)), temperature=0.1)
    assert collapsed["retrieval"] == 0 and collapsed["uniformity"] == pytest.approx(0, abs=1e-5)


_PROCESS = """
import sys, json, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from aria_jax.config import MeshConfig
from aria_jax.losses.contrastive import contrastive_loss
from aria_jax.sharding import batch_sharding, make_mesh
mesh = make_mesh(MeshConfig())
rng = np.random.default_rng(0)
whole = rng.normal(size=(2, 16, 12)).astype(np.float32)
def spread(z):
    return jax.make_array_from_callback(z.shape, batch_sharding(mesh), lambda at: z[at])
z1, z2 = map(spread, whole)
loss = lambda z1, z2: contrastive_loss(z1, z2, temperature=0.2, mesh=mesh)[0]
value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(z1, z2)
def mine(g):
    return {str(s.index[0].start or 0): np.asarray(s.data).tolist() for s in g.addressable_shards}
shards = [mine(g) for g in grads]
print(json.dumps([float(value), *shards]))
"""


def test_two_processes_equal_one():
    """Negatives of the other process count, and its gradients come back."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(i), port], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    answers = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        answers.append(json.loads(out.splitlines()[-1]))
    z1, z2 = np.random.default_rng(0).normal(size=(2, 16, 12)).astype(np.float32)
    whole = jax.value_and_grad(lambda z1, z2: value(z1, z2, temperature=0.2), (0, 1))
    expected, grads = jax.jit(whole)(z1, z2)
    for side in (0, 1):
        parts = {int(k): v for answer in answers for k, v in answer[1 + side].items()}
        whole = np.concatenate([parts[k] for k in sorted(parts)])
        np.testing.assert_allclose(whole, grads[side], rtol=1e-4, atol=1e-6)
    assert answers[0][0] == answers[1][0] == pytest.approx(float(expected), rel=1e-5)
