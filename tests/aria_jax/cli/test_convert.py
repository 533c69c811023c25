"""Weights there and back through the command line."""

import json

import numpy as np
from safetensors.numpy import load_file

from aria_jax.cli.main import main


def test_published_weights_become_a_checkpoint_and_come_back(golden, tmp_path, capsys):
    heads = str(json.loads((golden / "model" / "config.json").read_text())["n_heads"])
    source = golden / "model" / "lm.safetensors"
    out, back = str(tmp_path / "lm"), str(tmp_path / "back.safetensors")
    assert main(["convert", "from-safetensors", str(source), out, "--n-heads", heads]) == 0
    assert main(["convert", "to-safetensors", out, back]) == 0
    ours, theirs = load_file(back), load_file(source)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert main(["convert", "from-safetensors", str(source), out, "--n-heads", heads]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err


def test_weights_of_another_vocabulary_are_refused(golden, tmp_path, capsys):
    source = str(golden / "model" / "lm.safetensors")
    arguments = ["convert", "from-safetensors", source, str(tmp_path / "x"), "--n-heads", "4"]
    assert main([*arguments, "--tokenizer", "pedal"]) == 2
    assert "choose another with --tokenizer" in capsys.readouterr().err
