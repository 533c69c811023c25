"""The n-gram: its probabilities by hand, sums to one, notes and tokens the same event."""

import math
from collections import Counter

import numpy as np
import pytest

from benchmarks.ngram import END, LONGER, Backoff, NoteNgram, Notes, events, ids_of, notes_of
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

TOKENIZER = Tokenizer.preset("aria")


def pieces(n, n_notes=60, seed=0):
    rng = np.random.default_rng(seed)
    return [
        notes_of(TOKENIZER.encode(random_performance(rng, n_notes)), TOKENIZER) for _ in range(n)
    ]


def test_notes_and_tokens_are_the_same_event():
    rng = np.random.default_rng(0)
    for _ in range(5):
        ids = TOKENIZER.encode(random_performance(rng, 200)).astype(np.int64)
        n_header = int(np.argmax(ids == TOKENIZER.bos_id)) + 1
        notes = notes_of(ids, TOKENIZER)
        np.testing.assert_array_equal(ids_of(notes, ids[:n_header], TOKENIZER), ids[:-1])
    with pytest.raises(UserError, match="solo piano"):
        notes_of(ids[: n_header + 2], TOKENIZER)


def test_silences_and_the_end_are_written_out():
    notes = Notes(*(np.array(c) for c in ([0, 1200, 3], [60, 62, 64], [5, 5, 5], [10, 10, 10])))
    y, features, piece = events([notes, notes], "time")
    assert (
        y.tolist() == [0, LONGER, LONGER, 200, 3, END] * 2 and piece.tolist() == [0] * 6 + [1] * 6
    )
    assert len({tuple(row) for row in features[1:4].tolist()}) == 2  # the same again behind 5 s
    assert (features[2] == features[3]).all()


def by_hand(history, y, counts, n_symbols, discounts):
    """The recursion of the module's docstring, word for word."""
    if history is None:
        return 1 / n_symbols
    lower = by_hand(history[:-1] if history else None, y, counts, n_symbols, discounts)
    seen = {s: c for (h, s), c in counts[len(history)].items() if h == history}
    if not seen:
        return lower
    d, total = discounts[len(history)], sum(seen.values())
    return max(seen.get(y, 0) - d, 0) / total + d * len(seen) / total * lower


@pytest.mark.parametrize("continuation", [False, True])
def test_probabilities_are_those_of_the_recursion(continuation):
    rng = np.random.default_rng(1)
    features = rng.integers(0, 3, (200, 2))
    y = (features.sum(1) + rng.integers(0, 3, 200)) % 7
    model = Backoff.fit(y, features, 8, continuation=continuation)
    rows = [(tuple(f), int(s)) for f, s in zip(features.tolist(), y, strict=True)]
    counts = [Counter((f[:k], s) for f, s in rows) for k in range(3)]
    if continuation:
        counts = [*(Counter((f[:k], s) for f, s in counts[k + 1]) for k in range(2)), counts[2]]
    discounts = []
    for level in counts:
        n1, n2 = (sum(c == n for c in level.values()) for n in (1, 2))
        discounts.append(n1 / (n1 + 2 * n2) if n1 and n2 else 0.5)
    for history in ((0, 0), (2, 1), (1, 9), (9, 9)):  # 9 was never seen
        expected = [by_hand(history, s, counts, 8, discounts) for s in range(8)]
        np.testing.assert_allclose(model.distribution(np.array(history)), expected)
        nats = model.nats(np.arange(8), np.tile(history, (8, 1)))
        np.testing.assert_allclose(nats, -np.log(expected))
        assert sum(expected) == pytest.approx(1)


def test_rare_pairs_left_to_lower_orders_keep_the_sum():
    rng = np.random.default_rng(2)
    features, y = rng.integers(0, 4, (500, 5)), rng.integers(0, 6, 500)
    model = Backoff.fit(y, features, 6, min_count=2)
    for row in features[:20]:
        assert model.distribution(row).sum() == pytest.approx(1)
    np.testing.assert_allclose(
        np.exp(-model.nats(y, features))[:20],
        [model.distribution(row)[s] for row, s in zip(features[:20], y, strict=False)],
    )
    once = Backoff.fit(np.arange(6), np.arange(30).reshape(6, 5), 6, min_count=2)
    rows = np.arange(6), np.arange(30).reshape(6, 5)
    assert not len(once.levels[5].context)
    lower = Backoff.fit(rows[0], rows[1][:, :2], 6)
    np.testing.assert_allclose(once.nats(*rows), lower.nats(rows[0], rows[1][:, :2]))
    whole = Backoff.fit(y, features, 6)
    assert len(model.levels[5].pair) < len(whole.levels[5].pair)
    assert len(model.levels[2].pair) == len(whole.levels[2].pair)


def test_tuned_on_what_it_has_not_counted_it_beats_chance():
    train, tune, test = pieces(6), pieces(2, seed=1), pieces(2, seed=2)
    model = NoteNgram.fit(train, tune)
    chance = math.log(502 * 128 * 13 * 501)
    assert (model.nats(test) / 60 < 0.8 * chance).all()
    assert set(model.settings) == {"time", "pitch", "velocity", "duration"}
    assert all(f"order {o}" in "order 3 order 4 order 5 order 6" for o in
               (text.split()[1].rstrip(",") for text in model.settings.values()))  # fmt: skip


def test_what_is_drawn_has_the_probability_that_is_told():
    """A piece that is known by heart is continued as it goes on, at the price of its surprises."""
    [melody] = pieces(1, n_notes=40, seed=3)
    model = NoteNgram.fit([melody] * 30, [melody])
    prompt = Notes(*(c[:20] for c in (melody.step, melody.pitch, melody.velocity, melody.duration)))
    drawn = model.continue_notes(prompt, 30, np.random.default_rng(0), temperature=0.05)
    np.testing.assert_array_equal(drawn.pitch, melody.pitch[20:])
    np.testing.assert_array_equal(drawn.step, melody.step[20:])  # 20 notes, then the end
    free = NoteNgram.fit(pieces(6), [melody])
    again, same, other = (
        free.continue_notes(prompt, 5, np.random.default_rng(seed)).pitch.tolist()
        for seed in (1, 1, 2)
    )
    assert again == same != other


def test_a_silence_without_end_ends_the_piece():
    """Where a silence goes on more often than it ends anywhere, min-p leaves nothing else."""
    steps = np.array([0, *(20 * LONGER + np.arange(1, 4))] * 8)
    piece = Notes(steps, *(np.full(len(steps), value) for value in (60, 6, 20)))
    model = NoteNgram.fit([piece] * 4, [piece])
    drawn = model.continue_notes(piece, 50, np.random.default_rng(0), min_p=0.5)
    assert len(drawn) < 50
