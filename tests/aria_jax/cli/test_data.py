"""`aria-jax data` as a user runs it."""

import json

import pytest

from aria_jax.cli.main import main
from data_pipeline.shards import rejections


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
    text = capsys.readouterr().out
    assert "composer: 2 values" in text and "lento 5" in text and "presto 5" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
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
    left_out = [row["path"] for row in rejections(tmp_path / "d")]
    assert len(left_out) == 5 and all(path.startswith("lento_") for path in left_out)


def test_an_error_is_all_that_is_shown(tmp_path, capsys):
    assert main(["data", "build", str(tmp_path / "none"), str(tmp_path / "d")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1


def test_an_unknown_runner_is_explained(midi_corpus, tmp_path, capsys):
    arguments = ["data", "build", str(midi_corpus), str(tmp_path / "d"), "--runner", "slurm"]
    assert main(arguments) == 2
    assert "runner is 'slurm', must be one of local, ray" in capsys.readouterr().err
