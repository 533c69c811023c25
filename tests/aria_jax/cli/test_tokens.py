"""`aria-jax tokenize` and `detokenize`: there and back, and what users get wrong."""

import gzip
import json

import numpy as np
import pytest

from aria_jax.cli.main import main
from data_pipeline.midi import NOTE, PROGRAM, Performance, read_midi, write_midi
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind


@pytest.fixture
def piece(midi_corpus):
    return midi_corpus / "presto_1.mid"


def test_one_line_and_json_hold_the_same_ids(piece, capsys):
    assert main(["tokenize", str(piece)]) == 0
    line = capsys.readouterr().out
    assert main(["tokenize", str(piece), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert line.count("\n") == 1 and [int(i) for i in line.split()] == result["ids"]
    assert result["ids"] == Tokenizer.preset("aria").encode(read_midi(piece)).tolist()
    assert result["n_notes"] == 320


@pytest.mark.parametrize("verb", ["tokenize", "detokenize", "embed", "data build"])
def test_names_need_not_be_utf8(piece, tmp_path, capsys, verb):
    """And files may be compressed."""
    folder = tmp_path / "Caf\udce9"
    folder.mkdir()
    file = folder / "Pr\udce9lude.mid.gz"
    file.write_bytes(gzip.compress(piece.read_bytes()))
    ids = Tokenizer.preset("aria").encode(read_midi(piece)).tolist()
    (folder / "ids\udce9.json").write_text(json.dumps(ids))
    arguments = {
        "tokenize": [file],
        "detokenize": [folder / "ids\udce9.json", folder / "out\udce9.mid"],
        "embed": [
            folder, tmp_path / "out\udce9" / "x.parquet",
            "--baseline", "pitch-class", "--workers", "0",
        ],
        "data build": [folder, tmp_path / "out\udce9"],
    }[verb]  # fmt: skip
    for options in ([], ["--json"][: verb != "detokenize"]):
        assert main([*verb.split(), *map(str, arguments), *options]) == 0
        capsys.readouterr().out.encode()
    missing = [*verb.split(), str(tmp_path / "\udce9.mid"), *map(str, arguments[1:])]
    assert main(missing) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_solo_piano_leaves_other_instruments_out(tmp_path, capsys):
    notes = np.array([(60, 64, 0, 0, 100), (62, 64, 1, 0, 100), (40, 64, 9, 0, 100)], NOTE)
    programs = np.array([(0, 0, 0), (0, 40, 1)], PROGRAM)
    write_midi(Performance(500, notes, programs=programs), tmp_path / "band.mid")
    for options, n in (([], 3), (["--solo-piano"], 1)):
        assert main(["tokenize", str(tmp_path / "band.mid"), "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["n_notes"] == n


def test_only_notes_with_tokens_are_counted(tmp_path, capsys):
    """As `data build` and `embed` count them: not the bells', nor a drum of no pitch we have."""
    notes = np.array([(60, 64, 0, 0, 100), (62, 64, 1, 0, 100), (5, 64, 9, 0, 100)], NOTE)
    write_midi(
        Performance(500, notes, programs=np.array([(0, 14, 1)], PROGRAM)), tmp_path / "x.mid"
    )
    assert main(["tokenize", str(tmp_path / "x.mid"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_notes"] == 1


def test_a_reading_is_chosen_and_told(tmp_path, capsys):
    notes = np.array([(60, 64, 0, 0, 100), (62, 64, 0, 1000, 1100)], NOTE)
    programs = np.array([(0, 0, 0), (500, 40, 0)], PROGRAM)  # a piano, then a violin
    write_midi(Performance(500, notes, programs=programs), tmp_path / "a.mid")
    tokenizer = Tokenizer.preset("aria")
    for options, reading, first in (
        ([], "standard", "piano"),
        (["--compat", "aria-utils"], "aria-utils", "strings"),
    ):
        assert main(["tokenize", str(tmp_path / "a.mid"), "--json", *options]) == 0
        result = json.loads(capsys.readouterr().out)
        note = next(i for i in result["ids"] if tokenizer.kind[i] == Kind.NOTE)
        assert (result["reading"], tokenizer.tokens[note][0]) == (reading, first)
    assert main(["tokenize", str(tmp_path / "a.mid"), "--compat", "mido"]) == 2
    shown = capsys.readouterr().err
    assert "no 'mido'" in shown and "aria-utils" in shown and len(shown.splitlines()) == 1


def test_a_cut_file_is_repaired_on_request(piece, tmp_path, capsys):
    (tmp_path / "cut.mid").write_bytes(piece.read_bytes()[:1000])
    assert main(["tokenize", str(tmp_path / "cut.mid")]) == 2
    assert "is cut after" in capsys.readouterr().err
    assert main(["tokenize", str(tmp_path / "cut.mid"), "--repair", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert 0 < result["n_notes"] < 320
    assert "is cut after" in result["repaired"] and result["repaired"] in err
    assert main(["tokenize", str(piece), "--repair", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["repaired"] == "" and not err


@pytest.mark.parametrize("preset", ["aria", "pedal"])
@pytest.mark.parametrize("bare", [False, True])
def test_ids_become_midi_that_has_the_same_ids_up_to_quantisation(
    piece, tmp_path, capsys, preset, bare
):
    assert main(["tokenize", str(piece), "--json", "--preset", preset]) == 0
    result = json.loads(capsys.readouterr().out)
    (tmp_path / "ids.json").write_text(json.dumps(result["ids"] if bare else result))
    arguments = [str(tmp_path / "ids.json"), str(tmp_path / "out.mid"), "--preset", preset]
    assert main(["detokenize", *arguments]) == 0
    tokenizer, ids = Tokenizer.preset(preset), np.array(result["ids"])
    again = tokenizer.encode(read_midi(tmp_path / "out.mid")).astype(int)
    # A duration rounded up can reach past the next onset of its pitch; MIDI has no such overlap,
    # so the note ends there, one step of 10 ms earlier. Everything else is exactly the same.
    duration = tokenizer.kind[ids] == Kind.DUR
    np.testing.assert_array_equal(again[~duration], ids[~duration])
    assert set(ids[duration] - again[duration]) <= {0, 1}


@pytest.mark.parametrize("ids", [[], [0], [6, 0, 1], [0, 826, 17227, 16776]])
def test_ids_without_notes_are_refused(ids, tmp_path, capsys):
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    assert main(["detokenize", str(tmp_path / "ids.json"), str(tmp_path / "out.mid")]) == 2
    assert "ids.json: no notes" in capsys.readouterr().err
    assert not (tmp_path / "out.mid").exists()


@pytest.mark.parametrize(
    "content, message",
    [('{"ids": [6, 0', "expected token ids"), ('{"notes": []}', "expected token ids"),
     ("[1.5]", "expected token ids"), ("[-1]", "must lie in 0..17726"),
     ("[17727]", "must lie in 0..17726")],
)  # fmt: skip
def test_unusable_ids_are_explained(content, message, tmp_path, capsys):
    (tmp_path / "ids.json").write_text(content)
    assert main(["detokenize", str(tmp_path / "ids.json"), str(tmp_path / "out.mid")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.mid").exists()


def test_a_folder_that_is_not_there_is_made_and_a_file_in_its_place_explained(tmp_path, capsys):
    (tmp_path / "ids.json").write_text("[6, 0, 826, 17227, 16776, 1]")
    assert main(["detokenize", str(tmp_path / "ids.json"), str(tmp_path / "new" / "o.mid")]) == 0
    assert (tmp_path / "new" / "o.mid").is_file()
    in_a_file = str(tmp_path / "ids.json" / "o.mid")
    assert main(["detokenize", str(tmp_path / "ids.json"), in_a_file]) == 2
    assert "ids.json" in capsys.readouterr().err
