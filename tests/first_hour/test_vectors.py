"""embed, probe, retrieve, search, bench-suite."""

import pytest

from tests.first_hour.uses import Use, wrong

EMBED = [
    Use("embed {midi} e.parquet --checkpoint {encoder} --workers 0", "10 rows", made="e.parquet"),
    Use("embed {piece} e.parquet --baseline pitch-class --workers 0", "1 rows", made="e.parquet"),
    Use("embed {piece} {query} e.parquet --baseline statistics --workers 0", "2 rows"),
    Use("embed {data} e.parquet --baseline pitch-class --workers 0", "10 rows"),
    wrong("embed {nothing} e.parquet --baseline pitch-class", ("nothing", "no such file")),
    wrong("embed {empty} e.parquet --baseline pitch-class", "no MIDI files"),
    wrong("embed {midi} e.csv --baseline pitch-class", ("e.csv", "Parquet")),
    wrong("embed {midi} {midi}/e.parquet --baseline pitch-class", ("lies in", "folder outside")),
    wrong("embed {midi} e.parquet --checkpoint {lm}", "not an embedding head"),
    wrong("embed {midi} e.parquet --checkpoint {empty}", "no checkpoint here"),
    Use("embed {midi} e.parquet --workers 0", ("the released mini-embedding", "of 127 notes")),
    wrong("embed {midi} e.parquet --baseline pich-class", "did you mean 'pitch-class'?"),
    wrong("embed {midi} {ids} e.parquet --baseline statistics", "expected a MIDI file"),
    wrong("embed {midi} e.parquet --baseline statistics --slice-notes 0", "--slice-notes 0"),
    wrong("embed {midi} . --baseline statistics", "a folder is here"),
    wrong("embed {midi} e.parquet --baseline statistics --pooling mean", "--pooling has no effect"),
    wrong("embed {midi} e.parquet --baseline statistics --bf16", "--bf16 has no effect"),
    wrong("embed {midi} e.parquet --baseline statistics --host-count 0", "--host-count 0"),
    Use("embed {midi} set --baseline statistics --workers 0 --parts --float16", "10 rows"),
    wrong("embed {midi} e.parquet --baseline statistics --parts", "this will be a folder"),
    wrong("embed {midi} e.parquet --baseline statistics --runner ry", "no 'ry'"),
    wrong("embed {midi} e.parquet --checkpoint {classifier}", ("classifier: ", "head 'class'")),
]

PROBE = [
    Use("probe {counts} --label composer --min-per-class 2 --cv 2", ("accuracy", "macro-F1")),
    Use("probe {vectors} --label composer --min-per-class 2 --cv 2 --json", '"accuracy"'),
    Use("probe {slices} --label composer --min-per-class 2 --readout knn --cv 2", "accuracy"),
    wrong("probe {nothing} --label composer", ("nothing", "no such file")),
    wrong("probe {text} --label composer", "not a Parquet"),
    wrong("probe {counts} --label composr", ("no label 'composr'", "did you mean 'composer'?")),
    wrong("probe {counts}", "required: --label"),
    wrong("probe {counts} --label composer", "two classes of at least 10 files"),
    wrong("probe {counts} --label composer --cv 1 --min-per-class 2", "at least 2 folds"),
    wrong("probe {midi} --label composer", ("folder", "aria-jax embed")),
    wrong("probe {counts} --label composer --plot p.csv", ("p.csv", "picture", "….png")),
]

RETRIEVE = [
    Use("retrieve {slices} --by path", ("MRR", "Hit@1")),
    Use("retrieve {vectors} --by composer", ("MRR", "by composer")),
    Use("retrieve {vectors} --by composer --json", '"mrr"'),
    wrong("retrieve {vectors}", ("--per-slice", "--by composer")),
    wrong("retrieve {vectors} --by composr", ("no label 'composr'", "did you mean 'composer'?")),
    wrong("retrieve {nothing}", ("nothing", "no such file")),
    wrong("retrieve {slices} -k 0", "expected positive numbers"),
    wrong("retrieve {vectors} --against {counts} --by composer", "different widths"),
    wrong("retrieve {slices} --metadata {midi}/metadata.json", "--metadata has no effect without"),
]

SEARCH = [
    Use("search {query} {vectors} --checkpoint {encoder}", "presto_1.mid"),
    Use("search {query} {vectors} --checkpoint {encoder} -k 2 --json", '"hits"'),
    Use("search {query} {vectors} --checkpoint {encoder} --html p.html", "p.html", made="p.html"),
    Use("search {query} {vectors} --checkpoint {encoder} --index", "index: exact, 10 rows"),
    wrong(
        "search {query} {vectors} --checkpoint {encoder} --index x", "no 'x' (one of exact, ivf)"
    ),
    wrong("search {nothing}.mid {vectors} --checkpoint {encoder}", ("nothing", "no such file")),
    wrong("search {text} {vectors} --checkpoint {encoder}", "not a MIDI file"),
    wrong("search {query} {nothing} --checkpoint {encoder}", ("nothing", "no such file")),
    wrong("search {query} {counts} --checkpoint {encoder}", "another model"),
    wrong("search {query} {vectors} --checkpoint {encoder} -k 0", "-k 0"),
    wrong("search {vectors} --checkpoint {encoder}", "required: EMB"),
    wrong("search {query} {vectors} --checkpoint {encoder} --html p.png", ("p.png", "….html")),
    wrong("search {data} {vectors} --checkpoint {encoder}", "token shards"),
]

BENCH_SUITE = [
    Use("bench-suite --help", "usage: aria-jax bench-suite"),
    Use(
        "bench-suite {midi} --out s --min-per-class 2 --workers 0 --seeds 1 --folds 2 "
        "--metadata {midi}/metadata.json",
        ("composer", "statistics", "majority class"),
        made="s",
    ),
    Use("bench-suite {midi} --min-per-class 2 --workers 0 --classifier knn --json", "pitch-class"),
    wrong("bench-suite {nothing} --checkpoint {encoder}", "nothing"),
    wrong("bench-suite {empty} --checkpoint {encoder}", "empty"),
    wrong("bench-suite {midi} --checkpoint", "--checkpoint"),
    wrong("bench-suite", "required"),
    wrong("bench-suite {midi} {nothing}", ("nothing", "no such")),
    wrong("bench-suite {midi} --seeds 0", ("--seeds 0", "1 seed")),
    wrong("bench-suite {midi} --out {midi}/suite", ("lies in", "name a folder outside")),
    wrong("bench-suite {midi} --pooling mean", "--pooling has no effect without --checkpoint"),
    wrong("bench-suite {midi} --chekpoint {encoder}", "did you mean '--checkpoint'?"),
]


@pytest.mark.parametrize("use", [*EMBED, *PROBE, *RETRIEVE, *SEARCH, *BENCH_SUITE], ids=str)
def test_a_newcomer_finds_what_the_table_says(use, run_use):
    run_use(use)
