"""Augmentation equals the reference's, keeps what it must, and is what its random numbers say."""

import json

import numpy as np
import pytest

from data_pipeline.augment import (
    AugmentConfig,
    augment,
    change_tempo,
    change_velocity,
    transpose,
)
from data_pipeline.errors import UserError
from data_pipeline.tokenizer import Tokenizer

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


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="tempo must lie in"):
        AugmentConfig(tempo=1.5)
