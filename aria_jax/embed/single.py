"""Embeddings of performances in memory, as `aria-jax embed` would compute them of their files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from aria_jax.embed.export import model_encoder
from aria_jax.embed.pieces import midi_slices
from aria_jax.train.checkpoint import load_model
from data_pipeline.midi import Performance
from data_pipeline.tokenizer import Tokenizer

SLICE_NOTES = 300
MAX_TOKENS = 2048


def performance_encoder(checkpoint: str | Path) -> Callable[[Performance], np.ndarray]:
    """A function from a performance to its embedding, float32 [E]: the mean over its slices.

    Raises:
        UserError: no checkpoint with an embedding head there.
    """
    loaded = load_model(checkpoint)
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    encode = model_encoder(loaded.model, tokenizer.pad_id)
    max_tokens = min(MAX_TOKENS, loaded.config.max_seq_len)

    def embed(performance: Performance) -> np.ndarray:
        slices = midi_slices(performance, tokenizer, SLICE_NOTES, max_tokens)
        return encode(slices).mean(axis=0)

    return embed
