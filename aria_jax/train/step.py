"""The compiled training and evaluation steps: pure functions of state, batch and step number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aria_jax.config import RunConfig
from aria_jax.models.heads import Model, Parameters
from aria_jax.train.optimizer import build_optimizer, learning_rate, updates_done
from aria_jax.train.tasks import Batch, LossFunction

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
        params: float32 weights.
        opt_state: of `build_optimizer`.
        ema: moving average of the weights; None unless `optimizer.ema_decay` is set.
    """

    params: Parameters
    opt_state: Any
    ema: Parameters | None = None

    @property
    def best_params(self) -> Parameters:
        """The weights to evaluate and export."""
        return self.params if self.ema is None else self.ema


def new_state(config: RunConfig, params: Parameters) -> TrainState:
    """The state of a run that has these weights and has done no step (traceable)."""
    opt_state = build_optimizer(config.optimizer, config.train.steps).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay is not None else None
    return TrainState(params, opt_state, ema)


def make_train_step(
    config: RunConfig, merge: Callable[[Parameters], Model], loss: LossFunction
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """(state, batch, step) -> (state, metrics), compiled; the state given is donated.

    A step whose loss or gradient is not finite changes nothing and reports `skipped` = 1. With
    `train.grad_accumulation` parts, each part counts by its `weight`, so that the result is that
    of the whole batch at once.
    """
    accumulation = config.train.grad_accumulation
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    schedule = learning_rate(config.optimizer, config.train.steps)

    def weighted_loss(params: Parameters, batch: Batch, key: jax.Array | None):
        value, aux = loss(merge(params), batch, key)
        weight = aux["weight"]
        # Counts are summed, means are weighted: dividing by the sum of weights makes both right.
        means = {n: v * weight for n, v in aux.items() if n not in ("n_tokens", "weight")}
        return value * weight, (
            {"loss": value * weight, **means},
            {"n_tokens": aux["n_tokens"], "weight": weight},
        )

    def gradients(params: Parameters, batch: Batch, key: jax.Array | None):
        grad = jax.value_and_grad(weighted_loss, has_aux=True)
        if accumulation == 1:
            (_, aux), grads = grad(params, batch, key)
            return aux, grads
        # Row i goes to micro-batch i % accumulation, so that each stays spread over the mesh.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
        )

        def add(total, part):
            rows, i = part
            part_key = None if key is None else jax.random.fold_in(key, i)
            (_, aux), grads = grad(params, rows, part_key)
            return jax.tree.map(jnp.add, total, (aux, grads)), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(grad, params, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][1], shapes[1]))
        return jax.lax.scan(add, zeros, (micro, jnp.arange(accumulation)))[0]

    def train_step(state: TrainState, batch: Batch, step: jax.Array):
        dropout = config.model.resid_dropout > 0
        key = jax.random.fold_in(jax.random.key(config.train.seed), step) if dropout else None
        (means, counts), grads = gradients(state.params, batch, key)
        total = jnp.maximum(counts["weight"], 1e-9)
        means, grads = jax.tree.map(lambda x: (x / total).astype(x.dtype), (means, grads))
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norm)
        rate = schedule(updates_done(state.opt_state))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = TrainState(params, opt_state, _averaged(config, state.ema, params))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
        metrics = {**means, "n_tokens": counts["n_tokens"], "grad_norm": norm}
        return kept, {**metrics, "learning_rate": rate, "skipped": 1.0 - finite}

    return jax.jit(train_step, donate_argnums=0)


def _averaged(config: RunConfig, ema: Parameters | None, params: Parameters) -> Parameters | None:
    if ema is None:
        return None
    decay = config.optimizer.ema_decay
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def make_eval_step(merge: Callable[[Parameters], Model], loss: LossFunction):
    """(params, batch) -> metrics of the batch, `weight` among them; compiled, without dropout."""

    def eval_step(params: Parameters, batch: Batch) -> Metrics:
        value, aux = loss(merge(params), batch, None)
        return {"loss": value, **aux}

    return jax.jit(eval_step)
