"""Answers about files from those about their slices: what validation of `classify` reports."""

from collections.abc import Sequence

import jax
import numpy as np

from aria_jax.eval.classification import (
    accuracy,
    confusion_counts,
    file_probabilities,
    macro_f1,
)


def slice_answers(logits_BxC: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What `file_metrics` needs of a batch of `data_pipeline.loaders.labelled_slices`."""
    kept = {name: batch[name] for name in ("label", "piece", "n_tokens")}
    return {"probabilities": jax.nn.softmax(logits_BxC.astype(np.float32)), **kept}


def file_metrics(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Scores of files, each answered by the mean of its slices' probabilities weighted by tokens.

    Args:
        batches: of `slice_answers`; all slices of every file must be among them.

    Returns:
        "file_accuracy", "file_macro_f1" and "n_files".
    """
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    files, likely_FxC = file_probabilities(rows["probabilities"], rows["n_tokens"], rows["piece"])
    first = {piece: row for row, piece in reversed(list(enumerate(rows["piece"].tolist())))}
    truth = rows["label"][[first[piece] for piece in files.tolist()]]
    counts = confusion_counts(truth, likely_FxC.argmax(1), likely_FxC.shape[1])
    return {
        "file_accuracy": accuracy(counts),
        "file_macro_f1": macro_f1(counts),
        "n_files": float(len(files)),
    }
