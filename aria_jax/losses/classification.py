"""Cross-entropy over classes, and files from the probabilities of their slices."""

import jax
import jax.numpy as jnp
import numpy as np


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


def file_probabilities(
    probabilities_SxC: np.ndarray, n_tokens_S: np.ndarray, piece_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the slices of each file, weighted by their tokens (reference:
    classifier_finetune.py val_loop).

    Args:
        probabilities_SxC: of each slice.
        n_tokens_S: tokens of each slice, padding not counted.
        piece_S: file of each slice; negative in padding rows, which are left out.

    Returns:
        Files in ascending order, int [F], and their probabilities, float64 [F, C].
    """
    used = (piece_S >= 0) & (n_tokens_S > 0)
    pieces, of_slice = np.unique(piece_S[used], return_inverse=True)
    weights = n_tokens_S[used].astype(np.float64)
    total = np.zeros((len(pieces), probabilities_SxC.shape[1]))
    np.add.at(total, of_slice, weights[:, None] * probabilities_SxC[used])
    return pieces, total / np.bincount(of_slice, weights, len(pieces))[:, None]
