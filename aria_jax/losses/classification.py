"""Cross-entropy over classes."""

import jax
import jax.numpy as jnp


def classification_loss(
    logits_BxC: jax.Array, labels_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats (float32 scalar), and {"accuracy": fraction correct}."""
    logits_BxC = logits_BxC.astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BxC), labels_B[:, None], axis=-1)
    accuracy = (logits_BxC.argmax(-1) == labels_B).mean()
    return -chosen.mean(), {"accuracy": accuracy}
