"""Adapters start as nothing, learn alone, and merge into the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.safetensors import load_lora, save_lora
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import build_model, parameter_specs, split_model
from aria_jax.models.lora import apply_lora, init_lora
from data_pipeline.errors import UserError

CONFIG = ModelConfig(d_model=16, n_heads=2, n_layers=2, max_seq_len=32, vocab_size=50)
SPECS = parameter_specs(CONFIG)
TOKENS = jnp.arange(10)[None]


@pytest.fixture(scope="module")
def model():
    return split_model(build_model(CONFIG, ComputeConfig(), rngs=nnx.Rngs(0)))


def random_lora(**settings):
    lora = init_lora(SPECS, key=jax.random.key(1), **settings)
    noise = {name: jax.random.normal(jax.random.key(2), b.shape) for name, b in lora.b.items()}
    return lora.replace(b=noise)


def test_fresh_adapters_change_nothing(model):
    _, params = model
    adapted = apply_lora(params, init_lora(SPECS, rank=3, key=jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, params, adapted)


def test_adapted_matrices_differ_by_the_low_rank_product(model):
    _, params = model
    lora = random_lora(rank=3, targets=("qkv", "down"), alpha=6.0)
    adapted = apply_lora(params, lora)
    blocks, changed = params["backbone"]["blocks"], adapted["backbone"]["blocks"]
    for name in ("qkv", "down"):
        difference = np.asarray(changed[name] - blocks[name])
        matrices = difference.reshape(CONFIG.n_layers, difference.shape[1], -1)
        path = f"backbone.blocks.{name}"
        for layer, matrix in enumerate(matrices):
            assert np.linalg.matrix_rank(matrix, tol=1e-4) == 3
            expected = 2.0 * lora.a[path][layer] @ lora.b[path][layer]
            np.testing.assert_allclose(matrix, expected, atol=1e-5)  # subtraction of float32
    for name in ("out", "gate", "up", "norm1_scale"):
        np.testing.assert_array_equal(changed[name], blocks[name])


def test_gradient_descent_on_adapters_lowers_the_loss_and_leaves_the_model(model):
    merge, params = model
    before = jax.tree.map(np.asarray, params)
    lora = init_lora(SPECS, rank=2, key=jax.random.key(0), targets=("out", "down", "head"))

    @jax.jit
    def step(lora):
        def loss(lora):
            logits = merge(apply_lora(params, lora))(TOKENS)
            return -jax.nn.log_softmax(logits)[0, :-1][jnp.arange(9), TOKENS[0, 1:]].mean()

        value, gradient = jax.value_and_grad(loss)(lora)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, lora, gradient)

    losses = []
    for _ in range(15):
        value, lora = step(lora)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, params)
    merged = merge(apply_lora(params, lora))(TOKENS)
    assert (
        float(-jax.nn.log_softmax(merged)[0, :-1][jnp.arange(9), TOKENS[0, 1:]].mean()) < losses[-1]
    )


def test_adapters_are_saved_alone(model, tmp_path):
    _, params = model
    lora = random_lora(rank=2, alpha=8.0)
    path = tmp_path / "adapters.safetensors"
    save_lora(path, lora)
    n_adapter = sum(leaf.size for leaf in jax.tree.leaves(lora))
    assert path.stat().st_size < 4 * n_adapter + 5000
    loaded = load_lora(path)
    assert (loaded.scale, loaded.rank) == (4.0, 2)
    jax.tree.map(
        np.testing.assert_array_equal, apply_lora(params, loaded), apply_lora(params, lora)
    )


def test_mistakes(tmp_path):
    key = jax.random.key(0)
    for settings, message in (
        ({"rank": 0}, "rank 0"),
        ({"rank": 17}, "between 1 and 16"),
        ({"rank": 2, "targets": ("qkw",)}, "qkv"),
        ({"rank": 2, "targets": ()}, "nothing"),
        ({"rank": 2, "targets": ("norm1_scale",)}, "no matrix"),
    ):
        with pytest.raises(UserError, match=message):
            init_lora(SPECS, key=key, **settings)
    other = split_model(
        build_model(
            ModelConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=50),
            ComputeConfig(),
            rngs=nnx.Rngs(0),
        )
    )[1]
    with pytest.raises(UserError, match="another model"):
        apply_lora(other, init_lora(SPECS, rank=2, key=key))
    with pytest.raises(UserError, match="no such file"):
        load_lora(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a safetensors"):
        load_lora(tmp_path / "text")
