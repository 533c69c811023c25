"""Models with random weights, of every kind, small enough for any test."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.models import save_model
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.generate.live.engine import Engine
from aria_jax.generate.weights import decoder_weights
from aria_jax.models.heads import Model, build_model
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import once

SOLO_PIANO = ("0-6", "17-1702", "16726-17726")
"""Ids of a solo piano, 2,694 of 17,727: logits are most of what a tiny network computes."""
_SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 512}
_HEADS = {
    "lm": {"head": "lm"},
    "encoder": {"head": "embedding", "emb_size": 8},
    "classifier": {"head": "class", "class_names": ("lento", "presto")},
}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of a language model, one that embeds and one that classifies."""

    def make(folder: Path) -> None:
        for name, head in _HEADS.items():
            config = ModelConfig(**_SIZES, **head)
            save_model(folder / name, build_model(config, ComputeConfig(), rngs=nnx.Rngs(0)))

    folder = once(tmp_path_factory, "tiny-models", make)
    return {name: folder / name for name in _HEADS}


@pytest.fixture(scope="session")
def duet_model() -> Model:
    """A language model with random weights that likes a dozen keys and waits of half a second.

    Of weights that are random throughout, a piece would crowd at the end of its first 5 s.
    """
    config = ModelConfig(d_model=16, n_heads=2, n_layers=2, max_seq_len=512)
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(0))
    model.backbone.norm_bias[...] = jnp.zeros(16).at[0].set(1.0)
    tokenizer = Tokenizer.preset("aria")
    liked = np.where(tokenizer.onset_ms >= 0, -tokenizer.onset_ms / 500, 0)
    liked[[tokenizer.id_of(("piano", pitch, 60)) for pitch in range(60, 72)]] = 8
    liked[tokenizer.time_id] = 8
    model.head[...] = model.head[...].at[0].set(liked)
    return model


@pytest.fixture(scope="session")
def duet_engine(duet_model) -> Engine:
    """Of `duet_model`, for four players, two of them a step; whoever takes a row gives it back."""
    tokenizer = Tokenizer.preset("aria")
    engine = Engine(decoder_weights(duet_model), tokenizer, players=4, width=2)
    engine.warm()
    return engine
