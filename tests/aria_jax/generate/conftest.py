"""Models to generate with."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import Model, build_model
from data_pipeline.tokenizers import Tokenizer


def make_random_model(seed: int = 0, scale: float = 1.0, **config) -> Model:
    """A small untrained language model with the real vocabulary."""
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 1024} | config
    model = build_model(ModelConfig(**sizes), ComputeConfig(), rngs=nnx.Rngs(seed))
    # An untrained head is almost uniform; a steeper one makes greedy and guided choices distinct.
    model.head[...] = model.head[...] * scale
    return model


@pytest.fixture(scope="session")
def random_model():
    """Makes a small untrained language model: `random_model(seed, scale, **config)`."""
    return make_random_model


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    return make_random_model(scale=30.0)


@pytest.fixture(scope="session")
def conditioned_model() -> Model:
    return make_random_model(seed=1, scale=30.0, emb_size=8)


@pytest.fixture(scope="session")
def piano_prompt() -> np.ndarray:
    """Prefix, <S> and two notes."""
    tokenizer = Tokenizer.preset("aria")
    return np.array(
        [
            tokenizer.id_of(token)
            for token in (
                ("prefix", "instrument", "piano"), "<S>",
                ("piano", 60, 70), ("onset", 0), ("dur", 500),
                ("piano", 64, 60), ("onset", 480), ("dur", 700),
            )
        ]
    )  # fmt: skip


@pytest.fixture(scope="session")
def golden_model(golden):
    """The reference's random language model: `load(name)` with name "lm" or "lm_cnd"."""
    from safetensors.numpy import load_file

    settings = json.loads((golden / "model" / "config.json").read_text())

    def load(name: str) -> Model:
        tensors = load_file(golden / "model" / f"{name}.safetensors")
        config = ModelConfig(
            d_model=settings["d_model"],
            n_heads=settings["n_heads"],
            n_layers=settings["n_layers"],
            ff_mult=settings["ff_mult"],
            max_seq_len=settings["max_seq_len"],
            vocab_size=settings["vocab_size"],
            emb_size=settings["emb_size"] if name == "lm_cnd" else None,
        )
        model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(0))
        model.backbone.embedding[...] = jnp.asarray(tensors["model.tok_embeddings.weight"])
        model.backbone.norm_scale[...] = jnp.asarray(tensors["model.out_layer_norm.weight"])
        model.backbone.norm_bias[...] = jnp.asarray(tensors["model.out_layer_norm.bias"])
        model.head[...] = jnp.asarray(tensors["lm_head.weight"].T)
        if name == "lm_cnd":
            model.adapter[...] = jnp.asarray(tensors["embedding_adapter.weight"].T)
        names = {"qkv": "mixed_qkv", "out": "att_proj_linear", "gate": "ff_gate_proj",
                 "up": "ff_up_proj", "down": "ff_down_proj"}  # fmt: skip
        blocks = model.backbone.blocks
        for field, published in names.items():
            parameter = getattr(blocks, field)
            layers = [
                tensors[f"model.encode_layers.{i}.{published}.weight"].T
                for i in range(config.n_layers)
            ]
            parameter[...] = jnp.asarray(np.stack(layers)).reshape(parameter.shape)
        for norm in ("norm1", "norm2"):
            for field, published in (("scale", "weight"), ("bias", "bias")):
                layers = [
                    tensors[f"model.encode_layers.{i}.{norm}.{published}"]
                    for i in range(config.n_layers)
                ]
                getattr(blocks, f"{norm}_{field}")[...] = jnp.asarray(np.stack(layers))
        return model

    return load
