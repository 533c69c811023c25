"""Every scheme of tokens through the commands of the README, and the comparison by training."""

import json
import shutil

import pytest

from aria_jax.cli.main import main
from aria_jax.embed.table import read_embeddings

SMALL = ["d_model=16", "n_heads=2", "n_layers=1", "global_batch=8", "vocabulary=corpus"]


@pytest.fixture(params=["musenet", "piano-roll", "remi", "midi-like"])
def scheme(request):
    if request.param in ("remi", "midi-like"):
        pytest.importorskip("miditok")
    return request.param


def run(capsys, *arguments) -> tuple[dict, str]:
    """The JSON that a command prints, and what it says."""
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert status in (0, None), output.err
    lines = output.out.splitlines()
    return (json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}), output.err


@pytest.mark.slow
def test_every_scheme_trains_samples_and_probes(scheme, midi_corpus, tmp_path, capsys):
    data, prompt = tmp_path / "data", midi_corpus / "presto_1.mid"
    built, _ = run(
        capsys, "data", "build", midi_corpus, data, "--tokenizer", scheme, "--filters", "none",
        "--val-fraction", "0.4", "--json",
    )  # fmt: skip
    assert built["n_accepted"] == 10
    train = ("--data", data, "--preset", "tiny", "steps=2", "warmup_steps=1", *SMALL)
    _, said = run(capsys, "train", "pretrain", *train, "--workdir", tmp_path / "lm", "seq_len=128")
    assert f"the {scheme} tokenizer has no augmentation of" in said
    from_lm = (*train, "--init-from", tmp_path / "lm")
    _, said = run(
        capsys, "train", "continue", *from_lm, "--workdir", tmp_path / "continued",
        "seq_len=128", "max_piece_tokens=none",
    )  # fmt: skip
    assert f"{scheme} has no <D>" in said
    slices = ("seq_len=256", "min_slice_notes=20", "max_slice_notes=60")
    run(capsys, "train", "contrastive", *from_lm, "--workdir", tmp_path / "embedder", *slices)
    run(
        capsys, "train", "classify", *from_lm, "--workdir", tmp_path / "classifier", *slices,
        "data.label=composer",
    )  # fmt: skip
    table = tmp_path / "emb.parquet"
    run(capsys, "embed", midi_corpus, table, "--checkpoint", tmp_path / "embedder")
    probed, _ = run(
        capsys, "probe", table, "--label", "composer", "--cv", "2", "--min-per-class", "2", "--json"
    )
    assert probed["n_test"] == 10
    # Slow low notes and fast high ones: their mean pitch tells them apart in any tokens.
    counted = tmp_path / "counted.parquet"
    run(capsys, "embed", data, counted, "--baseline", "statistics")
    table = read_embeddings(counted)
    is_high = [composer == "presto" for composer in table.column("composer")]
    assert (table.embedding[:, 12] > 68).tolist() == is_high
    made, _ = run(
        capsys, "generate", "--checkpoint", tmp_path / "continued", "--prompt", prompt,
        "--seconds", "3", "--max-tokens", "60", "--n", "2", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert made and (tmp_path / "out" / "presto_1.html").is_file()
    scored, _ = run(capsys, "score", prompt, "--checkpoint", tmp_path / "lm", "--json")
    assert json.dumps(scored).count("nan") == 0
    run(capsys, "classify", prompt, "--checkpoint", tmp_path / "classifier")


@pytest.mark.slow
def test_schemes_are_compared_by_training_and_a_stopped_study_goes_on(
    midi_corpus, tmp_path, capsys
):
    command = (
        "tokenizers", "compare", midi_corpus, "--tokenizers", "aria,musenet", "--train", "2",
        "--seeds", "2", "--label", "composer", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    first, _ = run(capsys, *command)
    rows = {(row["name"], row["seed"]): row for row in first["trained"]}
    assert set(rows) == {("aria", 0), ("aria", 1), ("musenet", 0), ("musenet", 1)}
    assert all(row["nats_per_note"] > 0 and row["nats_per_s"] > 0 for row in rows.values())
    assert rows["aria", 0]["nats_per_note"] != rows["aria", 1]["nats_per_note"]
    gflops = [row["gflops"] for row in rows.values()]
    assert max(gflops) < 1.5 * min(gflops)  # two steps are few: they are rounded
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nats/note" in page and 'class="tokens"' in page
    (tmp_path / "out" / "musenet" / "seed1.json").unlink()
    shutil.rmtree(tmp_path / "out" / "musenet" / "seed1-contrastive")
    again, said = run(capsys, *command)
    assert "musenet, seed 1" in said and "aria, seed 1:" not in said
    before = {key: row["nats_per_note"] for key, row in rows.items()}
    assert {(r["name"], r["seed"]): r["nats_per_note"] for r in again["trained"]} == before
    assert main([str(one) for one in command] + ["--label", "form"]) == 2
    assert "another comparison" in capsys.readouterr().err


def test_what_has_no_effect_is_refused(midi_corpus, tmp_path, capsys):
    for options, sentence in (
        (["--train", "5"], "--train needs --out"),
        (["--seeds", "2"], "without --train"),
        (["--train", "0", "--out", tmp_path], "expected 1 or more"),
    ):
        given = ["tokenizers", "compare", midi_corpus, *options]
        assert main([str(one) for one in given]) == 2
        assert sentence in capsys.readouterr().err
