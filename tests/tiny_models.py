"""Models with random weights, of every kind, small enough for any test."""

from pathlib import Path

import pytest
from flax import nnx

from aria_jax.checkpoints.models import save_model
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import build_model

_SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 512}
_HEADS = {
    "lm": {"head": "lm"},
    "encoder": {"head": "embedding", "emb_size": 8},
    "classifier": {"head": "class", "class_names": ("lento", "presto")},
}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of a language model, one that embeds and one that classifies."""
    folder = tmp_path_factory.mktemp("tiny-models")
    for name, head in _HEADS.items():
        config = ModelConfig(**_SIZES, **head)
        save_model(folder / name, build_model(config, ComputeConfig(), rngs=nnx.Rngs(0)))
    return {name: folder / name for name in _HEADS}
