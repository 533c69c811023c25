"""Statistics of pieces whose answers are known."""

import numpy as np
import pytest

from aria_jax.eval.music_statistics import frechet_distance, music_statistics, summarise
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, Performance


def piece(starts_ms, pitches, velocities=None):
    notes = np.zeros(len(starts_ms), NOTE)
    notes["start"], notes["pitch"] = starts_ms, pitches
    notes["end"] = notes["start"] + 200
    notes["velocity"] = 70 if velocities is None else velocities
    return Performance(500, notes)


def test_an_even_scale():
    found = music_statistics(piece(np.arange(48) * 250, 60 + np.arange(48) % 12))
    assert found.notes_per_second == pytest.approx(4.0)
    assert found.pitch_class_entropy == pytest.approx(np.log2(12))
    assert found.onset_interval_median == pytest.approx(0.25)
    assert found.onset_interval_spread == 0
    assert (found.pitch_range, found.velocity_deviation) == (11, 0)


def test_chords_count_once_between_onsets_and_one_pitch_has_no_entropy():
    found = music_statistics(piece([0, 10, 20, 1000, 1010, 3000], [60, 72, 48, 60, 72, 60]))
    assert found.pitch_class_entropy == 0
    assert found.onset_interval_median == pytest.approx((0.98 + 1.99) / 2)


def test_self_similarity_tells_repetition_from_change():
    starts = np.arange(80) * 250
    same = music_statistics(piece(starts, np.tile([60, 64, 67, 72], 20)))
    changing = music_statistics(piece(starts, 60 + np.arange(80) // 8))
    assert same.self_similarity == pytest.approx(1.0)
    assert changing.self_similarity == pytest.approx(0.0, abs=0.1)


def test_what_cannot_be_known_is_nan_and_left_out_of_means():
    one = music_statistics(piece([0], [60]))
    assert np.isnan(one.notes_per_second) and np.isnan(one.self_similarity)
    even = music_statistics(piece([0, 500, 1000], [60, 62, 64]))
    summary = summarise([one, even])
    assert summary["notes_per_second"] == (pytest.approx(2.0), 0.0)
    with pytest.raises(UserError):
        music_statistics(piece([], []))
    with pytest.raises(UserError):
        summarise([])


def test_frechet_distance_of_known_normals():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 5))
    points = (points - points.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points, points + 2) == pytest.approx(5 * 4)
    # Standard deviations 1 and 3 in every direction: (3 - 1)^2 each.
    assert frechet_distance(points, 3 * points) == pytest.approx(5 * 4)
    other = rng.normal(size=(300, 5)) * [1, 2, 3, 4, 5]
    assert frechet_distance(points, other) == pytest.approx(frechet_distance(other, points))


def test_frechet_distance_of_few_wide_embeddings_is_finite():
    rng = np.random.default_rng(1)
    distance = frechet_distance(rng.normal(size=(4, 64)), rng.normal(size=(6, 64)))
    assert np.isfinite(distance) and distance > 0


def test_frechet_mistakes():
    with pytest.raises(UserError, match="two embeddings"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(UserError, match="shapes"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
