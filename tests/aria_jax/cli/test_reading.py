"""Models read files as those of their corpus were read, unless told otherwise, and then say so."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.models import load_model, save_model
from aria_jax.cli.main import main
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.embed.table import read_embeddings, read_settings
from aria_jax.generate.continuation import make_prompt
from aria_jax.models.heads import build_model
from data_pipeline.midi import TEMPO, midi_bytes, read_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

ARIA = Tokenizer.preset("aria")
READINGS = ("standard", "aria-utils")
COMPAT = {"standard": None, "aria-utils": "aria-utils"}
SMALL = ["--slice-notes", "20", "--max-tokens", "128", "--workers", "0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file whose tempo changes under way: the two readings of it differ."""
    folder = tmp_path_factory.mktemp("midi")
    performance = random_performance(np.random.default_rng(0), 50)
    middle = int(performance.notes["start"][25]) + 17
    tempi = np.array([(0, 500_000), (middle, 900_000)], TEMPO)
    content = midi_bytes(replace(performance, tempi=tempi))
    (folder / "x.mid").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of a checkpoint for each (head, reading)."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for head, extra in (
        ("lm", {}),
        ("embedding", {"emb_size": 8}),
        ("class", {"class_names": ("bach", "liszt")}),
    ):
        config = ModelConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=512, head=head, **extra)
        model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(0))
        for reading in READINGS:
            made[head, reading] = str(folder / f"{head}-{reading}")
            save_model(made[head, reading], model, reading=reading)
    return made


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight devices takes longer."""
    import jax

    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    output = capsys.readouterr()
    assert status == 0, output.err
    warned = [line for line in output.err.splitlines() if "warning: reading MIDI files" in line]
    return json.loads(output.out), warned


def other(reading):
    return READINGS[1 - READINGS.index(reading)]


@pytest.mark.parametrize("reading", READINGS)
def test_checkpoints_keep_the_reading(models, reading):
    assert load_model(models["lm", reading]).reading == reading


@pytest.mark.parametrize("reading", READINGS)
def test_prompts_are_read_as_the_corpus_was(models, files, capsys, reading):
    ask = ["generate", "--checkpoint", models["lm", reading], "--prompt", files / "x.mid",
           "--notes", 40, "--max-tokens", 4]  # fmt: skip
    prompts = {
        name: make_prompt(read_midi(files / "x.mid", compat=compat), ARIA, notes=40).tolist()
        for name, compat in COMPAT.items()
    }
    assert prompts["standard"] != prompts["aria-utils"]
    result, warned = run(capsys, *ask)
    assert result["prompt_ids"] == prompts[reading] and not warned
    result, warned = run(capsys, *ask, "--compat", other(reading))
    assert result["prompt_ids"] == prompts[other(reading)] and len(warned) == 1
    assert models["lm", reading] in warned[0] and f"by {other(reading)}" in warned[0]


def test_a_reading_of_no_file_is_refused(models, capsys, tmp_path):
    command = ["generate", "--checkpoint", models["lm", "standard"], "--compat", "aria-utils"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "--prompt X.mid or --embedding" in capsys.readouterr().err


def test_scores_are_those_of_the_chosen_reading(models, files, capsys):
    def score(model, *extra):
        result, warned = run(capsys, "score", files / "x.mid", "--checkpoint", model, *extra)
        return result["nll"], len(warned)

    standard, compat = (models["lm", reading] for reading in READINGS)
    own = score(standard), score(compat)
    assert own[0][0] != own[1][0] and [n for _, n in own] == [0, 0]
    assert score(standard, "--compat", "aria-utils") == (own[1][0], 1)
    assert score(compat, "--compat", "standard") == (own[0][0], 1)


def test_classes_are_those_of_the_chosen_reading(models, files, capsys, tmp_path):
    def probability(model, *extra):
        out = tmp_path / "predictions.jsonl"
        out.unlink(missing_ok=True)
        _, warned = run(
            capsys, "classify", files, "--checkpoint", model, "--out", out, *SMALL, *extra
        )
        return json.loads(out.read_text())["probabilities"]["bach"], len(warned)

    standard, compat = (models["class", reading] for reading in READINGS)
    own = probability(standard), probability(compat)
    assert own[0][0] != own[1][0] and [n for _, n in own] == [0, 0]
    assert probability(standard, "--compat", "aria-utils") == (own[1][0], 1)


def test_safetensors_keep_the_reading(models, capsys, tmp_path):
    for reading in READINGS:
        out = str(tmp_path / f"{reading}.safetensors")
        assert main(["convert", "to-safetensors", models["lm", reading], out]) == 0
        assert not capsys.readouterr().err
        assert load_model(out).reading == reading
        back = str(tmp_path / reading)
        assert main(["convert", "from-safetensors", out, back]) == 0
        assert load_model(back).reading == reading


def test_embeddings_keep_the_reading_and_queries_follow_it(models, files, capsys, tmp_path):
    found = {}
    for reading in READINGS:
        out = tmp_path / f"{reading}.parquet"
        model = models["embedding", reading]
        _, warned = run(capsys, "embed", files, out, "--checkpoint", model, *SMALL)
        assert not warned and read_settings(out)["reading"] == reading
        found[reading] = read_embeddings(out).embedding
        result, warned = run(capsys, "search", files / "x.mid", out, "--checkpoint", model)
        assert not warned and result["hits"][0]["score"] == pytest.approx(1, abs=1e-6)
        result, warned = run(
            capsys, "search", files / "x.mid", out, "--checkpoint", model,
            "--compat", other(reading),
        )  # fmt: skip
        assert len(warned) == 1 and result["hits"][0]["score"] < 1 - 1e-6
    assert np.abs(found["standard"] - found["aria-utils"]).max() > 1e-4
    out = tmp_path / "asked.parquet"
    _, warned = run(
        capsys, "embed", files, out, "--checkpoint", models["embedding", "standard"], *SMALL,
        "--compat", "aria-utils",
    )  # fmt: skip
    assert len(warned) == 1 and read_settings(out)["reading"] == "aria-utils"
    np.testing.assert_allclose(read_embeddings(out).embedding, found["aria-utils"], atol=1e-6)


def test_shards_of_another_reading_are_embedded_with_a_word(models, files, capsys, tmp_path):
    _, warned = run(
        capsys, "data", "build", files, tmp_path / "data", "--workers", 1, "--filters", "none",
        "--val-fraction", 0, "--compat", "aria-utils",
    )  # fmt: skip
    command = ["embed", tmp_path / "data", tmp_path / "e.parquet", *SMALL]
    for reading, n_warned in (("aria-utils", 0), ("standard", 1)):
        (tmp_path / "e.parquet").unlink(missing_ok=True)
        model = models["embedding", reading]
        _, warned = run(capsys, *command, "--checkpoint", model)
        assert len(warned) == n_warned
        assert read_settings(tmp_path / "e.parquet")["reading"] == "aria-utils"
    command = ["embed", str(tmp_path / "data"), str(tmp_path / "b.parquet")]
    assert main([*command, "--baseline", "pitch-class", "--compat", "standard"]) == 2
    assert "--compat standard cannot" in capsys.readouterr().err
