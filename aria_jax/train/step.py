"""The compiled training and evaluation steps: pure functions of state, batch and step number."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aria_jax.config import RunConfig
from aria_jax.losses.contrastive import grad_cache
from aria_jax.models.heads import Model
from aria_jax.models.parameters import Parameters
from aria_jax.sharding import constrain
from aria_jax.train.optimizer import build_optimizer, learning_rate, updates_done
from aria_jax.train.tasks import (
    Aux,
    Batch,
    BatchLoss,
    LossFunction,
    Predictions,
    join_microbatches,
    split_microbatches,
)

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
        params: float32 weights.
        opt_state: of `build_optimizer`.
        ema: moving average of the weights; None unless `optimizer.ema_decay` is set.
        frozen: weights that a step does not change; none unless `params` are adapters of them.
    """

    params: Parameters
    opt_state: Any
    ema: Parameters | None = None
    frozen: Parameters = field(default_factory=dict)

    @property
    def eval_params(self) -> Parameters:
        """The weights to evaluate and export."""
        return self.params if self.ema is None else self.ema


TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], tuple[Metrics, dict[str, jax.Array]]]


Build = Callable[[Parameters, Parameters], Model]
"""(what is trained, what is frozen) -> the model they make; traceable."""


def new_state(config: RunConfig, params: Parameters, frozen: Parameters) -> TrainState:
    """The state of a run that has these weights and has done no step (traceable)."""
    opt_state = build_optimizer(config.optimizer, config.train.steps).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay is not None else None
    return TrainState(params, opt_state, ema, frozen)


def make_train_step(config: RunConfig, build: Build, loss: LossFunction) -> TrainStep:
    """(state, batch, step) -> (state, metrics), compiled; the state given is donated.

    A step whose loss or gradient is not finite changes nothing and reports `skipped` = 1. With
    `train.grad_accumulation` parts, each part counts by its `weight`, or a `BatchLoss` is taken of
    the embeddings of all parts: either way the result is that of the whole batch at once.
    """
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    schedule = learning_rate(config.optimizer, config.train.steps)

    def train_step(state: TrainState, batch: Batch, step: jax.Array):
        def merge(params: Parameters) -> Model:
            return build(params, state.frozen)

        gradients = weighted_gradients(config.train.grad_accumulation, merge, loss)
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
        changed = (params, opt_state, _averaged(config, state.ema, params))
        before = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), changed, before
        )
        metrics = {**means, "n_tokens": counts["n_tokens"], "grad_norm": norm}
        metrics |= {"learning_rate": rate, "skipped": 1.0 - finite}
        return TrainState(params, opt_state, ema, state.frozen), metrics

    return jax.jit(train_step, donate_argnums=0)


Gradients = Callable[
    [Parameters, Batch, jax.Array | None], tuple[tuple[Metrics, Metrics], Parameters]
]
"""(params, batch, key) -> ((means times weight, counts), gradient times weight).

Dividing by the sum of weights makes both right, whatever the parts of a batch held.
"""


def weighted_gradients(
    parts: int, merge: Callable[[Parameters], Model], loss: LossFunction
) -> Gradients:
    """How a step differentiates `loss`, computing a batch in so many parts."""
    if parts > 1 and isinstance(loss, BatchLoss):
        return _cached(parts, merge, loss)

    def weighted_loss(params: Parameters, batch: Batch, key: jax.Array | None):
        return _weighted(*loss(merge(params), batch, key))

    grad = jax.value_and_grad(weighted_loss, has_aux=True)

    def one_part(params: Parameters, batch: Batch, key: jax.Array | None):
        (_, aux), grads = grad(params, batch, key)
        return aux, grads

    return one_part if parts == 1 else _accumulated(parts, one_part)


def _accumulated(parts: int, one_part: Gradients) -> Gradients:
    """Sums over parts."""

    def gradients(params: Parameters, batch: Batch, key: jax.Array | None):
        rows = split_microbatches(batch, parts)

        def add(total, part):
            rows, i = part
            part_key = None if key is None else jax.random.fold_in(key, i)
            return jax.tree.map(jnp.add, total, one_part(params, rows, part_key)), None

        shapes = jax.eval_shape(one_part, params, jax.tree.map(lambda x: x[0], rows), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (rows, jnp.arange(parts)))[0]

    return gradients


def _cached(parts: int, merge: Callable[[Parameters], Model], loss: BatchLoss) -> Gradients:
    """Of all rows at once, holding the activations of one part."""

    def embed(params: Parameters, part: tuple[Batch, jax.Array | None]) -> jax.Array:
        return loss.embed(merge(params), *part)

    def gradients(params: Parameters, batch: Batch, key: jax.Array | None):
        def compare(params: Parameters, z: jax.Array):
            return _weighted(*loss.compare(merge(params), join_microbatches(z), batch))

        keys = None if key is None else jax.random.split(key, parts)
        (_, aux), grads = grad_cache(
            embed, compare, params, (split_microbatches(batch, parts), keys)
        )
        return aux, grads

    return gradients


def _weighted(value: jax.Array, aux: Aux):
    """Loss times its weight, and ({name: mean times weight}, {name: count})."""
    weight = aux["weight"]
    counts = {"n_tokens": aux["n_tokens"], "weight": weight}
    means = {name: v * weight for name, v in aux.items() if name not in counts}
    return value * weight, ({"loss": value * weight, **means}, counts)


def _averaged(config: RunConfig, ema: Parameters | None, params: Parameters) -> Parameters | None:
    decay = config.optimizer.ema_decay
    if ema is None or decay is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def make_eval_step(
    build: Build, loss: LossFunction, predictions: Predictions | None = None
) -> EvalStep:
    """(state, batch) -> metrics of the batch, `weight` among them, and the predictions of its rows,
    whole on every device; compiled, without dropout.
    """

    def eval_step(state: TrainState, batch: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        model = build(state.eval_params, state.frozen)
        value, aux = loss(model, batch, None)
        rows = {} if predictions is None else predictions(model, batch)
        rows = {name: constrain(x, *(None,) * x.ndim) for name, x in rows.items()}
        return {"loss": value, **aux}, rows

    return jax.jit(eval_step)
