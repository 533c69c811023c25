"""Gradients of a loss over more embeddings than fit into memory with their activations.

Gradient caching (Gao et al. 2021): embed all micro-batches and keep only the embeddings; take the
loss and its gradient with respect to them; then embed every micro-batch again and pull its part of
that gradient back to the parameters. One more forward pass buys memory of one micro-batch, and the
result is that of one pass over the whole batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def grad_cache(
    embed: Callable[[Tree, Tree], jax.Array],
    loss: Callable[[Tree, jax.Array], tuple[jax.Array, Tree]],
    params: Tree,
    micro_batches: Tree,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """As `jax.value_and_grad(..., has_aux=True)` of the loss of all embeddings at once.

    Args:
        embed: (params, micro-batch) -> embeddings [b, ...]; it must compute the same when it is
            called again, so dropout keys belong into the micro-batch.
        loss: (params, embeddings [m, b, ...]) -> (loss, aux); `params` for a learned temperature.
        micro_batches: arrays with leading axis m.

    Returns:
        ((loss, aux), gradient with respect to `params`).
    """
    embeddings = jax.lax.map(lambda batch: embed(params, batch), micro_batches)
    value, (own, cotangents) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, embeddings)

    def replay(total: Tree, part: tuple[Tree, jax.Array]):
        batch, cotangent = part
        _, pull_back = jax.vjp(lambda p: embed(p, batch), params)
        return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

    grads, _ = jax.lax.scan(replay, own, (micro_batches, cotangents))
    return value, grads
