"""Windows hold the corpus: all of it, once, in order, and no segment sees another."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError
from data_pipeline.loaders.windows import lm_windows, pack_best_fit
from data_pipeline.shards import TokenShards
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind

TOKENIZER = Tokenizer.preset("aria")


def epoch(corpus, **changes):
    settings = {"split": "train", "seq_len": 100, "global_batch": 4, "seed": 1, "epochs": 1}
    batches = list(lm_windows(corpus, **{**settings, **changes}).iterate())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def pieces(corpus):
    shards = TokenShards(corpus, "train")
    return [shards[i].ids.tolist() for i in range(len(shards))]


def segments(rows):
    """(inputs, targets) of each segment of each row, targets without the masked ones."""
    for row in range(len(rows["inputs"])):
        for segment in range(1, rows["segment_ids"][row].max(initial=0) + 1):
            here = rows["segment_ids"][row] == segment
            mask = here & rows["loss_mask"][row]
            yield rows["inputs"][row][here].tolist(), rows["targets"][row][mask].tolist()


def test_unshuffled_windows_are_the_corpus(corpus):
    rows = epoch(corpus, shuffle=False)
    stream = [token for piece in pieces(corpus) for token in piece]
    mask = rows["loss_mask"]
    assert rows["inputs"][mask].tolist() == stream[:-1]
    assert rows["targets"][mask].tolist() == stream[1:]


def test_a_shuffled_epoch_holds_every_piece_whole(corpus):
    rows = epoch(corpus)
    mask = rows["loss_mask"]
    found = Counter(zip(rows["inputs"][mask].tolist(), rows["targets"][mask].tolist(), strict=True))
    inside, all_pieces = Counter(), pieces(corpus)
    for ids in all_pieces:
        inside.update(pairwise(ids))
    extra = found - inside
    assert not inside - found
    # What is left are the seams from one piece to the next.
    assert extra.total() == len(all_pieces) - 1
    assert {left for left, _ in extra} == {TOKENIZER.eos_id}


def test_epochs_have_another_order(corpus):
    both = epoch(corpus, epochs=2, global_batch=1)["inputs"]
    half = len(both) // 2
    assert len(both) % 2 == 0
    assert (both[:half] != both[half:]).any()
    one = {tuple(row) for row in both[:half]}
    assert len(one & {tuple(row) for row in both[half:]}) < half // 2  # cut elsewhere, too


def test_the_reference_cuts_the_stream_at_the_same_places(corpus):
    """PretrainingDataset.build: fill a buffer, write seq_len tokens at a time."""
    buffer, expected = [], []
    for ids in pieces(corpus):
        buffer += ids
        while len(buffer) >= 100:
            expected.append(buffer[:100])
            buffer = buffer[100:]
    rows = epoch(corpus, shuffle=False)["inputs"]
    assert rows[: len(expected)].tolist() == expected


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    seq_len=st.integers(2, 40),
)
def test_packing_loses_nothing_and_fits(lengths, seq_len):
    plan = pack_best_fit(np.array(lengths), seq_len)
    tokens = [
        (piece, token)
        for piece, start, length in zip(plan.piece, plan.start, plan.length, strict=True)
        for token in range(start, start + length)
    ]
    assert sorted(tokens) == [(p, t) for p, n in enumerate(lengths) for t in range(n)]
    space = [
        seq_len - int(plan.length[a:b].sum())
        for a, b in zip(plan.first[:-1], plan.first[1:], strict=True)
    ]
    assert min(space) >= 0
    # No two rows could be one: a row is opened only by a part that fits into no row so far.
    opened_by = [
        plan.length[a:b].max() for a, b in zip(plan.first[:-1], plan.first[1:], strict=True)
    ]
    assert all(
        opened_by[later] > space[earlier] for later in range(len(space)) for earlier in range(later)
    )


def test_packed_rows_hold_every_piece_and_cross_none(corpus):
    rows = epoch(corpus, packing="best-fit")
    whole = pieces(corpus)
    parts = Counter()
    targets_seen = 0
    for inputs, targets in segments(rows):
        parts[tuple(inputs)] += 1
        assert targets[: len(inputs) - 1] == inputs[1:]
        targets_seen += len(targets)
    expected = Counter(tuple(ids[s : s + 100]) for ids in whole for s in range(0, len(ids), 100))
    assert parts == expected
    assert targets_seen == sum(len(ids) - 1 for ids in whole)
    padding = (rows["segment_ids"] == 0).mean()
    assert padding < 0.15
    assert (rows["inputs"][rows["segment_ids"] == 0] == TOKENIZER.pad_id).all()
    starts = np.diff(rows["segment_ids"], axis=1, prepend=0) > 0
    assert (rows["positions"][starts] == 0).all()


def test_dim_stands_about_a_hundred_tokens_before_the_end(corpus):
    settings = {"packing": "best-fit", "seq_len": 4096, "add_dim": True}
    places = []
    for seed in (0, 1):
        found = []
        for inputs, _ in segments(epoch(corpus, seed=seed, shuffle=False, **settings)):
            assert inputs.count(TOKENIZER.dim_id) == (len(inputs) > 161)
            if TOKENIZER.dim_id in inputs:
                at = inputs.index(TOKENIZER.dim_id)
                assert 100 - 10 <= len(inputs) - 2 - at <= 100 + 10 + 2
                before, after = TOKENIZER.kind[inputs[at - 1]], TOKENIZER.kind[inputs[at + 1]]
                assert before in (Kind.DUR, Kind.TIME) and after in (Kind.NOTE, Kind.TIME)
                found.append((len(inputs), at))
        places.append(sorted(found))
    assert places[0] and places[0] != places[1]


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_augmented_rows_stay_well_formed(corpus, packing):
    rows = epoch(corpus, packing=packing, augment=AugmentConfig())
    plain = epoch(corpus, packing=packing)
    assert (rows["inputs"] != plain["inputs"]).any()
    mask = rows["loss_mask"]
    assert (rows["targets"][mask] != TOKENIZER.pad_id).all()
    inside = mask[:, :-1] & (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1])
    np.testing.assert_array_equal(rows["targets"][:, :-1][inside], rows["inputs"][:, 1:][inside])


def test_long_pieces_are_left_out(corpus):
    rows = epoch(corpus, shuffle=False, max_piece_tokens=600)
    short = [piece for piece in pieces(corpus) if len(piece) <= 600]
    assert 0 < len(short) < len(pieces(corpus))
    stream = [token for piece in short for token in piece]
    assert rows["inputs"][rows["loss_mask"]].tolist() == stream[:-1]
    with pytest.raises(UserError, match="no piece of split 'train' has 5 tokens or fewer"):
        epoch(corpus, max_piece_tokens=5)
