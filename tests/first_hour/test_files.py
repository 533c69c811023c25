"""tokenize, detokenize, data, tokenizers; and the front page."""

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
    wrong("tokenize {silent}", ("silent.mid: ", "no notes")),
    wrong("tokenize ''", "an argument is empty"),
    wrong("tokenize cut.mid", ("cut.mid: track 2 of 2 is cut", "--repair"),
          before=(("cut.mid", "{piece}[:60]"),)),
    Use("tokenize cut.mid --repair", "cut.mid: repaired", before=(("cut.mid", "{piece}[:900]"),)),
    Use("tokenize 'Étude № 1.mid' --json", '"n_notes": 320',
        before=(("Étude № 1.mid", "-> {piece}"),)),
    wrong("tokenize gone.mid", "gone.mid: no such file", before=(("gone.mid", "-> nowhere"),)),
]  # fmt: skip

DETOKENIZE = [
    Use("detokenize {ids} out.mid", "out.mid: 20 notes", made="out.mid"),
    Use("detokenize {ids} out.midi", "20 notes", made="out.midi"),
    Use("detokenize --help", "usage: aria-jax detokenize"),
    wrong("detokenize {nothing}.json out.mid", ("nothing.json", "no such file")),
    wrong("detokenize {text} out.mid", ("text.mid", "expected token ids as JSON")),
    wrong("detokenize {ids} out.wav", ("out.wav", "MIDI")),
    Use("detokenize {ids} a/new/out.mid", "20 notes", made="a/new/out.mid"),
    wrong("detokenize {ids} afile/out.mid", ("afile", "file"), before=(("afile", "x"),)),
    wrong("detokenize far.json new/out.mid", ("far.json: ", "0..17726"),
          before=(("far.json", "[6, 0, 99999]"),)),
    wrong("detokenize {ids}", "required: out"),
]  # fmt: skip

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
    wrong("data sample out --per-composer 0", "--per-composer must be at least 1"),
    wrong("data sample {data}", "holds a corpus"),
    wrong("data sample {midi}", ("metadata.json", "there already")),
    wrong("data build {midi} out --val-fractoin 0.1", "did you mean '--val-fraction'?"),
    wrong("data build {midi} out --workers 1.5", "--workers '1.5': expected a whole number"),
    wrong("data build {midi} out --metadata m.csv", ("m.csv", "no such file")),
    wrong("data build {midi} out.tar", ("out.tar", "this will be a folder")),
    wrong("data build {midi} {midi}/out", ("lies in", "name a folder outside")),
    wrong("data build {midi} out --filters light", ("filters: none → light", "--overwrite"),
          after=("data build {piece} out --filters none --workers 1",)),
    wrong("data inspect d", "shard format None", before=(("d/manifest.json", "[]"),)),
    wrong("data inspect d", ("says nothing of splits", "build the data again"),
          before=(("d/manifest.json", '{"format_version": 1}'),)),
    wrong("data inspect {data} --plot p.csv", ("p.csv", "picture")),
    wrong("data inspect {data} --plot {data}/p.png", "lies in"),
    Use("data build some out --filters none --workers 1 --max-per-composition 1",
        "1 of 1 pieces have no composition, so no limit", before=(("some/a.mid", "-> {piece}"),)),
    Use("data inspect {data} --plot new/p.png", "pieces", made="new/p.png"),
]  # fmt: skip

COMPARE = "tokenizers compare"

TOKENIZERS = [
    Use("tokenizers list", ("aria", "17,727 ids", "piano-roll")),
    Use("tokenizers list --json", '"hash": "'),
    Use(f"{COMPARE} {{midi}} --tokenizers aria --max-files 2",
        ("tokens/note", "| aria | 17,727 | 2")),
    Use(f"{COMPARE} {{piece}} --tokenizers aria --json", '"n_files": 1'),
    Use(f"{COMPARE} some --tokenizers aria --json",
        ('"n_files": 1', "left out: some/b.mid: not a MIDI file", "some/c.mid: no notes"), 1,
        before=(("some/a.mid", "-> {piece}"), ("some/b.mid", "x"), ("some/c.mid", "-> {silent}"))),
    Use("tokenizers --help", ("usage: aria-jax tokenizers", "example")),
    wrong("tokenizers", "required: {list,compare}"),
    wrong("tokenizers lsit", "did you mean 'list'?"),
    wrong(COMPARE, "required: midi_dir"),
    wrong(f"{COMPARE} {{nothing}}", ("nothing: ", "no such file")),
    wrong(f"{COMPARE} {{empty}}", ("empty: ", "no MIDI files")),
    wrong(f"{COMPARE} {{data}}", "token shards"),
    wrong(f"{COMPARE} {{midi}} --tokenizers arai", ("'arai'", "did you mean 'aria'?")),
    wrong(f"{COMPARE} {{midi}} --max-files 0", "--max-files 0"),
    wrong(f"{COMPARE} {{midi}} --tokenizer aria --maxfiles 2", "did you mean '--max-files'?"),
    wrong(f"{COMPARE} {{text}} --tokenizers aria", ("none of the 1 files", "text.mid: ")),
    wrong(f"{COMPARE} {{midi}} --train 2", "--train needs --out DIR"),
    wrong(f"{COMPARE} {{piece}} --tokenizers musenet --out o", ("made otherwise", "--overwrite"),
          after=(f"{COMPARE} {{piece}} --tokenizers aria --out o",)),
    wrong(f"{COMPARE} {{midi}} --tokenizers aria --out {{midi}}/o", "lies in"),
    wrong(f"{COMPARE} {{midi}} --label composer", "no effect without --train"),
    wrong(f"{COMPARE} some --train 2 --out o --label pianisst",
          ("some: no file has the label 'pianisst'", "did you mean 'pianist'?"),
          before=(("some/a.mid", "-> {piece}"), ("some/metadata.csv", "path,pianist\na.mid,x\n"))),
]  # fmt: skip


@pytest.mark.parametrize("use", [*FRONT, *TOKENIZE, *DETOKENIZE, *DATA, *TOKENIZERS], ids=str)
def test_a_newcomer_finds_what_the_table_says(use, run_use):
    run_use(use)
