"""A file and its record in token shards have the same slices, up to one step of an onset."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import PEDAL, PROGRAM, Performance
from data_pipeline.slices import (
    encode_slices,
    truncated,
)
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import STEP_MS
from tests.corpora import random_performance

ARIA, PEDALS = Tokenizer.preset("aria"), Tokenizer.preset("pedal")
MUSIC_BOX, VIOLIN = 10, 40


def band(seed: int, n: int) -> Performance:
    """Piano, violin, a music box (which has no tokens) and drums, some of them without tokens."""
    rng = np.random.default_rng(seed)
    performance = random_performance(rng, n)
    performance.notes["channel"] = rng.choice([0, 1, 2, 9], n)
    performance.notes["start"] += rng.integers(0, 10)
    drums = performance.notes["channel"] == 9
    performance.notes["pitch"][drums] = rng.integers(20, 100, drums.sum())
    programs = np.array([(0, 0, 0), (0, VIOLIN, 1), (0, MUSIC_BOX, 2)], PROGRAM)
    return replace(performance, programs=programs)


def of_file(performance, tokenizer, slice_notes):
    return encode_slices(tokenizer.with_tokens(performance), tokenizer, slice_notes)


def of_record(performance, tokenizer, slice_notes):
    ids = tokenizer.encode(performance, labels={"composer": "bach", "genre": "jazz"})
    at = tokenizer.note_positions(ids)
    starts = range(0, len(at), slice_notes)
    return [tokenizer.slice_ids(ids, at, start, start + slice_notes) for start in starts]


def n_notes_of_build(performance):
    try:
        return ARIA.n_notes(ARIA.encode(performance))
    except InvalidMidi:
        return 0


def heads(ids):
    """All but onsets, durations and `<T>`."""
    return [int(i) for i in ids if ARIA.onset_ms[i] < 0 and ARIA.dur_ms[i] < 0 and i != 5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 150), st.integers(1, 60))
def test_the_record_has_the_slices_of_the_file(seed, n, slice_notes):
    performance = band(seed, n)
    try:
        files = of_file(performance, ARIA, slice_notes)
    except InvalidMidi:
        assert n_notes_of_build(performance) == 0
        return
    records = of_record(performance, ARIA, slice_notes)
    assert len(files) == len(records)
    for one, other in zip(files, records, strict=True):
        assert heads(one) == heads(other)
        assert 0 < ARIA.n_notes(one) <= slice_notes
        onsets = ARIA.events(one)[1] - ARIA.events(other)[1]
        assert np.abs(onsets).max(initial=0) <= STEP_MS
    n_notes = n_notes_of_build(performance)
    assert sum(map(ARIA.n_notes, files)) == len(ARIA.with_tokens(performance).notes) == n_notes


def test_pedal_events_are_in_the_slice_of_their_notes():
    """The pedal preset writes events: each slice holds those between its notes, as shards do."""
    performance = random_performance(np.random.default_rng(0), 100)
    ticks = np.arange(0, int(performance.notes["start"][-1]), 700)
    pedals = np.array([(t, 127 * (i % 2), 0) for i, t in enumerate(ticks)], PEDAL)
    performance = replace(performance, pedals=pedals)
    files, records = (f(performance, PEDALS, 30) for f in (of_file, of_record))
    for one, other in zip(files, records, strict=True):
        np.testing.assert_array_equal(one, other)
    n_pedals = [int((ids >= PEDALS.first_pedal_id).sum()) for ids in files]
    assert 0.7 * len(pedals) < sum(n_pedals) <= len(pedals)


def test_a_last_slice_without_tokens_is_no_slice():
    performance = random_performance(np.random.default_rng(1), 62)
    performance.notes["channel"][60:] = 2
    performance = replace(performance, programs=np.array([(0, 0, 0), (0, MUSIC_BOX, 2)], PROGRAM))
    assert [ARIA.n_notes(ids) for ids in of_file(performance, ARIA, 30)] == [30, 30]


def test_nothing_with_tokens_is_refused_by_name():
    performance = random_performance(np.random.default_rng(1), 5)
    performance.notes["channel"] = 9
    performance.notes["pitch"] = 5
    with pytest.raises(InvalidMidi, match="no notes"):
        ARIA.with_tokens(performance)


def test_a_long_slice_keeps_its_beginning_and_its_end():
    ids = ARIA.encode(random_performance(np.random.default_rng(2), 50))
    assert truncated(ids, len(ids), ARIA.eos_id).tolist() == ids.tolist()
    shorter = truncated(ids, 40, ARIA.eos_id)
    assert shorter.tolist() == [*ids[:39].tolist(), ARIA.eos_id] and len(ids) > 40
