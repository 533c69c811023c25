"""Mixtures: any rows of any step, shares by weight, each corpus as it is delivered alone."""

import pickle
from functools import partial
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.loaders.mixture import (
    MixedExamples,
    Source,
    common_manifest,
    mixed,
    sources_of,
    written,
)
from data_pipeline.loaders.slice_batches import composition_numbers, contrastive_pairs
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance, write_corpus

COMMON = {"split": "train", "seq_len": 96, "global_batch": 6, "seed": 3}
SLICES = {"min_slice_notes": 8, "max_slice_notes": 40}


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Seven pieces of two works, one of which the corpus has too."""
    folder = tmp_path_factory.mktemp("second")
    rng, tokenizer = np.random.default_rng(1), Tokenizer.preset("aria")
    for split in ("train", "val"):
        pieces = []
        for i in range(7):
            labels = {"composer": "ravel", "composition": ("work 0", "jeux")[i % 2]}
            labels = labels if i < 5 else {"composer": "ravel"}
            ids = tokenizer.encode(random_performance(rng, 60), labels=labels)
            pieces.append((ids, labels))
        write_corpus(folder, split, pieces)
    return folder


@pytest.fixture
def mixture(corpus, second):
    sources = sources_of([f"{corpus}:0.75", f"{second}:0.25"])
    return mixed([lm_windows(source.path, **COMMON) for source in sources], sources)


class Numbers:
    """Examples that say which they are."""

    def __init__(self, n_examples):
        self.n_examples = n_examples

    def batch(self, epochs, indices):
        return {"epoch": epochs, "index": indices}


@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    start=st.integers(0, 10**9),
)
@settings(max_examples=50, deadline=None)
def test_every_corpus_is_seen_in_order_and_by_its_weight(sizes, weights, start):
    examples = MixedExamples([Numbers(n) for n in sizes], weights[: len(sizes)])
    numbers = np.arange(start, start + 400)
    batch = examples.batch(*np.divmod(numbers, examples.n_examples))
    shares = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        rows = batch["source"] == source
        place = batch["epoch"][rows] * size + batch["index"][rows]
        assert (np.diff(place) == 1).all(), "each corpus gives its examples one after the other"
        assert abs(rows.sum() - 400 * share) <= 0.02 * 400 + 2
        if start == 0:
            assert not len(place) or place[0] == 0


def test_any_rows_of_any_step(mixture):
    whole = [mixture[step] for step in range(8)]
    for ranges in (((2, 3),), ((0, 1), (4, 6)), ((1, 1),)):
        chosen = np.concatenate([np.arange(*rows) for rows in ranges])
        for step, batch in enumerate(whole):
            rows = mixture.rows(step, *ranges)
            assert rows.keys() == batch.keys() and rows["source"].dtype == np.int32
            for name in batch:
                np.testing.assert_array_equal(rows[name], batch[name][chosen])
    later = list(islice(mixture.iterate(5), 3))
    for found, batch in zip(later, whole[5:], strict=True):
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])
    again = pickle.loads(pickle.dumps(mixture))
    np.testing.assert_array_equal(again[3]["inputs"], whole[3]["inputs"])


def test_rows_of_a_corpus_are_those_it_gives_alone(mixture, corpus):
    alone = lm_windows(corpus, **COMMON)
    expected = np.concatenate([alone[step]["inputs"] for step in range(12)])
    batches = [mixture[step] for step in range(12)]
    found = np.concatenate([batch["inputs"][batch["source"] == 0] for batch in batches])
    assert len(found) == 54  # three quarters of 72
    np.testing.assert_array_equal(found, expected[:54])


def test_one_corpus_of_any_weight_is_no_mixture(corpus):
    sources = sources_of(f"{corpus}:3")
    stream = lm_windows(corpus, **COMMON)
    assert sources == (Source(corpus, 1.0, ""),) and mixed([stream], sources) is stream


def test_a_work_is_the_same_work_in_every_corpus(corpus, second):
    sources = sources_of([corpus, second])
    numbers = composition_numbers([corpus, second], "train")
    streams = [
        contrastive_pairs(source.path, **COMMON, **SLICES, compositions=of)
        for source, of in zip(sources, numbers, strict=True)
    ]
    parts = [np.concatenate([s[step]["composition"] for step in range(4)]) for s in streams]
    shared = set(parts[0].tolist()) & set(parts[1].tolist())
    assert len(shared) == 1, "work 0, and nothing else"
    batch = mixed(streams, sources)[0]
    assert batch["composition"].tolist() == [*np.ravel(np.stack([parts[0][:3], parts[1][:3]], 1))]
    alone = contrastive_pairs(corpus, **COMMON, **SLICES)
    same = [alone[0]["composition"] == n for n in alone[0]["composition"]]
    np.testing.assert_array_equal(same, [parts[0][:6] == n for n in parts[0][:6]])


def test_weights_are_shares_and_names_tell_corpora_apart(corpus, second, tmp_path):
    a, b = sources_of([f"{corpus}:3", f"{second}:1"])
    assert (a.weight, b.weight, a.name, b.name) == (0.75, 0.25, corpus.name, second.name)
    assert sources_of((a, b)) == (a, b) and sources_of(written((a, b))) == (a, b)
    assert [s.weight for s in sources_of([corpus, second])] == [0.5, 0.5]
    twin = tmp_path / corpus.name
    assert {s.name for s in sources_of([corpus, twin])} == {str(corpus), str(twin)}
    odd = tmp_path / "take:2"
    odd.symlink_to(corpus)
    assert sources_of(str(odd))[0].path == odd, "a folder may have such a name"


@pytest.mark.parametrize(
    "named, words",
    {
        (): "name token shards",
        ("{a}:0.5", "{b}"): "every corpus a weight",
        ("{a}:0", "{b}:1"): "above 0",
        ("{a}:-1", "{b}:1"): "above 0",
        ("{a}:1e999", "{b}:1"): "above 0",
        ("{a}:1", "{a}:2"): "more than once",
    }.items(),
)
def test_mistakes_are_named(named, words, corpus, second):
    with pytest.raises(UserError, match=words):
        sources_of([text.format(a=corpus, b=second) for text in named])


@pytest.mark.parametrize("what", ["tokenizer", "reading"])
def test_ids_that_mean_other_things_are_not_mixed(what, corpus, tmp_path):
    import json

    from data_pipeline.shards import MANIFEST

    manifest = json.loads((corpus / MANIFEST).read_text())
    if what == "tokenizer":
        manifest["tokenizer"] |= {"preset": "aria-pedal", "hash": "0"}
    else:
        manifest["reading"] = "other"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"cannot be mixed: {what}.*build one of them again"):
        common_manifest(sources_of([corpus, tmp_path]))
    assert common_manifest(sources_of(corpus))["tokenizer"]["preset"] == "aria"


def test_workers_change_nothing(corpus, second):
    sources = sources_of([corpus, second])
    make = partial(lm_windows, **COMMON, workers=2)
    stream = mixed([make(source.path) for source in sources], sources)
    for found, step in zip(islice(stream.iterate(2), 2), (2, 3), strict=True):
        for name, rows in stream[step].items():
            np.testing.assert_array_equal(found[name], rows)
