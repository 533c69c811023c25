"""The chunked loss against the plain one, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.losses.language_model import next_token_loss


def plain(hidden, head, targets, mask, z_loss):
    logits = hidden @ head
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return ((nll + z_loss * log_z**2) * mask).sum() / mask.sum()


@pytest.mark.parametrize("chunk", [7, 16, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_the_plain_loss(chunk, z_loss):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 11, 8))
    head = jax.random.normal(keys[1], (8, 29))
    targets = jax.random.randint(keys[2], (3, 11), 0, 29)
    mask = jax.random.bernoulli(keys[3], 0.7, (3, 11))

    def ours(hidden, head):
        return next_token_loss(hidden, head, targets, mask, z_loss=z_loss, chunk_tokens=chunk)[0]

    value, grads = jax.value_and_grad(ours, (0, 1))(hidden, head)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(
        hidden, head, targets, mask, z_loss
    )
    # float32 sums in another order
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours_, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-5, atol=1e-6)


def test_a_fully_masked_batch_is_zero_not_nan():
    hidden, head = jnp.ones((1, 4, 8)), jnp.ones((8, 5))
    targets, mask = jnp.zeros((1, 4), int), jnp.zeros((1, 4), bool)
    loss, aux = next_token_loss(hidden, head, targets, mask)
    assert loss == 0 and aux["n_tokens"] == 0
