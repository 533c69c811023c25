"""Contrastive loss over the whole global batch.

Sizes: B pairs, E embedding width.
"""

import jax
import jax.numpy as jnp


def contrastive_loss(
    z1_BxE: jax.Array,
    z2_BxE: jax.Array,
    *,
    temperature: float | jax.Array,
    composition: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric NT-Xent on cosine similarities (reference: symmetric_nt_xent_loss_cosine).

    Row i of one view must find row i of the other among all B. Under `jit` on a mesh, B is the
    global batch: pairs of other devices are negatives too (in the reference only those of the
    same process are).

    Args:
        z1_BxE, z2_BxE: embeddings of the two views, any scale.
        composition: int [B]; different performances of one composition are not negatives.

    Returns:
        Loss (float32 scalar), and metrics: "retrieval" (share of rows that find their pair),
        "alignment" (mean squared distance of pairs) and "uniformity" (log mean Gaussian potential
        of first views; Wang & Isola 2020), both on the unit sphere, lower is better.
    """
    unit1, unit2 = _unit(z1_BxE), _unit(z2_BxE)
    batch = len(unit1)
    similarity_BxB = unit1 @ unit2.T
    logits_BxB = similarity_BxB / temperature
    same_BxB = jnp.eye(batch, dtype=bool)
    if composition is not None:
        twins = (composition[:, None] == composition[None]) & ~same_BxB
        logits_BxB = jnp.where(twins, -1e30, logits_BxB)
    positive_B = jnp.diagonal(logits_BxB)
    forward = jax.nn.logsumexp(logits_BxB, axis=1) - positive_B
    backward = jax.nn.logsumexp(logits_BxB, axis=0) - positive_B
    potential_BxB = jnp.exp(4 * (unit1 @ unit1.T) - 4)
    others = jnp.sum(jnp.where(same_BxB, 0, potential_BxB)) / max(batch * (batch - 1), 1)
    metrics = {
        "retrieval": (logits_BxB.argmax(1) == jnp.arange(batch)).mean(),
        "alignment": jnp.square(unit1 - unit2).sum(1).mean(),
        "uniformity": jnp.log(others + 1e-12),
    }
    return (forward.mean() + backward.mean()) / 2, jax.lax.stop_gradient(metrics)


def _unit(z_BxE: jax.Array) -> jax.Array:
    z_BxE = z_BxE.astype(jnp.float32)
    # The square root has no gradient at 0; the small constant keeps it finite.
    return z_BxE * jax.lax.rsqrt(jnp.square(z_BxE).sum(1, keepdims=True) + 1e-12)
