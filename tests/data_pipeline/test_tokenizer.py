"""Tokens: the round trip, slices, and every option."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import NOTE, PEDAL, PROGRAM, Performance
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import INSTRUMENTS, PROGRAMS, Kind
from tests.corpora import random_performance

ARIA = Tokenizer.preset("aria")


def ensemble(seed: int, n: int) -> Performance:
    """Several instruments and drums on a 10 ms grid, every value one that a token has."""
    rng = np.random.default_rng(seed)
    names = rng.choice(INSTRUMENTS, 3, replace=False)
    notes = np.zeros(n, NOTE)
    notes["start"] = np.cumsum(rng.integers(0, 120, n)) * 10
    notes["start"] -= notes["start"][0]
    notes["channel"] = rng.choice([0, 1, 2, 9], n)
    drum = notes["channel"] == 9
    notes["pitch"] = np.where(drum, rng.integers(35, 82, n), rng.integers(0, 128, n))
    notes["velocity"] = np.where(drum, 60, rng.integers(1, 13, n) * 10)
    notes["end"] = notes["start"] + np.where(drum, 10, rng.integers(1, 501, n) * 10)
    programs = np.array([(0, PROGRAMS[name], c) for c, name in enumerate(names)], PROGRAM)
    return Performance(500, notes, programs=programs)


def rows(performance):
    families = {int(r["channel"]): int(r["program"]) // 8 for r in performance.programs}
    return sorted(
        (
            int(n["start"]), int(n["end"]), int(n["pitch"]), int(n["velocity"]),
            -1 if n["channel"] == 9 else families[int(n["channel"])],
        )
        for n in performance.notes
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_decoding_what_was_encoded_gives_it_back(seed, n):
    performance = ensemble(seed, n)
    assert rows(ARIA.decode(ARIA.encode(performance))) == rows(performance)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_other_values_come_back_up_to_quantisation(seed, n):
    rng = np.random.default_rng(seed)
    performance = ensemble(seed, n)
    notes, drum = performance.notes, performance.notes["channel"] == 9
    notes["start"][1:] += np.cumsum(rng.integers(0, 30, n - 1))
    notes["end"] = notes["start"] + rng.choice([1, 4, 15, 333, 4998, 5000, 9000], n)
    notes["velocity"] = rng.integers(1, 128, n)
    back = ARIA.decode(ARIA.encode(performance)).notes
    assert len(back) == n  # in the same order: onsets only move to the nearest step
    onset_error = np.abs(back["start"] - notes["start"])
    last_step = notes["start"] % 5000 > 4990  # of a segment, beyond its last onset token
    assert (onset_error <= np.where(last_step, 9, 5)).all()
    assert (back["pitch"] == notes["pitch"]).all() and ((back["channel"] == 9) == drum).all()
    sounding = np.clip(notes["end"] - notes["start"], 10, 5000)
    assert (np.abs(back["end"] - back["start"] - sounding) <= 5)[~drum].all()
    touch = np.clip(notes["velocity"].astype(int), 10, 120)
    assert (np.abs(back["velocity"].astype(int) - touch) <= 5)[~drum].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.data())
def test_a_slice_of_ids_is_the_encoded_slice(seed, n, data):
    performance = ensemble(seed, n)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    ids = ARIA.slice_notes(ARIA.encode(performance), start, stop).tolist()
    expected = ARIA.encode(performance.slice_notes(start, stop)).tolist()
    assert ids[ids.index(ARIA.bos_id) :] == expected[expected.index(ARIA.bos_id) :]


def changing() -> Performance:
    """A channel that plays piano, strings, then bells, which have no tokens, and strings again."""
    notes = np.zeros(4, NOTE)
    notes["start"], notes["pitch"], notes["velocity"] = np.arange(4) * 1000, np.arange(60, 64), 60
    notes["end"] = notes["start"] + 500
    programs = np.array([(500, 40, 0), (2000, 14, 0), (2500, 48, 5), (2900, 44, 0)], PROGRAM)
    return Performance(500, notes, programs=programs)


def instruments(ids: np.ndarray) -> tuple[list[str], list[tuple[str, int]]]:
    """Instruments that the prefix announces, and (instrument, pitch) of every note."""
    tokens = [ARIA.tokens[i] for i in ids]
    notes = [token[:2] for i, token in zip(ids, tokens, strict=True) if ARIA.kind[i] == Kind.NOTE]
    return [token[2] for token in tokens[: tokens.index("<S>")]], notes


def test_a_note_is_of_the_instrument_in_force():
    announced, notes = instruments(ARIA.encode(changing()))
    assert notes == [("piano", 60), ("strings", 61), ("strings", 63)]
    assert announced == ["piano", "strings", "ensemble"]  # a channel without notes is named too
    part = changing().slice_notes(0, 1)
    assert instruments(ARIA.encode(part)) == (["piano", "ensemble"], [("piano", 60)])
    decoded = ARIA.decode(ARIA.encode(changing()))
    assert instruments(ARIA.encode(decoded))[1] == notes


def test_aria_utils_drops_a_channel_that_ever_plays_something_without_tokens():
    with pytest.raises(InvalidMidi, match="no notes"):
        ARIA.encode(replace(changing(), compat="aria-utils"))
    programs = changing().programs[[0, 2]]
    announced, notes = instruments(
        ARIA.encode(replace(changing(), programs=programs, compat="aria-utils"))
    )
    assert announced == ["strings", "ensemble"] and {name for name, _ in notes} == {"strings"}


def test_the_pedal_preset_refuses_a_channel_that_becomes_a_violin():
    with pytest.raises(InvalidMidi, match="solo piano"):
        Tokenizer.preset("pedal").encode(changing())


def test_labels_become_prefix_tokens_in_a_drawn_order():
    performance = random_performance(np.random.default_rng(0), 10)
    labels = {"composer": "bach", "form": "fugue", "genre": "classical", "title": "x"}
    ids = ARIA.encode(performance, labels=labels)
    prefix = ids[: ids.tolist().index(ARIA.bos_id)]
    assert prefix.tolist() == sorted(prefix.tolist()) and len(prefix) == 4
    orders = {
        tuple(ARIA.encode(performance, labels=labels, rng=np.random.default_rng(s))[:4].tolist())
        for s in range(20)
    }
    assert len(orders) > 1 and {frozenset(o) for o in orders} == {frozenset(prefix.tolist())}


@pytest.mark.parametrize("written", ["étude", "etude", "E\u0301tude"])
def test_a_label_is_found_with_and_without_its_accent(written):
    ids = ARIA.encode(random_performance(np.random.default_rng(0), 5), labels={"form": written})
    assert ARIA.id_of(("prefix", "form", "étude")) in ids


@pytest.mark.parametrize("seed", range(5))
def test_the_ending_is_announced_before_an_event_about_100_tokens_from_the_end(seed):
    performance = random_performance(np.random.default_rng(seed), 120)
    ids = ARIA.encode(performance, add_dim=True, rng=np.random.default_rng(seed)).tolist()
    at = ids.index(ARIA.dim_id)
    assert 88 <= len(ids) - at <= 116
    assert ARIA.kind[ids[at + 1]] in (Kind.NOTE, Kind.TIME)
    without = [i for i in ids if i != ARIA.dim_id]
    assert without == ARIA.encode(performance).tolist()
    short = random_performance(np.random.default_rng(seed), 40)
    assert ARIA.dim_id not in ARIA.encode(short, add_dim=True)


def test_the_pedal_preset_writes_pedal_events_and_takes_piano_only():
    pedal = Tokenizer.preset("pedal")
    notes = np.array([(60, 60, 0, 0, 100)], NOTE)
    pedals = np.array([(0, 127, 0), (500, 0, 0)], PEDAL)
    tokens = [pedal.tokens[i] for i in pedal.encode(Performance(500, notes, pedals))]
    assert tokens[2:] == [
        ("piano", 60, 60), ("onset", 0), ("dur", 500), "<PED_ON>", ("onset", 0),
        "<PED_OFF>", ("onset", 500), "<E>",
    ]  # fmt: skip
    back = pedal.decode(pedal.encode(Performance(500, notes, pedals)))
    assert back.pedals["tick"].tolist() == [0, 500]
    with pytest.raises(InvalidMidi, match="solo piano"):
        pedal.encode(ensemble(0, 20))


def test_the_pedal_of_the_drums_is_no_token():
    notes = np.array([(60, 60, 0, 0, 100), (40, 60, 9, 200, 210)], NOTE)
    pedals = np.array([(50, 127, 9)], PEDAL)
    with_pedal = Tokenizer.preset("pedal").encode(Performance(500, notes, pedals))
    assert with_pedal.tolist() == ARIA.encode(Performance(500, notes)).tolist()


def test_a_slice_counts_notes_and_keeps_the_pedal_between_them():
    pedal = Tokenizer.preset("pedal")
    notes = np.array([(60, 60, 0, 1000 * i, 1000 * i + 100) for i in range(4)], NOTE)
    pedals = np.array([(500, 127, 0), (1500, 0, 0), (2500, 127, 0)], PEDAL)
    ids = pedal.slice_notes(pedal.encode(Performance(500, notes, pedals)), 1, 3)
    back = pedal.decode(ids)
    assert back.notes["start"].tolist() == [0, 1000] and back.pedals["tick"].tolist() == [500]


def test_more_than_a_day_is_refused_before_it_becomes_tokens():
    notes = np.array([(60, 60, 0, 0, 100), (60, 60, 0, 10**12, 10**12 + 9)], NOTE)
    with pytest.raises(InvalidMidi, match="the limit is 24"):
        ARIA.encode(Performance(500, notes))


def test_unsupported_instruments_are_left_out_and_nothing_left_is_an_error():
    notes = np.array([(60, 60, 0, 0, 100)], NOTE)
    sfx = Performance(500, notes, programs=np.array([(0, 127, 0)], PROGRAM))
    with pytest.raises(InvalidMidi, match="no notes of a supported instrument"):
        ARIA.encode(sfx)


def test_hashes_tell_presets_apart_and_ids_are_checked():
    assert ARIA.hash != Tokenizer.preset("pedal").hash
    with pytest.raises(UserError, match=r"0\.\.17726"):
        ARIA.decode(np.array([17727]))
    with pytest.raises(UserError, match="no token"):
        ARIA.id_of(("piano", 60, 61))
