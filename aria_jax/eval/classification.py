"""From probabilities of slices to answers about files."""

import numpy as np


def file_probabilities(
    probabilities_SxC: np.ndarray, n_tokens_S: np.ndarray, piece_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the slices of each file, weighted by their tokens (reference:
    classifier_finetune.py val_loop).

    Args:
        probabilities_SxC: of each slice.
        n_tokens_S: tokens of each slice, padding not counted.
        piece_S: file of each slice; negative in filler rows, which are left out.

    Returns:
        Files in ascending order, int [F], and their probabilities, float64 [F, C].
    """
    used = (piece_S >= 0) & (n_tokens_S > 0)
    pieces, of_slice = np.unique(piece_S[used], return_inverse=True)
    weights = n_tokens_S[used].astype(np.float64)
    total = np.zeros((len(pieces), probabilities_SxC.shape[1]))
    np.add.at(total, of_slice, weights[:, None] * probabilities_SxC[used])
    return pieces, total / np.bincount(of_slice, weights, len(pieces))[:, None]


def confusion_counts(truth: np.ndarray, answer: np.ndarray, n_classes: int) -> np.ndarray:
    """How often each class (row) was answered by each class (column), int64 [C, C]."""
    return np.bincount(truth * n_classes + answer, minlength=n_classes**2).reshape(
        n_classes, n_classes
    )


def accuracy(confusion_CxC: np.ndarray) -> float:
    """Share of right answers; 0 without any."""
    return float(np.trace(confusion_CxC) / max(confusion_CxC.sum(), 1))


def f1_per_class(confusion_CxC: np.ndarray) -> np.ndarray:
    """F1 of each class, float64 [C]; 0 for a class that neither occurs nor is answered."""
    hits = np.diagonal(confusion_CxC)
    return 2 * hits / np.maximum(confusion_CxC.sum(0) + confusion_CxC.sum(1), 1)


def macro_f1(confusion_CxC: np.ndarray) -> float:
    """Mean F1 of the classes that occur or are answered; 0 without any."""
    known = confusion_CxC.sum(0) + confusion_CxC.sum(1) > 0
    return float(f1_per_class(confusion_CxC)[known].mean()) if known.any() else 0.0
