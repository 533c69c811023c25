"""generate, score, classify, listening-test."""

import pytest

from tests.first_hour.uses import Use, wrong

GENERATE = [
    Use("generate --checkpoint {lm} --prompt {piece} --seconds 3 --max-tokens 12 --out out",
        ("out/", "listen:"), made="out"),
    Use("generate --checkpoint {lm} --max-tokens 12 --out out", "notes", made="out"),
    Use("generate --checkpoint {lm} --prompt-ids {ids} --max-tokens 12 --json", '"ids"'),
    wrong("generate --checkpoint {lm} --prompt {silent} --out out --max-tokens 12",
          ("silent.mid", "no notes")),
    wrong("generate --checkpoint {lm} --prompt {piece} --seconds 0 --out out", "0"),
    wrong("generate --checkpoint {lm} --prompt {nothing}.mid --out out", "no such file"),
    wrong("generate --checkpoint {lm} --prompt {data} --out out", "token shards"),
    wrong("generate --checkpoint {lm}", "--out DIR"),
    Use("generate --prompt {piece} --notes 12 --max-tokens 12 --out out", "the released mini",
        made="out"),
    wrong("generate --checkpoint {encoder} --out out", "head"),
    wrong("generate --checkpoint {empty} --out out", "no checkpoint here"),
    wrong("generate --checkpoint {lm} --out afile", "afile", before=(("afile", "x"),)),
    wrong("generate --checkpoint {lm} --out out --mesh tensor=3", ("--mesh", "3")),
    wrong("generate --checkpoint {lm} --out out --temperature -1", "temperature"),
    wrong("generate --checkpoint {lm} --out out.mid", ("out.mid", "this will be a folder")),
]  # fmt: skip

SCORE = [
    Use("score {piece} {query} --checkpoint {lm}", ("nats/token", "lento_0.mid")),
    Use("score {piece} --checkpoint {lm} --json", '"mean_nll"'),
    Use("score {piece} {text} --checkpoint {lm}", ("left out", "text.mid", "1 of 2"), status=1),
    wrong("score {nothing}.mid --checkpoint {lm}", ("nothing.mid", "no such file")),
    wrong("score {empty} --checkpoint {lm}", "no MIDI files"),
    wrong("score {data} --checkpoint {lm}", "token shards"),
    wrong("score {piece} --checkpoint {encoder}", "language model"),
    wrong("score {piece}", "required: --checkpoint"),
    wrong("score {text} --checkpoint {lm}", "none of the 1 files"),
    wrong("score {piece} --checkpoint {lm} --context 1", "context of 1"),
]

CLASSIFY = [
    Use("classify {midi} --checkpoint {classifier} --workers 0", "lento_0.mid"),
    Use("classify {midi} --checkpoint {classifier} --workers 0 --label composer", "accuracy"),
    Use("classify {midi} --checkpoint {classifier} --workers 0 --out a.jsonl", made="a.jsonl"),
    wrong("classify {nothing} --checkpoint {classifier}", ("nothing", "no such folder")),
    wrong("classify {empty} --checkpoint {classifier}", "no MIDI files"),
    wrong("classify {midi} --checkpoint {lm}", "not a class head"),
    wrong("classify {midi} --checkpoint {empty}", "no checkpoint here"),
    wrong("classify {midi} --checkpoint {classifier} --workers 0 --label pianist", "pianist"),
    wrong("classify {midi} --checkpoint {classifier} --out a.csv", ("a.csv", "JSON lines")),
    wrong("classify {midi} --checkpoint {classifier} --out {midi}/a.jsonl", "lies in"),
    wrong(
        "classify {midi} --checkpoint {classifier} --metadata {midi}/metadata.json",
        "--metadata has no effect without --label",
    ),
]

MAKE = "listening-test make clips out --judges 1 --prompt-seconds 2"
PAIR = (("clips/a/x.mid", "-> {piece}"), ("clips/b/x.mid", "-> {piece}"))

LISTENING = [
    Use("listening-test counts 38 0 6", ("38", "6")),
    Use("listening-test counts 38 0 6 --json", '"wins"'),
    Use("listening-test compare {midi} {midi} --json", '"generated"'),
    wrong("listening-test", "required: action"),
    wrong("listening-test mak clips out", "did you mean 'make'?"),
    wrong("listening-test make {nothing} out --ours a --judges 1", "nothing"),
    wrong("listening-test compare {midi} {empty}", "empty"),
    wrong("listening-test analyse {nothing}.json v.json", "no such file"),
    wrong("listening-test counts -1 0 6", "-1"),
    Use(f"{MAKE} --ours a", ("that not every system has are left out: y", "not key.json"),
        made="out/judge-001.html",
        before=(*PAIR, ("clips/a/y.mid", "-> {query}"))),
    Use(f"{MAKE} --ours a --trials 1", "no judge hears c",
        before=(*PAIR, ("clips/c/x.mid", "-> {piece}"))),
    wrong(f"{MAKE} --ours a", ("not the same music in the first 2 s", "y (a and b)"),
          before=(("clips/a/y.mid", "-> {query}"), ("clips/b/y.mid", "-> {piece}"))),
    wrong(f"{MAKE} --ours a", ("x.wav", "x.mid is a clip of that name too"),
          before=(*PAIR, ("clips/a/x.wav", "x"))),
    wrong(f"{MAKE} --ours c", "no folder 'c'; there are a, b", before=PAIR),
    Use("listening-test compare {midi} some", "left out: some/b.mid: no notes",
        before=(("some/a.mid", "-> {piece}"), ("some/b.mid", "-> {silent}"))),
    wrong("listening-test compare {midi} {data}", "token shards"),
]  # fmt: skip


@pytest.mark.parametrize("use", [*GENERATE, *SCORE, *CLASSIFY, *LISTENING], ids=str)
def test_a_newcomer_finds_what_the_table_says(use, run_use):
    run_use(use)
