"""Cleaning takes away what it names and changes nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.cleaning import (
    Cleaning,
    keep_piano,
    remove_instruments,
    remove_redundant_pedals,
)
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, PEDAL, PEDAL_DOWN, PROGRAM, Performance, resolve_pedal
from tests.corpora import random_performance

PIANO, FLUTE, BELLS = 0, 73, 14


def band() -> Performance:
    """One note and one pedal press each of piano, flute, bells and drums."""
    notes = np.array([(60, 64, c, c, 100) for c in (0, 1, 2, 9)], NOTE)
    pedals = np.array([(5, 127, c) for c in (0, 1, 2, 9)], PEDAL)
    programs = np.array([(0, PIANO, 0), (0, FLUTE, 1), (0, BELLS, 2), (0, BELLS, 9)], PROGRAM)
    return Performance(500, notes, pedals, programs=programs)


@pytest.mark.parametrize(
    "clean, channels",
    [
        (remove_instruments, [0, 1, 9]),
        (lambda p: remove_instruments(p, {"pipe"}), [0, 2, 9]),
        (lambda p: remove_instruments(p, set()), [0, 1, 2, 9]),
        (keep_piano, [0]),
    ],
)
def test_channels_of_other_instruments_go_with_all_they_say(clean, channels):
    cleaned = clean(band())
    for rows in (cleaned.notes, cleaned.pedals, cleaned.programs):
        assert rows["channel"].tolist() == channels


def test_notes_go_by_the_program_in_force_at_each():
    notes = np.array([(60, 64, 0, 0, 10), (62, 64, 0, 50, 60), (64, 64, 0, 90, 99)], NOTE)
    programs = np.array([(50, BELLS, 0), (80, PIANO, 0)], PROGRAM)
    performance = Performance(500, notes, programs=programs)
    for clean in (remove_instruments, keep_piano):
        assert clean(performance).notes["pitch"].tolist() == [60, 64]
        # In the reference the channel goes as a whole.
        assert not len(clean(replace(performance, compat="aria-utils")).notes)


def pedalled(*pedals: tuple[int, int]) -> Performance:
    """Notes that end at 100 and 300 under these pedal events (tick, value)."""
    notes = np.array([(60, 64, 0, 0, 100), (62, 64, 0, 250, 300)], NOTE)
    return Performance(500, notes, np.array([(t, v, 0) for t, v in pedals], PEDAL))


@pytest.mark.parametrize(
    "pedals, kept",
    [
        ([(50, 127), (150, 0)], [50, 150]),
        ([(50, 127), (100, 0)], [50, 100]),  # a release exactly at a note's end stays
        ([(110, 127), (200, 0)], []),
        ([(0, 0), (50, 127), (60, 90), (150, 0), (160, 10)], [50, 150]),  # repetitions
        ([(120, 127)], [120]),  # never released: holds until the last note
        ([(310, 127)], []),
    ],
)
def test_pedal_presses_without_effect_go(pedals, kept):
    assert remove_redundant_pedals(pedalled(*pedals)).pedals["tick"].tolist() == kept


@pytest.mark.parametrize(
    "threshold, hysteresis, values, down",
    [
        (64, 0, [63, 64, 65, 63], [0, 1, 1, 0]),
        (40, 0, [39, 40, 127], [0, 1, 1]),
        (64, 20, [70, 84, 70, 50, 45, 44, 70, 83], [0, 1, 1, 1, 1, 0, 0, 0]),
        (64, 63, [126, 127, 2, 1], [0, 1, 1, 0]),
    ],
)
def test_a_half_pressed_pedal_stays_as_it_was(threshold, hysteresis, values, down):
    other = (3, 127, 1)  # another channel decides nothing here
    rows = [(i, v, 0) for i, v in enumerate(values)]
    pedals = np.array([*rows[:3], other, *rows[3:]], PEDAL)
    performance = Performance(500, pedalled().notes, pedals)
    cleaned = Cleaning(pedal_threshold=threshold, pedal_hysteresis=hysteresis).clean(performance)
    mine = cleaned.pedals[cleaned.pedals["channel"] == 0]
    assert (mine["value"] >= PEDAL_DOWN).astype(int).tolist() == down
    assert cleaned.pedals[["tick", "channel"]].tolist() == pedals[["tick", "channel"]].tolist()


@pytest.mark.parametrize("threshold, hysteresis", [(128, 0), (-1, 0), (64, -1), (64, 64), (20, 30)])
def test_a_threshold_beyond_the_pedal_is_refused(threshold, hysteresis):
    with pytest.raises(UserError, match=r"0\.\.127"):
        Cleaning(pedal_threshold=threshold, pedal_hysteresis=hysteresis)


@pytest.mark.parametrize("seed", range(20))
def test_the_pedal_sounds_the_same_without_its_redundant_events(seed):
    rng = np.random.default_rng(seed)
    performance = random_performance(rng, 150)
    performance.notes["channel"] = rng.integers(0, 3, 150)
    pedals = np.zeros(200, PEDAL)
    pedals["tick"] = np.sort(rng.integers(0, performance.duration_ms, 200))
    pedals["value"] = rng.choice([0, 63, 64, 127], 200)
    pedals["channel"] = rng.integers(0, 4, 200)
    performance = Performance(500, performance.notes, pedals)
    cleaned = remove_redundant_pedals(performance)
    assert 0 < len(cleaned.pedals) < len(pedals)
    assert resolve_pedal(cleaned).notes.tolist() == resolve_pedal(performance).notes.tolist()
    assert remove_redundant_pedals(cleaned).pedals.tolist() == cleaned.pedals.tolist()
