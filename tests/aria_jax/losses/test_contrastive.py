"""The contrastive loss: the reference's values, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.losses.contrastive import contrastive_loss


def value(z1, z2, **options):
    return contrastive_loss(z1, z2, **options)[0]


@pytest.mark.parametrize("temperature", ["0.5", "0.1", "0.05"])
def test_value_and_gradients_are_the_references(golden, temperature):
    case = np.load(golden / "loss.npz")
    found, grads = jax.value_and_grad(value, (0, 1))(
        case["z1"], case["z2"], temperature=float(temperature)
    )
    np.testing.assert_allclose(found, case[f"loss_{temperature}"], rtol=1e-5)
    for ours, name in zip(grads, ("dz1", "dz2"), strict=True):
        theirs = case[f"{name}_{temperature}"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


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
