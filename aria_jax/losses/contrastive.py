"""Contrastive losses over the whole global batch, without the matrix of pairs.

Every variant is `softplus(log-sum-exp of the negatives - positive)` per anchor, so all of them
are made of one operation, `pair_statistics`.

Sizes: B pairs, E embedding width.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aria_jax.kernels.contrastive import (
    NEG_INF,
    PADDING_ID,
    Implementation,
    PairSharding,
    merge_lse,
    pair_statistics,
)
from aria_jax.losses import Groups
from aria_jax.sharding import named_sharding
from data_pipeline.errors import UserError, expect_array

UNIFORMITY_ROWS = 1024
"""Rows the uniformity metric is estimated on; it needs all pairs of them."""

Variant = Literal["symmetric", "nt-xent"]
Tree = Any


def contrastive_loss(
    z1_BxE: jax.Array,
    z2_BxE: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    composition: jax.Array | None = None,
    variant: Variant = "symmetric",
    hardness: float = 0.0,
    mesh: Mesh | None = None,
    global_negatives: bool = True,
    implementation: Implementation = "auto",
    groups: Groups | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Each view must find the other view of its piece among those of the other pieces.

    Memory is O(B E), over n devices of a mesh O(B E / n) each; gradients are exact.

    Args:
        z1_BxE, z2_BxE: embeddings of the two views, any scale; float32, or bfloat16 (products are
            then of bfloat16, summed in float32).
        temperature: positive; an array is learned like any parameter.
        composition: int [B]; different performances of one composition are not negatives. A
            negative number marks a padding row, which counts nowhere.
        variant: "symmetric": anchors of one view against the other view (reference:
            symmetric_nt_xent_loss_cosine); "nt-xent": against all 2B - 1 others (SimCLR, Chen et
            al. 2020, equation 1).
        hardness: above 0, negatives weigh exp(hardness * logit), normalised to mean one (Robinson
            et al. 2021, equation 4, without the debiasing term).
        mesh: the batch is sharded over its data axes, and negatives travel round them.
        global_negatives: False compares on each device with the pairs of that device only (the
            reference compares within a process, of one device each).
        groups: of the pairs, to tell their losses apart.

    Returns:
        Loss (float32 scalar), and metrics: "retrieval" (share of anchors more similar to their
        positive than to any negative), "alignment" (mean squared distance of pairs) and
        "uniformity" (log mean Gaussian potential of first views, of at most 1,024 of them; Wang &
        Isola 2020), both on the unit sphere, lower is better; with `groups` also "by_group",
        {"loss": sum over the anchors of each group, halved, "weight": number of its pairs}.

    Raises:
        UserError: no arrays, or of shapes that do not fit together.
    """
    _check(z1_BxE, z2_BxE, temperature, composition)
    unit1, unit2 = _unit(z1_BxE), _unit(z2_BxE)
    ids = jnp.arange(len(unit1)) if composition is None else composition
    ids = jnp.where(ids < 0, PADDING_ID, ids).astype(jnp.int32)
    placement = _placement(mesh, implementation, global_negatives)
    scale = jnp.asarray(1 / temperature, jnp.float32)
    wide1, wide2 = unit1.astype(jnp.float32), unit2.astype(jnp.float32)
    positive_B = scale * jnp.sum(wide1 * wide2, 1)
    negatives, hardest = _negatives(unit1, unit2, ids, scale * (1 + hardness), variant, placement)
    if hardness:
        # The mean weight is one: Σ w e^s / mean w, in logs.
        weights, _ = _negatives(unit1, unit2, ids, scale * hardness, variant, placement)
        number = _number_of_negatives(ids, variant, placement)
        negatives = [
            jnp.where(number > 0, n - w + jnp.log(jnp.maximum(number, 1)), NEG_INF)
            for n, w in zip(negatives, weights, strict=True)
        ]
    valid = (ids != PADDING_ID).astype(jnp.float32)

    def mean(values_B: jax.Array) -> jax.Array:
        return jnp.sum(values_B * valid) / jnp.maximum(valid.sum(), 1)

    def of_views(first_B: jax.Array, second_B: jax.Array) -> jax.Array:
        return (mean(first_B) + mean(second_B)) / 2

    losses = [jax.nn.softplus(n - positive_B) for n in negatives]
    loss = of_views(*losses)
    metrics: dict[str, Any] = {
        "retrieval": of_views(*(positive_B > h / (1 + hardness) for h in hardest)),
        "alignment": mean(jnp.square(wide1 - wide2).sum(1)),
        "uniformity": _uniformity(wide1[:UNIFORMITY_ROWS], valid[:UNIFORMITY_ROWS]),
    }
    if groups is not None:
        metrics["by_group"] = groups.sums((losses[0] + losses[1]) / 2, valid)
    return loss, jax.lax.stop_gradient(metrics)


def _placement(mesh: Mesh | None, implementation: Implementation, ring: bool) -> PairSharding:
    if mesh is None:
        return PairSharding(implementation)
    [axes] = named_sharding(mesh, ("batch",)).spec
    if np.prod([mesh.shape[axis] for axis in axes]) == 1:
        return PairSharding(implementation)
    return PairSharding(implementation, mesh, axes, ring)


def _negatives(
    unit1: jax.Array,
    unit2: jax.Array,
    ids: jax.Array,
    scale: jax.Array,
    variant: Variant,
    placement: PairSharding,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Log-sum-exp over the negatives of each anchor of both views, and the hardest of them."""
    across = pair_statistics(unit1, unit2, ids, ids, scale, placement)
    per_view = [(across.row_lse, across.row_max), (across.column_lse, across.column_max)]
    if variant == "nt-xent":
        for view, unit in enumerate((unit1, unit2)):
            # Within a view the matrix is symmetric: rows say all.
            within = pair_statistics(unit, unit, ids, ids, scale, placement)
            per_view[view] = merge_lse(per_view[view], (within.row_lse, within.row_max))
    lse, maxima = zip(*per_view, strict=True)
    return list(lse), list(maxima)


def _number_of_negatives(ids: jax.Array, variant: Variant, placement: PairSharding) -> jax.Array:
    """Of each anchor, float32 [B]."""
    parts = 1
    if placement.mesh is not None and not placement.ring:
        parts = int(np.prod([placement.mesh.shape[axis] for axis in placement.axes]))

    def n_negatives(ids: jax.Array) -> jax.Array:
        ordered = jnp.sort(ids)
        same_work = jnp.searchsorted(ordered, ids, side="right") - jnp.searchsorted(ordered, ids)
        return jnp.sum(ids != PADDING_ID) - same_work

    number = jax.vmap(n_negatives)(ids.reshape(parts, -1)).reshape(-1)
    return (number * (2 if variant == "nt-xent" else 1)).astype(jnp.float32)


def _uniformity(unit_RxE: jax.Array, valid_R: jax.Array) -> jax.Array:
    pairs = valid_R[:, None] * valid_R * (1 - jnp.eye(len(unit_RxE)))
    potential = jnp.exp(4 * (unit_RxE @ unit_RxE.T) - 4)
    return jnp.log(jnp.sum(pairs * potential) / jnp.maximum(pairs.sum(), 1) + 1e-12)


def _check(
    z1_BxE: jax.Array,
    z2_BxE: jax.Array,
    temperature: float | jax.Array,
    composition: jax.Array | None,
) -> None:
    """Raises `UserError` for what is no pair of views; looks at shapes only, so also in a trace."""
    expect_array(z1_BxE, "contrastive_loss: the first view", "pairs", "width")
    expect_array(z2_BxE, "contrastive_loss: the second view", "pairs", "width")
    if z1_BxE.shape != z2_BxE.shape:
        raise UserError(
            f"contrastive_loss: views {list(z1_BxE.shape)} and {list(z2_BxE.shape)}: row i of both "
            "must be of one piece, so their shapes must be the same"
        )
    if isinstance(temperature, int | float) and not temperature > 0:
        raise UserError(f"contrastive_loss: temperature={temperature} must be above 0")
    if composition is not None and jnp.shape(composition) != z1_BxE.shape[:1]:
        raise UserError(
            f"contrastive_loss: composition is expected as integers [{len(z1_BxE)}], one per pair, "
            f"not {list(jnp.shape(composition))}"
        )


def _unit(z_BxE: jax.Array) -> jax.Array:
    z = z_BxE.astype(jnp.float32)
    # The square root has no gradient at 0; the small constant keeps it finite.
    unit = z * jax.lax.rsqrt(jnp.square(z).sum(1, keepdims=True) + 1e-12)
    return unit.astype(jnp.bfloat16 if z_BxE.dtype == jnp.bfloat16 else jnp.float32)


def grad_cache(
    embed: Callable[[Tree, Tree], jax.Array],
    loss: Callable[[Tree, jax.Array], tuple[jax.Array, Tree]],
    params: Tree,
    micro_batches: Tree,
) -> tuple[tuple[jax.Array, Tree], Tree]:
    """`jax.value_and_grad(..., has_aux=True)` of a loss of all embeddings, a micro-batch at a time.

    Gradient caching (Gao et al. 2021): embed all micro-batches and keep only the embeddings; take
    the loss and its gradient with respect to them; then embed every micro-batch again and pull its
    part of that gradient back to the parameters. One more forward pass buys memory of one
    micro-batch, and the result is that of one pass over the whole batch.

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

    def replay(total: Tree, part: tuple[Tree, jax.Array]) -> tuple[Tree, None]:
        batch, cotangent = part
        _, pull_back = jax.vjp(lambda p: embed(p, batch), params)
        return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

    grads, _ = jax.lax.scan(replay, own, (micro_batches, cotangents))
    return value, grads
