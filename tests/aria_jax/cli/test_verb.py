"""One rule for all that verbs write: the same is done, another is refused until --overwrite."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from aria_jax.checkpoints.models import save_model
from aria_jax.checkpoints.safetensors import export_model
from aria_jax.cli.main import main
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.models.heads import build_model
from data_pipeline.midi import write_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance
from tests.marks import slow_among


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus, midi_corpus):
    """Inputs of every verb: two models, ids, clips, embeddings."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    performance = random_performance(rng, 20)
    tokenizer = Tokenizer.preset("aria")
    for name, one in (("ids", performance), ("others", random_performance(rng, 20))):
        (folder / f"{name}.json").write_text(json.dumps(tokenizer.encode(one).tolist()))
    write_midi(performance, folder / "p.mid")
    lm = ModelConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=256)
    embedder = ModelConfig(
        d_model=16, n_heads=2, n_layers=1, head="embedding", emb_size=8, max_seq_len=256
    )
    judge = ModelConfig(
        d_model=16, n_heads=2, n_layers=1, head="class", class_names=("a", "b"), max_seq_len=256
    )
    for name, config in (("lm", lm), ("embedder", embedder), ("judge", judge)):
        model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=0))
        save_model(folder / name, model)
        export_model(model, folder / f"{name}.safetensors")
    for system in ("aria", "other"):
        (folder / "clips" / system).mkdir(parents=True)
        for i in range(2):
            write_midi(performance, folder / "clips" / system / f"{i}.mid")
    shutil.copytree(corpus, folder / "shards")
    shutil.copytree(midi_corpus, folder / "midi")
    command = ["embed", "midi", "emb.parquet", "--checkpoint", "embedder", "--max-tokens", "256"]
    run(folder, command)
    return folder


def run(folder, command):
    """Exit status, with names of inputs standing for their paths."""
    inputs = [
        "midi",
        "shards",
        "lm",
        "embedder",
        "judge",
        "clips",
        "p.mid",
        "ids.json",
        "others.json",
    ]

    def is_path(word):
        made = word.startswith("out") or word.endswith((".parquet", ".safetensors"))
        return made or word in inputs

    return main([str(folder / word) if is_path(word) else word for word in command])


# verb -> (command, the change that makes it another)
TABLE = {
    "detokenize": (["detokenize", "ids.json", "out.mid"], ("ids.json", "others.json")),
    "inspect": (["data", "inspect", "shards", "--plot", "out.png"], ("shards", None)),
    "probe": (["probe", "emb.parquet", "--label", "composer", "--min-per-class", "2",
               "--plot", "out.png", "--seed", "0"], ("0", "1")),
    "search": (["search", "p.mid", "emb.parquet", "--checkpoint", "embedder",
                "--html", "out.html", "-k", "2"], ("2", "3")),
    "generate": (["generate", "--checkpoint", "lm", "--out", "out", "--max-tokens", "12",
                  "--seed", "0"], ("0", "1")),
    "listening-test": (["listening-test", "make", "clips", "out", "--ours", "aria", "--judges",
                        "1", "--seed", "0"], ("0", "1")),
    "to-safetensors": (["convert", "to-safetensors", "lm", "out.safetensors"], ("lm", "embedder")),
    "from-safetensors": (["convert", "from-safetensors", "lm.safetensors", "out", "--n-heads",
                          "2"], ("lm.safetensors", "embedder.safetensors")),
    "classify": (["classify", "midi", "--checkpoint", "judge", "--max-tokens", "256", "--out",
                  "out.jsonl"], ("256", "128")),
    "bench-suite": (["bench-suite", "midi", "--out", "out", "--min-per-class", "2", "--classifier",
                     "knn", "--seeds", "1", "--seed", "0"], ("0", "3")),
    "embed": (["embed", "midi", "out.parquet", "--baseline", "pitch-class"],
              ("pitch-class", "statistics")),
    "data build": (["data", "build", "midi", "out-data", "--filters", "none", "--workers", "1",
                    "--val-fraction", "0.2"], ("0.2", "0.5")),
}  # fmt: skip
LONG = {"bench-suite", "classify", "generate"}


def contents(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder): p.read_bytes() for p in files}


@pytest.mark.parametrize("verb", slow_among(TABLE, LONG))
def test_nothing_finished_is_overwritten_unasked(verb, made, tmp_path, capsys):
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    command, (was, becomes) = TABLE[verb]
    before = contents(folder)
    assert run(folder, command) == 0
    printed, finished = capsys.readouterr().out, contents(folder)
    assert finished != before
    assert run(folder, command) == 0, "the same is done"
    assert contents(folder) == finished
    if verb not in ("embed", "data build"):
        assert capsys.readouterr().out == printed

    if becomes is None:  # the input itself changes
        manifest = json.loads((folder / was / "manifest.json").read_text())
        (folder / was / "manifest.json").write_text(json.dumps({**manifest, "more": 1}))
        finished, other = contents(folder), command
    else:
        other = [becomes if argument == was else argument for argument in command]
    assert run(folder, other) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error and "another output" in error, error
    assert contents(folder) == finished
    assert run(folder, [*other, "--overwrite"]) == 0
    assert run(folder, other) == 0 and contents(folder) != finished


def test_files_of_others_and_files_that_were_changed_are_not_replaced(made, tmp_path, capsys):
    out = tmp_path / "song.mid"
    command = ["detokenize", str(made / "ids.json"), str(out)]
    out.write_text("mine")
    assert main(command) == 2 and "there already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    out.write_text("changed")
    assert main(command) == 2 and "changed since it was made" in capsys.readouterr().err
    out.unlink()
    assert main(command) == 0 and out.exists()


def test_a_refusal_names_the_files_that_are_not_as_they_were(made, tmp_path, capsys):
    shutil.copytree(made / "midi", midi := tmp_path / "midi")
    out = str(tmp_path / "answers.jsonl")
    command = ["classify", str(midi), "--checkpoint", str(made / "judge"), "--out", out]
    assert main([*command, "--workers", "0"]) == 0
    shutil.copy(midi / "lento_0.mid", midi / "more.mid")
    (midi / "lento_2.mid").write_bytes((midi / "lento_4.mid").read_bytes())
    assert main(command) == 2
    changed = f"source: {midi}: 1 file more, 1 changed (first: lento_2.mid, more.mid)"
    assert changed in capsys.readouterr().err
    moved = shutil.copytree(midi, tmp_path / "moved")
    assert main([command[0], str(moved), *command[2:]]) == 2
    assert f"source: {midi} → {moved}" in capsys.readouterr().err


def test_a_failed_command_leaves_no_folder(made, tmp_path):
    out = tmp_path / "new" / "out"
    command = ["generate", "--checkpoint", str(made / "nothing"), "--out", str(out)]
    assert main(command) == 2
    assert not list(tmp_path.iterdir())
