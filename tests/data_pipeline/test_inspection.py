"""What `inspect` says of a corpus is what its shards hold."""

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.inspection import inspect
from data_pipeline.shards import TokenShards
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance, write_corpus


def pieces(corpus):
    tokenizer = Tokenizer.preset("aria")
    shards = [TokenShards(corpus, split, tokenizer) for split in ("train", "val")]
    return [s[i] for s in shards for i in range(len(s))]


def test_counts_are_those_of_the_records(corpus):
    found, records = inspect(corpus), pieces(corpus)
    n_notes = [Tokenizer.preset("aria").n_notes(record.ids) for record in records]
    assert sum(s["n_tokens"] for s in found.splits.values()) == sum(len(r.ids) for r in records)
    assert sum(s["n_notes"] for s in found.splits.values()) == sum(n_notes)
    assert found.kinds["note"] == found.kinds["onset"] == found.kinds["dur"] == sum(n_notes)
    assert sum(found.kinds.values()) == sum(len(r.ids) for r in records)
    assert (found.notes_quantiles[0], found.notes_quantiles[-1]) == (min(n_notes), max(n_notes))
    composers = [r.meta["labels"]["composer"] for r in records]
    assert found.labels["composer"] == {c: composers.count(c) for c in set(composers)}


def test_coverage_counts_the_pieces_that_have_a_label(tmp_path):
    ids = Tokenizer.preset("aria").encode(random_performance(np.random.default_rng(0), 20))
    labels = [{"mood": "sad"}, {"mood": "glad", "form": "fugue"}, {}, {}]
    write_corpus(tmp_path, "train", [(ids, row) for row in labels])
    write_corpus(tmp_path, "val", [(ids, {"form": "waltz"})], n_shards=1)
    found = inspect(tmp_path).coverage
    assert list(found) == ["form", "mood"]
    assert found["mood"] == {
        "train": {"n_pieces": 2, "percent": 50.0},
        "val": {"n_pieces": 0, "percent": 0.0},
        "total": {"n_pieces": 2, "percent": 40.0},
    }
    assert found["form"]["val"] == {"n_pieces": 1, "percent": 100.0}


def test_every_piece_is_in_one_class_of_lengths(corpus):
    lengths = np.array([len(record.ids) for record in pieces(corpus)])
    for bound, count in inspect(corpus).length_histogram.items():
        assert count == np.count_nonzero((lengths >= bound // 2) & (lengths < bound))
    assert sum(inspect(corpus).length_histogram.values()) == len(lengths)


def test_token_kinds_are_of_the_sampled_pieces_only(corpus):
    few, all_pieces = inspect(corpus, sampled_pieces=1), inspect(corpus)
    assert 0 < few.kinds["note"] < all_pieces.kinds["note"]
    assert few.splits == all_pieces.splits


def test_a_corpus_that_lost_its_rejections_is_explained(corpus, tmp_path):
    for file in corpus.iterdir():
        if file.name != "rejected.jsonl":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"rejected\.jsonl: missing; build the corpus again"):
        inspect(tmp_path)


def test_a_folder_without_shards_is_explained(tmp_path):
    with pytest.raises(UserError, match="no token shards here"):
        inspect(tmp_path)
