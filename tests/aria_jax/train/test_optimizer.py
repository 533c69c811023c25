"""The reference's optimiser and schedule: 30 steps from its weights on its batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aria_jax.config import OptimizerConfig
from aria_jax.interop.safetensors import import_model
from aria_jax.losses.language_model import next_token_loss
from aria_jax.models.heads import split_model
from aria_jax.train.optimizer import build_optimizer, learning_rate

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


@pytest.mark.parametrize("kind, end", [("linear", 0.1), ("cosine", 0.1), ("constant", 1.0)])
def test_every_schedule_rises_to_the_peak_and_ends_where_it_says(kind, end):
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=5, schedule=kind)
    schedule = learning_rate(config, 50)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(5)) == pytest.approx(1.0)
    assert float(schedule(50)) == pytest.approx(end, rel=1e-5)
