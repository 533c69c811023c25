"""Published weights: every prefix and precision, and every way a file can be wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import save_file

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.interop.safetensors import export_model, import_model
from aria_jax.models.heads import build_model
from data_pipeline.errors import UserError

CONFIG = ModelConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=50, emb_size=4)


@pytest.fixture
def exported(tmp_path):
    model = build_model(CONFIG, ComputeConfig(), rngs=nnx.Rngs(params=0))
    export_model(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def tensors(path):
    from safetensors.flax import load_file

    return load_file(path)


def test_round_trip_is_exact_and_infers_the_architecture(exported):
    model, path = exported
    back = import_model(path, n_heads=2)
    assert back.config == ModelConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=50, emb_size=4)
    ours, theirs = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, back))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_and_compile_prefixes(exported, tmp_path, dtype):
    model, path = exported
    changed = {f"_orig_mod.{name}": t.astype(dtype) for name, t in tensors(path).items()}
    save_file(changed, tmp_path / "half.safetensors")
    back = import_model(tmp_path / "half.safetensors", n_heads=2)
    expected = np.asarray(model.head[...].astype(dtype), np.float32)
    np.testing.assert_array_equal(back.head[...], expected)


def test_missing_and_unknown_tensors_are_named(exported, tmp_path):
    _, path = exported
    changed = tensors(path)
    changed["model.extra"] = changed.pop("model.encode_layers.1.norm1.bias")
    save_file(changed, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"missing .*layers.1.norm1.bias.*unknown model.extra"):
        import_model(tmp_path / "wrong.safetensors", n_heads=2)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.bin", b"", "only .safetensors files"),
        ("model.safetensors", b"rubbish", "not a readable safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / name)


def test_heads_that_do_not_fit_are_explained(exported):
    with pytest.raises(UserError, match="give --n-heads"):
        import_model(exported[1], n_heads=3)
