"""Embeddings of performances in memory, as `aria-jax embed` would compute them of their files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aria_jax.checkpoints.models import LoadedModel, load_model
from aria_jax.config import SLICE_NOTES, SLICE_TOKENS
from aria_jax.embed.encode import Encode, model_encoder
from aria_jax.embed.pieces import Slicing, midi_slices
from data_pipeline.midi import Performance
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class PerformanceEncoder:
    """From a performance to its embedding, float32 [E]: the mean over its slices.

    Attributes:
        slicing: also says how the files of the model's corpus were read.
        fingerprint: of the model, as embeddings files have it.
    """

    encode: Encode
    slicing: Slicing
    fingerprint: str

    def __call__(self, performance: Performance) -> np.ndarray:
        """Raises `InvalidMidi` where there is nothing to embed."""
        return self.encode(midi_slices(performance, self.slicing)).mean(axis=0)


def performance_encoder(
    checkpoint: LoadedModel | str | Path,
    *,
    slice_notes: int = SLICE_NOTES,
    max_tokens: int = SLICE_TOKENS,
    pooling: str | None = None,
) -> PerformanceEncoder:
    """The encoder of a trained model.

    Args:
        pooling: "eos" or "mean"; None as it was trained.

    Raises:
        UserError: no checkpoint with an embedding head there.
    """
    loaded = checkpoint if isinstance(checkpoint, LoadedModel) else load_model(checkpoint)
    slicing = Slicing(
        loaded.tokenizer,
        slice_notes,
        min(max_tokens, loaded.config.max_seq_len),
        loaded.reading,
    )
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    encode = model_encoder(loaded.model, pad_id, pooling or loaded.pooling)
    return PerformanceEncoder(encode, slicing, loaded.fingerprint)
