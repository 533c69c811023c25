"""tokenize, detokenize, data; and the front page."""

import pytest

from tests.first_hour.uses import Use, wrong

FRONT = [
    Use("", ("usage: aria-jax", "tokenize", "listening-test")),
    Use("--help", "aria-jax VERB --help"),
    Use("--version", "aria-jax 0."),
    wrong("trian", "did you mean 'train'?"),
    wrong("embedd {midi} e.parquet", "did you mean 'embed'?"),
    wrong("xyzzy", ("unknown verb 'xyzzy'", "--help")),
    wrong("--verbose", "unknown verb '--verbose'"),
    wrong("tokenize", "required: file"),
]

TOKENIZE = [
    Use("tokenize {piece}", "6 "),
    Use("tokenize {piece} --json", ('"ids": [', '"n_notes": 320')),
    Use("tokenize --help", ("usage: aria-jax tokenize", "example")),
    wrong("tokenize {nothing}.mid", ("nothing.mid", "no such file")),
    wrong("tokenize {text}", ("text.mid", "not a MIDI file")),
    wrong("tokenize {midi}", "folder"),
    wrong("tokenize {piece} --preset aira", ("no tokenizer preset 'aira'", "did you mean 'aria'?")),
    wrong("tokenize {piece} --jsno", ("unknown argument --jsno", "did you mean '--json'?")),
    wrong("tokenize {data}", "token shards"),
]

DETOKENIZE = [
    Use("detokenize {ids} out.mid", "out.mid: 20 notes", made="out.mid"),
    Use("detokenize {ids} out.midi", "20 notes", made="out.midi"),
    Use("detokenize --help", "usage: aria-jax detokenize"),
    wrong("detokenize {nothing}.json out.mid", ("nothing.json", "no such file")),
    wrong("detokenize {text} out.mid", ("text.mid", "expected token ids as JSON")),
    wrong("detokenize {ids} out.wav", ("out.wav", "MIDI")),
    wrong("detokenize {ids} no/such/out.mid", "cannot write"),
    wrong("detokenize {ids}", "required: out"),
]

DATA = [
    Use("data build {midi} out --filters none", ("10 of 10 files", "train"), made="out"),
    Use("data inspect {data}", ("pieces", "composer", "presto")),
    Use("data inspect {data} --json", '"n_pieces"'),
    Use("data build --help", ("usage: aria-jax data build", "rejected.jsonl")),
    wrong("data build {nothing} out", ("nothing", "no such folder")),
    wrong("data build {empty} out", ("empty", "no MIDI files")),
    wrong("data build {midi} afile", "afile", before=(("afile", "x"),)),
    wrong(
        "data build {midi} mine",
        ("mine: holds MIDI files (a.mid, …)", "a folder of its own"),
        before=(("mine/a.mid", "x"),),
    ),
    wrong("data build {midi} {lm}", "holds a training run"),
    wrong("data build {midi} out --dedup fuzzy", "must be one of exact, near, none"),
    wrong("data build {midi} out --val-fraction 2", "val_fraction is 2.0"),
    wrong("data build {midi} out --filters strict", "no filter preset"),
    wrong("data biuld {midi} out", "did you mean 'build'?"),
    wrong("data inspect {midi}", "no token shards here"),
    wrong("data inspect {nothing}", ("nothing", "no such folder")),
    wrong("data build {data} out", "token shards"),
    wrong("data sample afile", "is a file", before=(("afile", "x"),)),
]


@pytest.mark.parametrize("use", [*FRONT, *TOKENIZE, *DETOKENIZE, *DATA], ids=str)
def test_a_newcomer_finds_what_the_table_says(use, run_use):
    run_use(use)
