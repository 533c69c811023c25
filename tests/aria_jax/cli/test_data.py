"""`aria-jax data` as a user runs it."""

import json

import numpy as np
import pytest
from matplotlib import rc_context

from aria_jax.cli.main import main
from data_pipeline.filters import PRESETS
from data_pipeline.midi import PROGRAM, Performance, read_midi, write_midi
from data_pipeline.shards import rejections
from tests.corpora import random_performance


@pytest.fixture
def built(midi_corpus, tmp_path, capsys):
    assert main(["data", "build", str(midi_corpus), str(tmp_path / "d"), "--json"]) == 0
    return tmp_path / "d", json.loads(capsys.readouterr().out)


def test_build_reports_what_it_made(built):
    _, summary = built
    assert (summary["n_files"], summary["n_accepted"], summary["n_rejected"]) == (10, 10, 0)
    assert summary["n_notes"] == 10 * 320 and summary["n_train"] + summary["n_val"] == 10


def test_inspect_shows_the_label_table_and_saves_a_picture(built, tmp_path, capsys):
    out, summary = built
    picture = tmp_path / "lengths.png"
    assert main(["data", "inspect", str(out), "--plot", str(picture)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["composer:", "2", "values", "on", "10", "pieces"] in rows
    for composer in ("lento", "presto"):
        assert [composer, "5", "50.0", "%", "#" * 40] in rows
    (total,) = [row for row in rows if row[:1] == ["total"]]
    numbers = [10, round(summary["hours"], 1), summary["n_notes"], summary["n_tokens"]]
    assert [float(n.replace(",", "")) for n in total[1:]] == numbers
    assert ["rejected:", "nothing"] in rows
    (split,) = (line for line in rows if line[:2] == ["labels:", "pieces"])
    (composer,) = (line for line in rows if line[:1] == ["composer"])
    assert split[2:] == ["train", "val", "total"] and composer[-3:] == ["10", "100.0", "%"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with rc_context({"svg.fonttype": "none"}):
        assert main(["data", "inspect", str(out), "--plot", str(tmp_path / "lengths.svg")]) == 0
    assert "aria-jax data inspect" in (tmp_path / "lengths.svg").read_text()
    assert main(["data", "inspect", str(out), "--plot", str(tmp_path / "lengths.csv")]) == 2
    assert "lengths.csv: this will be a picture" in capsys.readouterr().err
    assert main(["data", "inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(s["n_tokens"] for s in found["splits"].values()) == summary["n_tokens"]
    assert sum(found["length_histogram"].values()) == 10


def test_rejections_are_counted_and_named(midi_corpus, tmp_path, capsys):
    thresholds = tmp_path / "mine.json"
    thresholds.write_text('{"total_note_frequency": {"min_per_second": 4, "max_per_second": 99}}')
    arguments = ["--filters", str(thresholds), "--val-fraction", "0"]
    assert main(["data", "build", str(midi_corpus), str(tmp_path / "d"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "5 of 10 files" in shown and "5 rejected (filter/total_note_frequency 5)" in shown
    assert main(["data", "inspect", str(tmp_path / "d")]) == 0
    inspected = capsys.readouterr().out
    assert "rejected: 5 files" in inspected and "filter/total_note_frequency" in inspected
    left_out = [row["path"] for row in rejections(tmp_path / "d")]
    assert len(left_out) == 5 and all(path.startswith("lento_") for path in left_out)


def test_a_corpus_of_no_pieces_is_no_success(midi_corpus, tmp_path, capsys):
    thresholds = tmp_path / "mine.json"
    thresholds.write_text('{"total_note_frequency": {"min_per_second": 98, "max_per_second": 99}}')
    out = tmp_path / "d"
    for _ in range(2):  # a second start has the same answer
        arguments = ["data", "build", str(midi_corpus), str(out), "--filters", str(thresholds)]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "none of 10 files" in said and "filter/total_note_frequency 10" in said
        assert str(out / "rejected.jsonl") in said and "--filters none" in said
        assert [path.name for path in out.iterdir()] == ["rejected.jsonl"]
        assert len((out / "rejected.jsonl").read_text().splitlines()) == 10
    assert main(["data", "build", str(midi_corpus), str(out), "--filters", "none"]) == 0


def test_cleaning_and_deduplication_are_options(tmp_path, capsys):
    folder, rng = tmp_path / "midi", np.random.default_rng(0)
    folder.mkdir()
    performance = random_performance(rng, 300)
    shifted = performance.notes.copy()
    shifted["pitch"] += 2
    programs = np.array([(0, 40, 1)], PROGRAM)  # a violin on another channel
    violin = performance.notes[:10].copy()
    violin["channel"] = 1
    both = np.concatenate([performance.notes, violin])
    both = both[np.argsort(both["start"], kind="stable")]
    write_midi(Performance(500, both, programs=programs), folder / "a.mid")
    write_midi(Performance(500, shifted), folder / "b.mid")
    options = ["--remove-instruments", "strings", "--dedup", "near", "--filters", "none"]
    assert main(["data", "build", str(folder), str(tmp_path / "d"), *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rejected"] == {"dedup/near-duplicate": 1}
    assert summary["n_notes"] == np.count_nonzero(read_midi(folder / "a.mid").notes["channel"] == 0)
    assert main(["data", "build", str(folder), str(tmp_path / "e"), "--dedup", "fuzzy"]) == 2
    assert "must be one of exact, near, none" in capsys.readouterr().err
    wrong = ["--remove-instruments", "violin"]
    assert main(["data", "build", str(folder), str(tmp_path / "e"), *wrong]) == 2
    assert "no instrument violin" in capsys.readouterr().err
    wrong = ["--pedal-threshold", "100", "--pedal-hysteresis", "30"]
    assert main(["data", "build", str(folder), str(tmp_path / "e"), *wrong]) == 2
    assert "pedal threshold 100 ± hysteresis 30" in capsys.readouterr().err


def test_help_tells_the_thresholds_of_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["data", "build", "--help"])
    shown = capsys.readouterr().out
    for name, thresholds in PRESETS["heavy"].items():
        assert name in shown and all(
            threshold in shown for threshold in thresholds if threshold != "test_params_list"
        )


def test_an_error_is_all_that_is_shown(tmp_path, capsys):
    assert main(["data", "build", str(tmp_path / "none"), str(tmp_path / "d")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1


def test_an_unknown_runner_is_explained(midi_corpus, tmp_path, capsys):
    arguments = ["data", "build", str(midi_corpus), str(tmp_path / "d"), "--runner", "slurm"]
    assert main(arguments) == 2
    assert "runner is 'slurm', must be one of local, ray" in capsys.readouterr().err
