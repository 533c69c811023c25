"""Published weights: every prefix and precision, and every way a file can be wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file, save_file

from aria_jax.checkpoints.safetensors import export_model, import_model
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import build_model
from data_pipeline.errors import UserError

CONFIG = ModelConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=50, emb_size=4)
CONFIGS = {
    "lm": dataclasses.replace(CONFIG, emb_size=None),
    "conditioned": CONFIG,
    "embedding": dataclasses.replace(CONFIG, head="embedding", max_seq_len=2048),
    "class": dataclasses.replace(
        CONFIG, head="class", emb_size=None, max_seq_len=2048, class_names=("bach", "liszt")
    ),
    "none": dataclasses.replace(CONFIG, head="none", emb_size=None),
}


@pytest.fixture
def exported(tmp_path):
    model = build_model(CONFIG, ComputeConfig(), rngs=nnx.Rngs(params=0))
    export_model(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def published(path, out, change=lambda name: name, dtype=jnp.float32):
    """The tensors of `path` as another program would have written them: no metadata of this one."""
    save_file({change(name): t.astype(dtype) for name, t in load_file(path).items()}, out)
    return out


def same_weights(a, b):
    for actual, desired in zip(*(jax.tree.leaves(nnx.state(m)) for m in (a, b)), strict=True):
        np.testing.assert_array_equal(actual, desired)


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_is_exact_for_every_head(tmp_path, kind):
    model = build_model(CONFIGS[kind], ComputeConfig(), rngs=nnx.Rngs(params=0))
    export_model(model, tmp_path / "model.safetensors")
    back = import_model(tmp_path / "model.safetensors")
    assert back.config == CONFIGS[kind]
    same_weights(model, back)
    export_model(back, tmp_path / "again.safetensors")
    first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("model", "again"))
    assert first == second


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_architecture_is_inferred_from_tensors_alone(tmp_path, kind):
    model = build_model(CONFIGS[kind], ComputeConfig(), rngs=nnx.Rngs(params=0))
    export_model(model, tmp_path / "local.safetensors")
    bare = published(tmp_path / "local.safetensors", tmp_path / "published.safetensors")
    back = import_model(bare, n_heads=2, class_names=CONFIGS[kind].class_names)
    assert back.config == CONFIGS[kind]


def test_heads_are_64_wide_by_default(tmp_path):
    config = ModelConfig(d_model=128, n_heads=2, n_layers=1, vocab_size=50)
    export_model(
        build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=0)), tmp_path / "a.safetensors"
    )
    bare = published(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert import_model(bare).config == config


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(exported, tmp_path, dtype):
    model, path = exported
    back = import_model(published(path, tmp_path / "half.safetensors", dtype=dtype), n_heads=2)
    assert back.head[...].dtype == jnp.float32
    expected = np.asarray(model.head[...].astype(dtype), np.float32)
    np.testing.assert_array_equal(back.head[...], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model._orig_mod."),
        lambda name: name.replace(".0.", ".0._orig_mod."),
    ],
    ids=["compiled", "wrapped", "bare", "backbone compiled", "layers compiled"],
)
def test_prefixes(exported, tmp_path, change):
    model, path = exported
    same_weights(
        import_model(published(path, tmp_path / "x.safetensors", change), n_heads=2), model
    )


def test_every_wrong_tensor_is_named_in_one_error(exported, tmp_path):
    _, path = exported
    changed = load_file(path)
    changed["model.extra"] = changed.pop("model.encode_layers.1.norm1.bias")
    changed["lm_head.weight"] = changed["lm_head.weight"][:, :3]
    changed["model.encode_layers.0.mixed_qkv.weight"] = jnp.zeros((16, 16))
    save_file(changed, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError) as error:
        import_model(tmp_path / "wrong.safetensors", n_heads=2)
    message = str(error.value)
    assert "missing model.encode_layers.1.norm1.bias;" in message
    assert "unknown model.extra;" in message
    assert "lm_head.weight [50, 3] (should be [50, 16])" in message
    assert "mixed_qkv.weight [16, 16] (should be [48, 16])" in message


def test_a_weight_given_twice_is_refused(exported, tmp_path):
    _, path = exported
    tensors = load_file(path)
    tensors["_orig_mod.lm_head.weight"] = tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "twice.safetensors")
    with pytest.raises(UserError, match="same weight twice"):
        import_model(tmp_path / "twice.safetensors")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.bin", b"", "pickles"),
        ("model.pt", b"", "pickles"),
        ("model.safetensors", b"rubbish", "not a readable safetensors file"),
        ("model.safetensors", b"", "not a readable safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / name)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"lm_head.weight": jnp.zeros((3, 3))}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no Aria weights"):
        import_model(tmp_path / "other.safetensors")


def test_heads_and_names_that_do_not_fit_are_explained(exported, tmp_path):
    with pytest.raises(UserError, match="give --n-heads"):
        import_model(exported[1], n_heads=3)
    model = build_model(CONFIGS["class"], ComputeConfig(), rngs=nnx.Rngs(params=0))
    export_model(model, tmp_path / "class.safetensors")
    with pytest.raises(UserError, match="3 class names for 2 classes"):
        import_model(tmp_path / "class.safetensors", class_names=("a", "b", "c"))


def test_a_learned_temperature_stays_behind(tmp_path):
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=64, head="embedding",
                         emb_size=4, learned_temperature=True)  # fmt: skip
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=0))
    export_model(model, tmp_path / "e.safetensors")
    back = import_model(tmp_path / "e.safetensors", n_heads=2)
    assert back.log_temperature is None and not back.config.learned_temperature
    np.testing.assert_array_equal(back.head[...], model.head[...])
