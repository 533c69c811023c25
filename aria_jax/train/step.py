"""The compiled training and evaluation steps: pure functions of parameters, state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aria_jax.models.heads import Model, Parameters
from aria_jax.train.tasks import Batch, LossFunction

Metrics = dict[str, jax.Array]


def make_train_step(
    merge: Callable[[Parameters], Model],
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int,
    dropout: bool,
):
    """(params, opt_state, batch, step) -> (params, opt_state, metrics); donates the first two.

    A step whose loss or gradient is not finite changes nothing and reports `skipped` = 1.
    """

    def loss_of(params: Parameters, batch: Batch, key: jax.Array | None):
        return loss(merge(params), batch, key)

    def gradients(params: Parameters, batch: Batch, key: jax.Array | None):
        if accumulation == 1:
            return jax.value_and_grad(loss_of, has_aux=True)(params, batch, key)
        # Row i goes to micro-batch i % accumulation, so that each stays spread over the mesh.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
        )

        def add(total, part):
            rows, i = part
            part_key = None if key is None else jax.random.fold_in(key, i)
            one = jax.value_and_grad(loss_of, has_aux=True)(params, rows, part_key)
            return jax.tree.map(jnp.add, total, one), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(jax.value_and_grad(loss_of, has_aux=True), params, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (micro, jnp.arange(accumulation)))
        (value, aux), grads = jax.tree.map(lambda x: x / accumulation, total)
        return (value, {**aux, "n_tokens": aux["n_tokens"] * accumulation}), grads

    def train_step(params: Parameters, opt_state: Any, batch: Batch, step: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), step) if dropout else None
        (value, aux), grads = gradients(params, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, new_state = optimizer.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)

        def kept(new, old):
            return jnp.where(finite, new, old)

        metrics = {"loss": value, **aux, "grad_norm": norm, "skipped": 1.0 - finite}
        return (
            jax.tree.map(kept, new_params, params),
            jax.tree.map(kept, new_state, opt_state),
            metrics,
        )

    return jax.jit(train_step, donate_argnums=(0, 1))


def make_eval_step(merge: Callable[[Parameters], Model], loss: LossFunction):
    """(params, batch) -> metrics, without dropout."""

    def eval_step(params: Parameters, batch: Batch) -> Metrics:
        value, aux = loss(merge(params), batch, None)
        return {"loss": value, **aux}

    return jax.jit(eval_step)
