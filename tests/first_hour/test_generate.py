"""generate, score, search, retrieve, probe, classify, convert, listening-test."""

import pytest

from tests.first_hour.uses import Use, wrong

LM, PROMPT = "--checkpoint {lm}", "--prompt {piece} --notes 8"

GENERATE = [
    Use(f"generate {LM} {PROMPT} --max-tokens 12 --out o", ("4 notes", "listen:"), made="o"),
    Use(f"generate {LM} --prompt {{piece}} --notes 150 --max-tokens 200 --json",
        ("of the 512 tokens", "of 200 tokens follow", "--sliding", '"ids"')),
    Use(f"generate {LM} --prompt {{piece}} --seconds 900 --max-tokens 9 --sliding --json",
        "lento_0.mid ends before: all 320 notes of it are the prompt"),
    Use("generate --help", ("--sliding", "context", "max_seq_len")),
    wrong(f"generate {LM} {PROMPT} --given flute --out o",
          ("no track or instrument 'flute'", "its instruments piano")),
    wrong(f"generate {LM} --prompt {{silent}} --out o", ("silent.mid", "no notes")),
    wrong(f"generate {LM} --prompt {{piece}} --seconds 0 --out o", "holds nothing to continue"),
    wrong(f"generate {LM} --prompt {{piece}} --notes 300 --out o", ("of the 512", "--sliding")),
    wrong(f"generate {LM} {PROMPT} --cfg 2 --out o", "--cfg has no effect without --embedding"),
    wrong(f"generate {LM} --seconds 5 --out o", "--seconds has no effect without --prompt"),
    wrong(f"generate {LM} {PROMPT} --temperature 0 --top-p 0.9 --out o", "--top-p has no effect"),
    wrong(f"generate {LM} {PROMPT}", "--out DIR"),
    wrong("generate --checkpoint {encoder} --out o", "head 'embedding'"),
    wrong("generate {piece} --out o", ("unknown argument", "did you mean --prompt", "lento_0.mid")),
    wrong("generate --prompt -x.mid --out o", "looks like an option: write --prompt=-x.mid"),
    wrong(f"generate {LM} --prompt {{ids}} --out o", ("ids.json", "not a MIDI file")),
    wrong(f"generate {LM} --prompt-ids {{piece}} --out o", ("lento_0.mid", "token ids as JSON")),
    wrong(f"generate {LM} {PROMPT} --mesh foo --out o", "--mesh foo: expected AXIS=N"),
    wrong(f"generate {LM} {PROMPT} --n 200000000 --out o", ("--n 200000000", "at most 10,000")),
    wrong(f"generate {LM} {PROMPT} --out afile/o", "afile/o", before=(("afile", "x"),)),
    wrong(f"generate {LM} {PROMPT} --n 0 --out o", "--n 0"),
    wrong("generate --checkpoint minni --out o", ("minni", "no checkpoint here")),
]  # fmt: skip

SCORE = [
    Use(f"score {{piece}} {{nothing}}.mid {{silent}} {LM}",
        ("nats/token", "nothing.mid: no such file", "silent.mid: ", "2 of 3 files left out"), 1),
    Use(f"score {{ids}} {LM} --json", '"mean_nll"'),
    Use("score --help", ("usage: aria-jax score", "left out")),
    wrong(f"score {{nothing}}.mid {LM}", "no such file"),
    wrong(f"score {{text}} {LM}", ("text.mid", "none of the 1 files")),
    wrong(f"score {{empty}} {LM}", ("empty", "no MIDI files")),
    wrong("score {piece} --checkpoint {encoder}", "language model"),
    wrong("score {piece} --checkpoint {nothing}", "nothing"),
    wrong("score {piece} --checkpoint {classifier}", ("classifier: ", "head 'class'")),
    wrong(f"score {{piece}} {LM} --context 0", "--context 0"),
    wrong(f"score {{piece}} {LM} --context 9999", "sees 512 tokens"),
]  # fmt: skip

NEIGHBOURS = [
    Use("search {query} {vectors} --checkpoint {encoder} -k 2 --html near.html",
        ("further apart", "the query itself", "page: near.html"), made="near.html"),
    Use("search {query} {slices} --checkpoint {encoder} --json", '"quantile"'),
    Use("search {query} {vectors} --checkpoint {encoder} --html near.html --midi {empty}",
        ("without music", "--midi DIR"), made="near.html"),
    Use("search {query} {vectors} --checkpoint {encoder} -k 50", "has 10 rows, which are all here"),
    wrong("search {text} {vectors} --checkpoint {encoder}", ("text.mid", "not a MIDI file")),
    wrong("search {query} {nothing} --checkpoint {encoder}", "nothing"),
    wrong("search {query} {counts} --checkpoint {encoder}", "another model"),
    wrong("search {query} {vectors} --checkpoint {encoder} -k 0", "at least 1"),
    wrong("search {query} {vectors} --checkpoint {lm}", ("lm: ", "not an embedding head")),
    wrong("search {silent} {vectors} --checkpoint {encoder}", ("silent.mid: ", "no notes")),
    wrong("search {query} {vectors} --checkpoint {encoder} --midi {midi}", "without --html"),
    wrong("search {query} {vectors} --checkpoint {encoder} -k x", "-k 'x': expected a whole"),
    wrong("retrieve {vectors} --by composer --metadata no.csv", ("no.csv", "no such file")),
    Use("retrieve {slices} --by path", "MRR"),
    Use("retrieve {vectors} --by composer --json", '"mrr"'),
    wrong("retrieve {vectors}", ("--per-slice", "--by")),
    wrong("retrieve {vectors} --by form", "no label 'form'"),
    wrong("retrieve {vectors} --by composer -k x", "expected positive numbers"),
]  # fmt: skip

LABELS = [
    Use("probe {vectors} --label composer --min-per-class 5 --cv 2", ("accuracy", "majority")),
    Use("probe {counts} --label composer --min-per-class 4 --cv 2 --classifier knn --json",
        '"classifier": "knn"'),
    wrong("probe {vectors} --label form", "no label 'form'"),
    wrong("probe {vectors} --label composer", "two classes of at least 10"),
    wrong("probe {text} --label composer", "text.mid"),
    wrong("probe {vectors} --label composer --few-shot 0", "--few-shot 0: expected positive"),
    wrong("probe {vectors} --label composer --group-column pianst", "no label 'pianst'"),
    wrong("probe {vectors} --label composition --min-per-class 1 --cv 2",
          "2 folds need 2 compositions, and as many files of a class"),
    wrong("classify {text} --checkpoint {classifier} --workers 0",
          ("none of the 1 files could be read", "not a MIDI file")),
    wrong("classify {piece} --checkpoint {classifier} --workers 0 --split test",
          ("--split test", "no file has a label split")),
    wrong("classify {midi} --checkpoint {classifier} --workers -1", "--workers -1"),
    wrong("classify {midi} --checkpoint {classifier} --slice-notes 0", "--slice-notes 0"),
    Use("classify {midi} --checkpoint {classifier} --label composer --workers 0",
        ("accuracy", "does not say which files it learnt from")),
    wrong("classify {nothing} --checkpoint {classifier}", "nothing"),
    wrong("classify {midi} --checkpoint {classifier} --label form --workers 0", "no file"),
]  # fmt: skip

OTHERS = [
    Use("convert to-safetensors {lm} lm.safetensors", "parameters", made="lm.safetensors"),
    wrong("convert merge {lm} whole", "no adapters to merge"),
    wrong("convert to-safetensors {lm} lm.bin", "ends in .safetensors"),
    wrong("convert adapters {lm} a.safetensors", "no adapters"),
    wrong("convert merge {nothing}.safetensors whole", "--base"),
    Use("listening-test counts 38 0 6 --judgements 44", "9.43e-07"),
    Use("listening-test counts 38 0 6 --participants 46", ("9.43e-07", "44 of the 46")),
    wrong("listening-test counts 49 1 0 --participants 46", "50 judgements of 46"),
    wrong("listening-test counts 38 0 6 --judgements 46", "but 46 were made"),
    wrong("listening-test make {empty} study --ours a --judges 2", "two systems"),
    wrong("listening-test analyse {ids} {ids}", "not the key"),
    wrong("listening-test analyse {midi} {ids}", "a folder is here"),
    wrong("listening-test make {midi} study --ours a --judges 0", "--judges 0 must be at least 1"),
    wrong("listening-test make {midi} study --ours a --judges 1 --trials 0", "--trials 0"),
    wrong("listening-test make {midi} {midi}/study --ours a --judges 1", "lies in"),
    wrong("listening-test compare {midi} {nothing}", "nothing: no such folder"),
    wrong("listening-test compare {midi} {piece}", ("lento_0.mid", "a folder of MIDI files")),
    wrong("listening-test compare {midi} {midi} --checkpoint {lm}", ("lm: ", "embedding head")),
    wrong("convert to-safetensors {lm} m.safetensors --compact", "--compact has no effect"),
    wrong("convert from-safetensors {text} out --n-heads 0", "--n-heads 0 must be at least 1"),
    wrong("convert adapters {text} a.safetensors", ("text.mid", "workdir")),
    wrong("detokenize ids.json out.mid", "no notes", before=(("ids.json", "[6, 0, 1]"),)),
    Use("data build {midi} out --filters thresholds.json", ("none of 10 files", "rejected.jsonl"),
        2, made="out/rejected.jsonl", before=(("thresholds.json",
        '{"total_note_frequency": {"min_per_second": 98, "max_per_second": 99}}'),)),
]  # fmt: skip


@pytest.mark.parametrize("use", [*GENERATE, *SCORE, *NEIGHBOURS, *LABELS, *OTHERS], ids=str)
def test_a_newcomer_finds_what_the_table_says(use, run_use):
    run_use(use)
