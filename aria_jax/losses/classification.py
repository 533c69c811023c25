"""Cross-entropy over classes."""

import jax
import jax.numpy as jnp


def classification_loss(
    logits_BxC: jax.Array, labels_B: jax.Array, mask_B: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats, and {"accuracy": share with the largest logit}; float32 scalars.

    Args:
        labels_B: int class ids.
        mask_B: bool; rows of False count for nothing (the padding of a last batch).
    """
    logits_BxC = logits_BxC.astype(jnp.float32)
    weights_B = jnp.ones(len(labels_B)) if mask_B is None else mask_B.astype(jnp.float32)
    weights_B = weights_B / jnp.maximum(weights_B.sum(), 1)
    chosen_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BxC), labels_B[:, None], axis=-1)[:, 0]
    correct_B = logits_BxC.argmax(-1) == labels_B
    return -(chosen_B @ weights_B), {"accuracy": correct_B @ weights_B}
