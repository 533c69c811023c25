"""Augmentation equals the reference's, keeps what it must, and is what its random numbers say."""

import json

import numpy as np
import pytest

from data_pipeline.augment import (
    AugmentConfig,
    SineModulation,
    augment,
    change_sustain,
    change_tempo,
    change_velocity,
    drop_notes,
    modulate_velocity,
    transpose,
)
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer

ARIA = Tokenizer.preset("aria")


def piece(n_notes=40, seed=0, dim=False):
    """A made-up piano piece with chords; uint16."""
    rng = np.random.default_rng(seed)
    ids = [ARIA.id_of(("prefix", "instrument", "piano")), ARIA.bos_id]
    onsets = np.sort(rng.integers(0, 1 + 20 * n_notes, n_notes)) * 10 // 30 * 30
    onsets -= onsets[0]
    segment = 0
    for i, onset in enumerate(onsets):
        ids += [ARIA.time_id] * int(onset // 5000 - segment)
        segment = onset // 5000
        note = ("piano", int(rng.integers(20, 100)), int(rng.integers(1, 13)) * 10)
        ids += [ARIA.id_of(note), ARIA.id_of(("onset", int(onset % 5000)))]
        ids += [ARIA.id_of(("dur", int(rng.integers(1, 300)) * 10))]
        if dim and i == n_notes // 2:
            ids.append(ARIA.dim_id)
    return np.array([*ids, ARIA.eos_id], np.uint16)


def test_golden_augmentations(golden):
    files = sorted((golden / "augment").glob("*.json"))
    assert files
    for path in files:
        data = json.loads(path.read_text())
        ids = np.array(data["ids"], np.uint16)
        for semitones, want in data["pitch"].items():
            np.testing.assert_array_equal(transpose(ids, int(semitones)), want)
        for steps, want in data["velocity"].items():
            np.testing.assert_array_equal(change_velocity(ids, int(steps)), want)
        for factor, want in data["tempo"].items():
            np.testing.assert_array_equal(change_tempo(ids, float(factor), ARIA), want)


def test_pieces_of_a_window_change_each_on_their_own():
    one, two, tail = piece(seed=1), piece(seed=2, dim=True), piece(seed=3)[:50]
    window = np.concatenate([one, two, tail])
    want = np.concatenate([transpose(one, 3), transpose(two, -2), transpose(tail, 5)])
    np.testing.assert_array_equal(transpose(window, np.array([3, -2, 5])), want)
    want = np.concatenate([change_velocity(p, s) for p, s in ((one, 1), (two, -1), (tail, 0))])
    np.testing.assert_array_equal(change_velocity(window, np.array([1, -1, 0])), want)
    room = np.full(20, ARIA.pad_id, np.uint16)
    slow = [change_tempo(np.append(p, room), f, ARIA) for p, f in ((one, 1.2), (two, 0.9))]
    slow = [ids[ids != ARIA.pad_id] for ids in slow]
    got = change_tempo(np.append(window, room), np.array([1.2, 0.9, 1.0]), ARIA)
    np.testing.assert_array_equal(got[: len(slow[0]) + len(slow[1])], np.concatenate(slow))


def test_tempo_of_one_is_the_identity_and_cut_events_are_dropped():
    ids = piece(dim=True)
    np.testing.assert_array_equal(change_tempo(ids, 1.0, ARIA), ids)
    got = change_tempo(ids[1:-2], 1.0, ARIA)  # ends within a note
    n = np.count_nonzero(got != ARIA.pad_id)
    np.testing.assert_array_equal(got[:n], ids[1 : 1 + n])
    assert ARIA.n_notes(got) == ARIA.n_notes(ids) - 1


def test_onsets_and_durations_scale_to_the_nearest_step():
    ids = np.append(piece(seed=5), np.full(50, ARIA.pad_id, np.uint16))
    before, after = ARIA.decode(ids).notes, ARIA.decode(change_tempo(ids, 1.17, ARIA)).notes
    want = np.rint(before["start"] * 1.17 / 10).astype(int) * 10
    np.testing.assert_array_equal(after["start"], want)
    length = np.rint((before["end"] - before["start"]) * 1.17 / 10) * 10
    np.testing.assert_array_equal(after["end"] - after["start"], np.clip(length, 10, 5000))


def test_mixup_reorders_only_notes_of_one_onset():
    ids = piece(n_notes=200, seed=4)
    mixed = change_tempo(ids, 1.0, ARIA, np.random.default_rng(0))
    assert not np.array_equal(mixed, ids)

    def rows(performance):
        return sorted(performance.notes.tolist())

    assert rows(ARIA.decode(mixed)) == rows(ARIA.decode(ids))
    assert (np.diff(ARIA.events(mixed)[1]) >= 0).all()


def test_notes_out_of_range_become_unknown():
    ids = np.array([ARIA.id_of(("piano", 125, 50)), ARIA.id_of(("piano", 3, 50))], np.uint16)
    assert transpose(ids, 5).tolist() == [ARIA.unk_id, ARIA.id_of(("piano", 8, 50))]
    assert transpose(ids, -5).tolist() == [ARIA.id_of(("piano", 120, 50)), ARIA.unk_id]


def test_augment_draws_all_of_its_range_and_repeats_with_the_seed():
    ids = piece(seed=6)
    config = AugmentConfig(tempo=0, mixup=False)
    first = ids[2]
    seen = set()
    for seed in range(300):
        got = augment(ids, config, np.random.default_rng(seed), ARIA)
        again = augment(ids, config, np.random.default_rng(seed), ARIA)
        np.testing.assert_array_equal(got, again)
        shift = int(ARIA.pitch[got[2]] - ARIA.pitch[first])
        seen.add((shift, int(ARIA.velocity[got[2]] - ARIA.velocity[first]) // 10))
    assert {shift for shift, _ in seen} == set(range(-5, 6))
    assert {step for _, step in seen} == {-1, 0, 1}
    off = AugmentConfig(tempo=0, pitch=0, velocity=0, mixup=False)
    np.testing.assert_array_equal(augment(ids, off, np.random.default_rng(0), ARIA), ids)
    moved = augment(ids, AugmentConfig(), np.random.default_rng(1), ARIA)
    assert moved.dtype == np.uint16 and len(moved) == len(ids)


def with_room(ids):
    return np.append(ids, np.full(60, ARIA.pad_id, np.uint16))


def test_rubato_bends_time_smoothly_and_keeps_notes_in_order():
    ids = with_room(piece(n_notes=300, seed=7))
    modulation = SineModulation(*(np.array([value] * 2) for value in (0.3, 7000.0, 1.0)))
    before = ARIA.decode(ids).notes
    after = ARIA.decode(change_tempo(ids, 1.1, ARIA, rubato=modulation)).notes

    def warped(ms):
        turns = 2 * np.pi / 7000
        return 1.1 * (ms + 0.3 / turns * (np.sin(turns * ms + 1) - np.sin(1)))

    np.testing.assert_array_equal(after["pitch"], before["pitch"])
    # Half a step: the grid of 10 ms.
    assert np.abs(after["start"] - warped(before["start"])).max() <= 5.0001
    lengths = np.clip(warped(before["end"]) - warped(before["start"]), 10, 5000)
    assert np.abs(after["end"] - after["start"] - lengths).max() <= 5.0001
    assert (np.diff(after["start"]) >= 0).all() and after["start"][0] == 0
    none = SineModulation(np.zeros(2), np.full(2, 7000.0), np.ones(2))
    plain = change_tempo(ids, 1.1, ARIA)
    np.testing.assert_array_equal(change_tempo(ids, 1.1, ARIA, rubato=none), plain)


def test_sustain_changes_durations_only():
    ids = piece(seed=8)
    before, after = ARIA.decode(ids).notes, ARIA.decode(change_sustain(ids, 1.3)).notes
    for field in ("start", "pitch", "velocity"):
        np.testing.assert_array_equal(after[field], before[field])
    want = np.clip(np.rint((before["end"] - before["start"]) * 1.3 / 10) * 10, 10, 5000)
    np.testing.assert_array_equal(after["end"] - after["start"], want)


def test_velocity_swells_and_ebbs_within_its_height():
    ids = piece(n_notes=400, seed=9)
    modulation = SineModulation(*(np.array([value] * 2) for value in (2.0, 400.0, 0.0)))
    before, after = ARIA.decode(ids).notes, ARIA.decode(modulate_velocity(ids, modulation)).notes
    np.testing.assert_array_equal(after["start"], before["start"])
    change = after["velocity"].astype(int) - before["velocity"]
    assert set(np.unique(change)) == {-20, -10, 0, 10, 20}
    free = (before["velocity"] > 30) & (before["velocity"] < 100)
    assert np.abs(np.diff(change[free][:40])).max() <= 20  # a wave, not noise


def test_dropped_notes_leave_the_others_as_they_are():
    one, two = piece(n_notes=400, seed=10), piece(n_notes=100, seed=11)
    window = np.concatenate([one, two, one[:40]])
    got = drop_notes(window, np.array([0.3, 0.0, 1.0]), np.random.default_rng(0), ARIA)
    assert len(got) == len(window)
    first, second = np.split(got, [int(np.argmax(got == ARIA.eos_id)) + 1])
    np.testing.assert_array_equal(second[: len(two)], two)
    kept = ARIA.decode(first).notes.tolist()
    whole = ARIA.decode(one).notes.tolist()
    assert kept[0] == whole[0] and set(kept) <= set(whole)
    assert 0.6 * 400 < len(kept) < 0.8 * 400  # 280 expected, standard deviation 9
    assert ARIA.n_notes(second[len(two) :]) == 2  # the first note, and one cut by the window


def band(seed=0, n=60):
    """A piano, a bass and drums, announced; notes of random velocities, one at a time; uint16."""
    rng = np.random.default_rng(seed)
    ids = [ARIA.id_of(("prefix", "instrument", name)) for name in ("piano", "bass", "drum")]
    ids.append(ARIA.bos_id)
    for i in range(n):
        who = "piano" if i == 0 else ("piano", "bass", "drum")[rng.integers(3)]
        level = () if who == "drum" else (int(rng.integers(4, 10)) * 10,)
        ids += [ARIA.id_of((who, int(rng.integers(40, 80)), *level)), ARIA.id_of(("onset", i * 50))]
        ids += [ARIA.id_of(("dur", 100))] if level else []
    return np.array([*ids, ARIA.eos_id], np.uint16)


OFF = {"tempo": 0, "pitch": 0, "velocity": 0, "mixup": False}


def players(ids):
    """Instruments that are announced, and those that play."""
    before = ids[: int(np.argmax(ids == ARIA.bos_id))]
    after = ARIA.instrument[ids[len(before) :]]
    return set(ARIA.instrument[before].tolist()), set(after[after >= 0].tolist())


def test_instruments_are_left_out_whole_and_never_all():
    one, two = band(1), band(2)
    config, seen = AugmentConfig(**OFF, instrument_drop=0.5), set()
    for seed in range(60):
        got = augment(np.concatenate([one, two]), config, np.random.default_rng(seed), ARIA)
        parts = np.split(got, np.flatnonzero(got == ARIA.eos_id) + 1)
        assert (parts[2] == ARIA.pad_id).all() and len(got) == len(one) + len(two)
        for before, after in zip((one, two), parts, strict=False):
            announced, plays = players(after)
            assert announced == plays and 0 in plays  # the piano begins
            of = np.array(
                [i in plays for i in ARIA.instrument[before[ARIA.note_positions(before)]]]
            )
            keep = ARIA.decode(before).notes[of]
            assert sorted(
                ARIA.decode(after).notes[["pitch", "velocity", "start"]].tolist()
            ) == sorted(keep[["pitch", "velocity", "start"]].tolist())
            seen.add(frozenset(plays))
    assert seen == {frozenset(s) for s in ({0}, {0, 3}, {0, 10}, {0, 3, 10})}


def test_windows_without_their_beginning_lose_instruments_too():
    ids = band(3)[10:-9]  # begins and ends within events
    silent = np.ones((1, 11), bool)
    got = drop_notes(ids, 0.0, np.random.default_rng(0), ARIA, silent=silent)
    (first,) = {ARIA.instrument[i] for i in got if ARIA.instrument[i] >= 0}
    assert first == ARIA.instrument[ids[ARIA.note_positions(ids)[0]]]
    kept = np.flatnonzero(np.isin(ARIA.instrument[ids], first))
    assert ARIA.n_notes(got) == len(kept) and got[0] == ids[0]
    free = drop_notes(ids, 0.0, np.random.default_rng(0), ARIA)
    np.testing.assert_array_equal(free, ids)


def test_each_instrument_has_a_loudness_of_its_own():
    ids = band(4)
    config, moved = AugmentConfig(**OFF, instrument_velocity=2), set()
    for seed in range(80):
        got = augment(ids, config, np.random.default_rng(seed), ARIA)
        change = {
            i: set(
                (ARIA.velocity[got] - ARIA.velocity[ids])[ARIA.instrument[ids] == i][1:].tolist()
            )
            for i in (0, 3)
        }
        assert all(len(steps) == 1 for steps in change.values())  # 40..90 leave room for two steps
        moved.add(tuple(min(steps) // 10 for steps in change.values()))
        same = ARIA.velocity[ids] < 0
        np.testing.assert_array_equal(got[same], ids[same])  # drums, onsets, durations, prefix
    assert {one for one, _ in moved} == {one for _, one in moved} == set(range(-2, 3))
    assert len(moved) > 15  # of 25: the two are drawn apart


def test_each_extra_augmentation_has_its_own_probability():
    off = {"tempo": 0, "pitch": 0, "velocity": 0, "mixup": False}
    ids = with_room(piece(n_notes=100, seed=12))
    for name, strength in {
        "rubato": 0.3,
        "velocity_curve": 12,
        "note_drop": 0.5,
        "sustain": 0.5,
    }.items():

        def n_changed(probability, name=name, strength=strength):
            settings = {name: strength, f"{name}_probability": probability}
            config = AugmentConfig(**off, **settings)
            draws = (augment(ids, config, np.random.default_rng(s), ARIA) for s in range(60))
            return sum(not np.array_equal(got, ids) for got in draws)

        assert n_changed(0.0) == 0
        assert 15 <= n_changed(0.5) <= 45  # 30 expected, standard deviation 4
        assert n_changed(1.0) >= 55  # a draw may be too small to move anything


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"tempo=1\.5 must lie in .* pitch=-1"):
        AugmentConfig(tempo=1.5, pitch=-1)
    with pytest.raises(UserError, match=r"instrument_velocity=13 must lie .* instrument_drop=1 mu"):
        AugmentConfig(instrument_velocity=13, instrument_drop=1)
