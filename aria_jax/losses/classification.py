"""Cross-entropy over classes."""

import jax
import jax.numpy as jnp


def classification_loss(
    logits_BxC: jax.Array, labels_B: jax.Array, weights_B: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats (float32 scalar), and {"accuracy": fraction correct}.

    Args:
        weights_B: float32, 0 for rows that do not count; None counts every row.
    """
    logits_BxC = logits_BxC.astype(jnp.float32)
    weights_B = jnp.ones(len(labels_B)) if weights_B is None else weights_B
    total = jnp.maximum(weights_B.sum(), 1e-9)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BxC), labels_B[:, None], axis=-1)
    correct_B = logits_BxC.argmax(-1) == labels_B
    accuracy = (correct_B * weights_B).sum() / total
    return -(chosen[:, 0] * weights_B).sum() / total, {"accuracy": accuracy}
