"""The reference's optimiser and schedule: 30 steps from its weights on its batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aria_jax.checkpoints.safetensors import import_model
from aria_jax.config import OptimizerConfig
from aria_jax.losses.cross_entropy import next_token_loss
from aria_jax.models.heads import split_model
from aria_jax.train.step import build_optimizer, learning_rate, updates_done

REFERENCE = OptimizerConfig(peak_lr=3e-4, warmup_steps=10, clip_norm=None)


def test_thirty_steps_of_the_reference(golden):
    case = json.loads((golden / "optim.json").read_text())
    merge, params = split_model(import_model(golden / "model" / "lm.safetensors", n_heads=4))
    inputs, targets = jnp.array(case["input"]), jnp.array(case["target"])
    mask = targets != case["pad_id"]
    optimizer = build_optimizer(REFERENCE, 30)
    schedule = learning_rate(REFERENCE, 30)

    @jax.jit
    def step(params, state):
        def loss_of(params):
            model = merge(params)
            return next_token_loss(model.hidden(inputs), model.head[...], targets, mask)[0]

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    losses = []
    for number, expected in enumerate(case["lr"]):
        assert float(schedule(number)) == pytest.approx(expected, rel=1e-4, abs=1e-12)
        params, state, loss = step(params, state)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, case["loss"], rtol=1e-3)
    assert updates_done(state) == 30


@pytest.mark.parametrize(
    "kind, half, end",
    [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("wsd", 1.0, 0.1), ("constant", 1.0, 1.0)],
)
def test_every_schedule_rises_to_the_peak_and_ends_where_it_says(kind, half, end):
    schedule = learning_rate(OptimizerConfig(peak_lr=1.0, warmup_steps=10, schedule=kind), 110)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(5)) == pytest.approx(0.5, rel=1e-5)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(60)) == pytest.approx(half, rel=1e-5)
    assert float(schedule(110)) == pytest.approx(end, rel=1e-5)
    assert float(schedule(500)) == pytest.approx(end, rel=1e-5)


def test_wsd_falls_over_the_last_fifth_only():
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=0, schedule="wsd", decay_fraction=0.2)
    rates = jax.vmap(learning_rate(config, 100))(jnp.arange(101))
    np.testing.assert_allclose(rates[:81], 1)
    np.testing.assert_allclose(rates[80:], np.linspace(1, 0.1, 21), rtol=1e-5)
