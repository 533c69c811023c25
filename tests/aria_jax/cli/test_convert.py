"""Weights there and back through the command line."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import save_file
from safetensors.numpy import load_file

from aria_jax.checkpoints.models import load_model, save_model
from aria_jax.checkpoints.safetensors import export_model
from aria_jax.cli.main import main
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import build_model
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind


def test_published_weights_become_a_checkpoint_and_come_back(golden, tmp_path, capsys):
    heads = str(json.loads((golden / "model" / "config.json").read_text())["n_heads"])
    source = golden / "model" / "lm.safetensors"
    out, back = str(tmp_path / "lm"), str(tmp_path / "back.safetensors")
    assert main(["convert", "from-safetensors", str(source), out, "--n-heads", heads]) == 0
    assert main(["convert", "to-safetensors", out, back]) == 0
    actual, desired = load_file(back), load_file(source)
    assert actual.keys() == desired.keys()
    for name in desired:
        np.testing.assert_array_equal(actual[name], desired[name])
    assert main(["convert", "from-safetensors", str(source), out, "--n-heads", heads]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_weights_of_another_vocabulary_are_refused(golden, tmp_path, capsys):
    source = str(golden / "model" / "lm.safetensors")
    arguments = ["convert", "from-safetensors", source, str(tmp_path / "x"), "--n-heads", "4"]
    assert main([*arguments, "--tokenizer", "pedal"]) == 2
    assert "choose another with --tokenizer" in capsys.readouterr().err


def test_the_pedal_demos_weights_bring_their_tokenizer(tmp_path, capsys):
    """As published: half precision, prefixed, no metadata, two ids more than the other models."""
    config = ModelConfig(d_model=64, n_heads=1, n_layers=1, vocab_size=17_729, emb_size=4)
    export_model(build_model(config, ComputeConfig(), rngs=nnx.Rngs(0)), tmp_path / "local")
    published = {
        f"_orig_mod.{name}": jnp.asarray(tensor, jnp.bfloat16)
        for name, tensor in load_file(tmp_path / "local").items()
    }
    save_file(published, tmp_path / "demo.safetensors")
    out = str(tmp_path / "demo")
    assert main(["convert", "from-safetensors", str(tmp_path / "demo.safetensors"), out]) == 0
    loaded = load_model(out)
    assert loaded.tokenizer == "pedal" and loaded.config == config
    capsys.readouterr()
    assert main(["generate", "--checkpoint", out, "--max-tokens", "30", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    pedal = Tokenizer.preset("pedal")
    decoded = pedal.decode(np.array(result["prompt_ids"] + result["ids"][0]))
    kinds = pedal.kind[result["ids"][0]]
    assert len(decoded.notes) == (kinds == Kind.NOTE).sum() > 0


def test_a_vocabulary_of_no_tokenizer_is_refused(tmp_path, capsys):
    config = ModelConfig(d_model=64, n_heads=1, n_layers=1, vocab_size=50)
    source = str(tmp_path / "other.safetensors")
    export_model(build_model(config, ComputeConfig(), rngs=nnx.Rngs(0)), source)
    assert main(["convert", "from-safetensors", source, str(tmp_path / "x")]) == 2
    assert "has 50 tokens, but tokenizer aria 17727, pedal 17729" in capsys.readouterr().err


def test_options_without_effect_are_refused(tmp_path, capsys):
    config = ModelConfig(d_model=64, n_heads=1, n_layers=1)
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(0))
    save_model(tmp_path / "run", model)
    assert main(["convert", "merge", str(tmp_path / "run"), str(tmp_path / "whole")]) == 2
    assert "no adapters to merge" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()
    source = str(tmp_path / "lm.safetensors")
    export_model(model, source)
    arguments = ["convert", "from-safetensors", source, str(tmp_path / "x")]
    assert main([*arguments, "--class-names", "a,b"]) == 2
    assert "--class-names has no effect" in capsys.readouterr().err
