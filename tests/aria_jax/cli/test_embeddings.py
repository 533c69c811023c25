"""embed, probe, retrieve, search and bench-suite as a user runs them, one after the other."""

import dataclasses
import json
import re
import shutil
import tarfile
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

import aria_jax
from aria_jax.checkpoints.models import load_model, save_model
from aria_jax.cli.main import main
from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.embed.encode import class_encoder
from aria_jax.embed.export import export
from aria_jax.embed.parts import Parts
from aria_jax.embed.pieces import Slicing, midi_slices
from aria_jax.embed.table import read_embeddings
from aria_jax.models.heads import build_model
from data_pipeline.midi import PROGRAM, read_midi, write_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

SMALL = ["--slice-notes", "100", "--max-tokens", "512", "--workers", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=512, head="embedding",
                         emb_size=8)  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "run"
    save_model(path, build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=0)))
    return str(path)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight devices takes longer."""
    import jax

    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


@pytest.fixture(scope="module")
def embedded(midi_corpus, checkpoint, tmp_path_factory):
    """Files and slices of the corpus, embedded."""
    folder = tmp_path_factory.mktemp("embedded")
    for name, extra in (("files", []), ("slices", ["--per-slice"])):
        out = str(folder / f"{name}.parquet")
        status = main(["embed", str(midi_corpus), out, "--checkpoint", checkpoint, *SMALL, *extra])
        assert status == 0
    return folder


def result_of(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_embedding_again_does_nothing_and_says_the_same(midi_corpus, checkpoint, embedded, capsys):
    out = embedded / "files.parquet"
    before = out.stat().st_mtime_ns
    result = result_of(
        capsys, "embed", str(midi_corpus), str(out), "--checkpoint", checkpoint, *SMALL
    )
    assert (result["n_rows"], result["n_rejected"], result["complete"]) == (10, 0, True)
    assert out.stat().st_mtime_ns == before


def test_launched_processes_begin_apart(midi_corpus, capsys, tmp_path, monkeypatch):
    out = str(tmp_path / "e.parquet")
    command = ["embed", str(midi_corpus), out, "--baseline", "pitch-class", *SMALL]
    monkeypatch.setattr("aria_jax.embed.export.export.__kwdefaults__", {
        **export.__kwdefaults__, "files_per_part": 4})  # fmt: skip
    monkeypatch.setenv("ARIA_JAX_PROCESS_COUNT", "2")
    began = []
    monkeypatch.setattr("aria_jax.embed.export.Parts", lambda *args, **kwargs: (
        began.append(kwargs["begin"]), Parts(*args, **kwargs))[1])  # fmt: skip
    for index in ("1", "0"):
        monkeypatch.setenv("ARIA_JAX_PROCESS_INDEX", index)
        assert result_of(capsys, *command)["complete"]
    assert began == [1, 0] and len(read_embeddings(out).path) == 10
    assert main([*command, "--host-index", "2", "--host-count", "2"]) == 2


def test_probe_reads_files_and_slices(embedded, capsys, tmp_path):
    common = ["--label", "composer", "--min-per-class", "5"]
    for name, readout in (("files", "logistic"), ("slices", "knn")):
        result = result_of(
            capsys, "probe", str(embedded / f"{name}.parquet"), *common, "--classifier", readout,
            "--few-shot", "1,2", "--plot", str(tmp_path / "c.png"), "--overwrite",
        )  # fmt: skip
        assert result["n_test"] == 10 and result["accuracy"] >= 0.9
        assert [point["shots"] for point in result["few_shot"]] == [1, 2]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["probe", str(embedded / "files.parquet"), *common]) == 0
    assert "precision" in capsys.readouterr().out


def test_probe_takes_other_models_embeddings_and_labels(midi_corpus, capsys, tmp_path):
    rows = json.loads((midi_corpus / "metadata.json").read_text())
    vectors = [[float(row["composer"] == "presto"), i % 3] for i, row in enumerate(rows)]
    np.savez(tmp_path / "x.npz", embedding=vectors, path=[row["path"] for row in rows])
    result = result_of(
        capsys, "probe", str(tmp_path / "x.npz"), "--label", "composer", "--min-per-class", "5",
        "--metadata", str(midi_corpus / "metadata.json"),
    )  # fmt: skip
    assert result["accuracy"] == 1.0


def test_retrieve_by_file_and_by_label(embedded, capsys):
    by_path = result_of(capsys, "retrieve", str(embedded / "slices.parquet"))
    assert by_path["n_queries"] == 40 and by_path["n_without"] == 0
    files = str(embedded / "files.parquet")
    by_composer = result_of(capsys, "retrieve", files, "--by", "composer", "-k", "1,3")
    assert by_composer["n_queries"] == 10 and set(by_composer["hits"]) == {"1", "3"}
    assert (
        by_composer["mrr"] > 0.8 > by_composer["chance_mrr"]
    )  # one is slow and low, one fast and high
    against = result_of(
        capsys, "retrieve", str(embedded / "slices.parquet"), "--against", files, "--by", "path"
    )
    assert against["n_candidates"] == 10 and against["n_queries"] == 40


def test_search_finds_the_file_itself_first_and_draws_it(
    midi_corpus, embedded, checkpoint, capsys, tmp_path
):
    query = tmp_path / "Pr\udce9lude.mid"  # a name that is not UTF-8
    shutil.copy(midi_corpus / "presto_3.mid", query)
    common = ["search", str(query), str(embedded / "files.parquet"), "--checkpoint", checkpoint]
    result = result_of(capsys, *common, "-k", "3", "--html", str(tmp_path / "near.html"))
    first = result["hits"][0]
    assert first["path"] == "presto_3.mid" and first["same_file"]
    assert first["score"] == pytest.approx(1, abs=1e-4) and len(result["hits"]) == 3
    quantiles = [hit["quantile"] for hit in result["hits"]]
    assert quantiles == sorted(quantiles, reverse=True) and 0.8 < quantiles[0] <= 1
    page = (tmp_path / "near.html").read_text()
    assert page.count('class="player"') == 4 and "the query itself" in page
    assert "aria-jax search" in page and checkpoint in page  # what made it
    links = [
        unquote(target, errors="surrogateescape")
        for target in re.findall(r'<a href="([^"]+)"', page)
    ]
    assert len(links) == 4 and all((tmp_path / target).is_file() for target in links)
    by_slice = result_of(
        capsys, "search", str(query), str(embedded / "slices.parquet"), "--checkpoint", checkpoint,
        "-k", "2", "--html", str(tmp_path / "slices.html"),
    )  # fmt: skip
    assert "#" in by_slice["hits"][0]["path"]
    assert (tmp_path / "slices.html").read_text().count('class="player"') == 3


def test_slices_pooled_with_their_deviation_are_searched_alike(
    midi_corpus, checkpoint, capsys, tmp_path
):
    out, query = str(tmp_path / "both.parquet"), midi_corpus / "presto_3.mid"
    pooled = ["--checkpoint", checkpoint, "--pool-slices", "mean+std", *SMALL]
    result_of(capsys, "embed", str(midi_corpus), out, *pooled)
    result = result_of(capsys, "search", str(query), out, "--checkpoint", checkpoint, "-k", "1")
    assert result["hits"][0]["same_file"] and result["hits"][0]["score"] == pytest.approx(
        1, abs=1e-4
    )
    table = read_embeddings(out)
    own = aria_jax.embed(checkpoint, query, slice_notes=100, max_tokens=512, pool_slices="mean+std")
    np.testing.assert_allclose(
        own, table.embedding[list(table.path).index(query.name)], rtol=1e-3, atol=1e-5
    )
    assert main(["embed", str(midi_corpus), out, *pooled, "--per-slice"]) == 2
    assert "--per-slice pools nothing" in capsys.readouterr().err


def test_a_page_without_the_midi_files_says_how_to_name_their_folder(
    midi_corpus, embedded, checkpoint, capsys, tmp_path
):
    query, page = str(midi_corpus / "presto_3.mid"), tmp_path / "near.html"
    arguments = ["search", query, str(embedded / "files.parquet"), "--checkpoint", checkpoint,
                 "--html", str(page), "-k", "2", "--midi", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    assert "2 of 2" in (said := capsys.readouterr().err) and "--midi DIR" in said
    assert page.read_text().count('class="player"') == 1 and "--midi DIR" in page.read_text()


def test_every_verb_counts_and_slices_only_notes_with_tokens(tmp_path, checkpoint, capsys):
    """A music box has none: where it begins, ends or interrupts a piece, no slice is left empty."""
    folder, bells = tmp_path / "midi", {"first": (0, 120), "middle": (100, 250), "last": (300, 320)}
    folder.mkdir()
    for seed, (name, (start, stop)) in enumerate(bells.items()):
        performance = random_performance(np.random.default_rng(seed), 320)
        performance.notes["channel"][start:stop] = 1
        programs = np.array([(0, 0, 0), (0, 10, 1)], PROGRAM)
        write_midi(dataclasses.replace(performance, programs=programs), folder / f"{name}.mid")
    args = ["--checkpoint", checkpoint, *SMALL]
    options = ["--filters", "none", "--val-fraction", "0", "--workers", "1"]
    result_of(capsys, "data", "build", str(folder), str(tmp_path / "data"), *options)
    rows = []
    for source in ("midi", "data"):
        out = tmp_path / f"{source}.parquet"
        assert result_of(capsys, "embed", str(tmp_path / source), str(out), *args)["n_files"] == 3
        table = pq.read_table(out, columns=["path", "n_notes", "n_slices"])
        rows.append(sorted(tuple(row.values()) for row in table.to_pylist()))
    expected = []
    for path in sorted(folder.iterdir()):
        n_piano = int((read_midi(path).notes["channel"] == 0).sum())
        expected.append((path.name, n_piano, -(-n_piano // 100)))
    assert rows[0] == rows[1] == expected
    for name in bells:
        found = ["search", str(folder / f"{name}.mid"), str(out.with_name("midi.parquet"))]
        hits = result_of(capsys, *found, "--checkpoint", checkpoint, "-k", "1")["hits"]
        assert hits[0]["score"] == pytest.approx(1, abs=1e-4)


def test_search_refuses_another_models_embeddings(embedded, midi_corpus, tmp_path, capsys):
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=512, head="embedding",
                         emb_size=8)  # fmt: skip
    save_model(tmp_path / "other", build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=1)))
    status = main(
        ["search", str(midi_corpus / "presto_3.mid"), str(embedded / "files.parquet"),
         "--checkpoint", str(tmp_path / "other")]
    )  # fmt: skip
    assert status == 2 and "made by another model" in capsys.readouterr().err


def test_bench_suite_prints_one_table_with_the_papers_rows(
    midi_corpus, checkpoint, embedded, tmp_path, capsys
):
    arguments = [
        "bench-suite", str(midi_corpus), "--out", str(tmp_path), "--checkpoint", checkpoint,
        "--embeddings", f"again={embedded / 'files.parquet'}", "--min-per-class", "5",
        "--classifier", "logistic", "--seeds", "2", *SMALL,
    ]  # fmt: skip
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for name in ("majority class", "pitch-class", "statistics", "untrained", "aria_jax", "again",
                 "aria_jax + statistics"):  # fmt: skip
        assert f"| {name} |" in text
    assert "Aria_Emb (quoted) | 90.50 / 90.49" in text and (tmp_path / "results.md").is_file()
    results = result_of(capsys, *arguments)["results"]  # a second run embeds nothing again
    assert results["again"] == results["aria_jax"]
    assert results["statistics"]["composer"]["accuracy"] == 1.0  # slow and low, or fast and high
    assert len(results["statistics"]["composer"]["accuracies"]) == 2


def test_bench_suite_reads_folders_and_archives_in_place(midi_corpus, checkpoint, tmp_path, capsys):
    """A folder with two data sets, and an archive that is one: tasks of each, sampled."""
    folder, packed = tmp_path / "sets", tmp_path / "more.tar.gz"
    for name in ("asap", "p8"):
        shutil.copytree(midi_corpus, folder / name)
    (folder / "asap" / "broken.mid").write_bytes(b"not MIDI")
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(midi_corpus, ".")
    arguments = [
        "bench-suite", str(folder), str(packed), "--out", str(tmp_path / "out"), "--checkpoint",
        checkpoint, "--min-per-class", "4", "--max-per-class", "4", "--classifier", "knn",
        "--folds", "2", "--seeds", "1", *SMALL,
    ]  # fmt: skip
    result = result_of(capsys, *arguments)
    names = ["asap composer", "more composer", "p8 composer"]
    assert sorted(result["results"]["statistics"]) == names
    assert result["results"]["statistics"]["more composer"]["n_test"] == 8
    assert result["notes"]["more composer"] == ["at most 4 of a class: 8 of 10 files, seed 0"]
    assert result["warnings"][1].startswith("statistics: 1 of 31 files could not be read")
    assert result["warnings"][1] in (tmp_path / "out" / "results.md").read_text()
    counted = read_embeddings(tmp_path / "out" / "statistics.parquet").path
    assert len(counted) == 30 and "more/presto_3.mid" in counted
    assert len(read_embeddings(tmp_path / "out" / "aria_jax.parquet").path) == 24
    assert "knn does not scale" in (tmp_path / "out" / "results.md").read_text()
    (folder / "more").mkdir()
    shutil.copy(midi_corpus / "presto_3.mid", folder / "more" / "presto_3.mid")
    elsewhere = [str(tmp_path / "other") if a == str(tmp_path / "out") else a for a in arguments]
    assert main(elsewhere) == 2
    assert "another source has a file more/presto_3.mid too" in capsys.readouterr().err


def test_classify_answers_for_files_and_scores_them(midi_corpus, tmp_path, capsys):
    """Against each slice by itself, weighted by its tokens."""
    names = ("lento", "presto")
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=512, head="class",
                         class_names=names)  # fmt: skip
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=3))
    save_model(tmp_path / "run", model)
    arguments = ["classify", str(midi_corpus), "--checkpoint", str(tmp_path / "run"), *SMALL]
    scored = ["--label", "composer", "--out", str(tmp_path / "a.jsonl")]
    result = result_of(capsys, *arguments, *scored)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.preset("aria")
    for line in lines[:2]:
        slices = midi_slices(read_midi(midi_corpus / line["path"]), Slicing("aria", 100, 512))
        likely = class_encoder(model, tokenizer.pad_id)(slices)
        expected = np.average(likely, axis=0, weights=[len(ids) for ids in slices])
        np.testing.assert_allclose(list(line["probabilities"].values()), expected, atol=1e-5)
        assert line["answer"] == result["answers"][line["path"]] == names[expected.argmax()]
    right = [line["path"].startswith(line["answer"]) for line in lines]
    assert len(lines) == result["n_scored"] == 10 and result["accuracy"] == np.mean(right)
    assert result["held_out"]["n_scored"] == 10 and "learnt_from" not in result
    assert main([*arguments[:3], "no such run"]) == 2
    assert main([*arguments, "--label", "form"]) == 2
    assert "no file" in capsys.readouterr().err


def test_files_that_the_model_learnt_from_are_scored_apart(
    midi_corpus, tmp_path, capsys, monkeypatch
):
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    build = ["data", "build", str(midi_corpus), data, "--filters", "none", "--workers", "1"]
    built = result_of(capsys, *build, "--val-fraction", "0.4")
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=512, head="class",
                         class_names=("lento", "presto"))  # fmt: skip
    save_model(run, build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=3)))
    trained = dataclasses.replace(load_model(run), corpus=data)
    monkeypatch.setattr("aria_jax.checkpoints.models.load_model", lambda *_, **__: trained)
    classify = ["classify", str(midi_corpus), "--checkpoint", run, "--label", "composer", *SMALL]
    capsys.readouterr()
    assert main([*classify, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["held_out"]["n_scored"] == result["n_scored"] == built["n_val"] > 0
    assert result["learnt_from"]["n_scored"] == built["n_train"]
    assert f"learnt from {built['n_train']} of these files" in shown.err
    assert main([*classify[:1], data, *classify[2:], "--split", "train"]) == 0
    assert "this says nothing of new files" in capsys.readouterr().err
    shutil.rmtree(data)
    assert main(classify) == 0
    assert "does not say which files" in capsys.readouterr().err


def test_one_file_and_a_list_of_files_are_embedded_like_a_folder(midi_corpus, tmp_path, capsys):
    def embed(*sources):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        counted = ["--baseline", "pitch-class", "--workers", "0"]
        assert main(["embed", *map(str, sources), str(out), *counted]) == 0
        table = read_embeddings(out)
        rows = zip(table.path, table.embedding.tolist(), table.labels, strict=True)
        return {path: (vector, labels) for path, vector, labels in rows}

    whole = embed(midi_corpus)
    names = ["presto_1.mid", "lento_0.mid"]
    assert embed(midi_corpus / names[0]) == {names[0]: whole[names[0]]}
    listed = embed(*(midi_corpus / name for name in [*names, names[0]]))
    assert listed == {name: whole[name] for name in names}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.mid").write_bytes((midi_corpus / names[0]).read_bytes())
    mixed = embed(midi_corpus, tmp_path / "more" / "x.mid")
    assert len(mixed) == len(whole) + 1
    assert [v for p, (v, _) in mixed.items() if p.endswith("more/x.mid")] == [whole[names[0]][0]]


@pytest.mark.parametrize(
    "sources, out, message",
    [
        (["{corpus}/none.mid"], "e.parquet", "none.mid: no such file"),
        (["{corpus}/lento_0.mid", "{corpus}/none.mid"], "e.parquet", "none.mid: no such file"),
        (["{corpus}/lento_0.mid", "{corpus}/metadata.json"], "e.parquet", "expected a MIDI file"),
        (["{corpus}"], "e.csv", "e.csv: this will be a Parquet file"),
        (["{corpus}/lento_0.mid"], "lento_1.mid", "this will be a Parquet file"),
    ],
)
def test_what_cannot_be_embedded_is_named(sources, out, message, midi_corpus, tmp_path, capsys):
    given = [source.format(corpus=midi_corpus) for source in sources]
    arguments = ["embed", *given, str(tmp_path / out), "--baseline", "pitch-class"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
