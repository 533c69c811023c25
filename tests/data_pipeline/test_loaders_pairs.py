"""Pairs are two slices of one performance, and show nothing but its notes."""

from itertools import islice

import numpy as np
import pytest

from data_pipeline.loaders.slice_batches import contrastive_pairs
from data_pipeline.shards import TokenShards
from data_pipeline.slices import random_slice
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind

TOKENIZER = Tokenizer.preset("aria")
SETTINGS = {"split": "train", "seq_len": 512, "global_batch": 23, "seed": 5}
LIMITS = {"min_slice_notes": 20, "max_slice_notes": 60}


def note_rows(ids):
    notes = TOKENIZER.decode(ids).notes
    return np.stack([notes["start"], notes["pitch"], notes["velocity"], notes["end"]], axis=1)


def find(part, whole):
    """Where in `whole` the notes of `part` stand, onsets counted from the first of them."""
    for start in range(len(whole) - len(part) + 1):
        candidate = whole[start : start + len(part)].copy()
        candidate[:, [0, 3]] -= candidate[0, 0]
        if np.array_equal(candidate, part):
            return start
    return None


def slices(corpus, **settings):
    """(place of first slice, its notes, place of second, its notes, notes of the piece) by row."""
    shards = TokenShards(corpus, "train")
    wholes = [note_rows(shards[i].ids) for i in range(len(shards))]
    batch = next(contrastive_pairs(corpus, **SETTINGS, **LIMITS, **settings).iterate())
    for pair, eos in zip(batch["tokens"], batch["eos"], strict=True):
        views = [note_rows(row[: end + 1]) for row, end in zip(pair, eos, strict=True)]
        for row, end in zip(pair, eos, strict=True):
            assert row[end] == TOKENIZER.eos_id and (row[end + 1 :] == TOKENIZER.pad_id).all()
        places = [[find(view, whole) for view in views] for whole in wholes]
        (piece,) = [i for i, found in enumerate(places) if None not in found]
        yield places[piece][0], len(views[0]), places[piece][1], len(views[1]), len(wholes[piece])


def test_both_slices_come_from_one_piece_within_the_limits(corpus):
    rows = list(slices(corpus))
    for _, first, _, second, whole in rows:
        for length in (first, second):
            assert min(20, whole) <= length <= 60
    assert len({whole for *_, whole in rows}) > 15  # every piece once, not one many times
    assert sum(a != b for a, _, b, _, _ in rows) > 15


def test_consecutive_slices_follow_each_other(corpus):
    for start, length, following, second, whole in slices(corpus, consecutive=True):
        assert following == start + length
        assert following + second <= whole


def test_slices_start_at_zero_and_tell_no_label(corpus):
    batch = next(contrastive_pairs(corpus, **SETTINGS, **LIMITS).iterate())
    piano = TOKENIZER.id_of(("prefix", "instrument", "piano"))
    for row in batch["tokens"].reshape(-1, 512):
        assert row[:2].tolist() == [piano, TOKENIZER.bos_id]
        assert TOKENIZER.kind[row[2]] == Kind.NOTE and TOKENIZER.onset_ms[row[3]] == 0
        assert (TOKENIZER.kind[row] == Kind.PREFIX).sum() == 1


def test_long_slices_are_cut_and_end_with_eos(corpus):
    settings = {**SETTINGS, "seq_len": 50}
    batch = next(contrastive_pairs(corpus, **settings, **LIMITS).iterate())
    assert (batch["eos"] == 49).mean() > 0.9
    rows = np.arange(23)[:, None]
    assert (batch["tokens"][rows, [[0, 1]], batch["eos"]] == TOKENIZER.eos_id).all()
    assert ((batch["tokens"] == TOKENIZER.eos_id).sum(axis=2) == 1).all()


def test_compositions_are_told_apart(corpus):
    stream = contrastive_pairs(corpus, **SETTINGS, **LIMITS)
    for batch in islice(stream.iterate(), 2):
        counts = sorted(np.unique(batch["composition"], return_counts=True)[1])
        assert counts == [1] + [2] * 11  # the corpus has two pieces of each work, and one alone


def test_same_composer_pieces_stand_together(corpus):
    shards = TokenShards(corpus, "train")
    composer_of = dict(
        zip(shards.label_codes("composition")[0], shards.label_codes("composer")[0], strict=True)
    )
    assert len(composer_of) == 12

    def neighbours(group):
        stream = contrastive_pairs(corpus, **SETTINGS, **LIMITS, composer_group=group, shuffle=True)
        examples = stream.examples
        return np.mean(
            [
                np.mean(np.diff(examples._composer[examples._order(epoch)]) == 0)
                for epoch in range(20)
            ]
        )

    # Of three equally frequent composers, groups of four make at least 5 of 8 neighbours equal.
    assert neighbours(1) < 0.45 < 0.6 < neighbours(4)
    order = contrastive_pairs(corpus, **SETTINGS, **LIMITS, composer_group=4).examples._order(0)
    assert sorted(order) == list(range(23))


@pytest.mark.parametrize("n_notes", [1, 19, 20, 21, 500])
def test_random_slices_are_drawn_as_the_reference_draws_them(n_notes):
    rng = np.random.default_rng(0)
    drawn = np.array([random_slice(n_notes, 20, 60, rng) for _ in range(3000)])
    starts, lengths = drawn[:, 0], drawn[:, 1] - drawn[:, 0]
    assert starts.min() == 0 and starts.max() == max(0, n_notes - 20)
    assert lengths.min() == min(20, n_notes) and lengths.max() == min(60, n_notes)
