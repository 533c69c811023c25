"""What can be counted about performances, to stand beside what listeners say of them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.midi import DRUM_CHANNEL, Performance

WINDOW_MS = 2000
"""Length of the stretches whose pitch classes are compared for self-similarity."""
CHORD_MS = 30
"""Onsets closer than this sound together: no inter-onset interval lies between them."""


@dataclass(frozen=True)
class MusicStatistics:
    """One performance in numbers; nan where it is too short to say.

    Attributes:
        notes_per_second: note density, from the first to the last onset.
        pitch_class_entropy: bits, 0 (one pitch class) to log2(12) = 3.58, notes weighted equally.
        onset_interval_median: seconds between successive onsets (chords count once).
        onset_interval_spread: interquartile range over median: 0 is mechanical.
        self_similarity: mean cosine of the pitch-class profiles of all pairs of 2 s windows.
        pitch_range: semitones from lowest to highest note.
        velocity_deviation: standard deviation of MIDI velocity.
    """

    notes_per_second: float
    pitch_class_entropy: float
    onset_interval_median: float
    onset_interval_spread: float
    self_similarity: float
    pitch_range: float
    velocity_deviation: float


def music_statistics(performance: Performance) -> MusicStatistics:
    """Counts one performance; drums are left out.

    Raises:
        UserError: no notes.
    """
    notes = performance.notes[performance.notes["channel"] != DRUM_CHANNEL]
    if not len(notes):
        raise UserError("a performance without notes has no statistics")
    start_ms = performance.ms(notes["start"])
    order = np.argsort(start_ms, kind="stable")
    start_ms, pitch = start_ms[order], notes["pitch"][order].astype(int)
    seconds = (start_ms[-1] - start_ms[0]) / 1000
    intervals = np.diff(start_ms) / 1000
    intervals = intervals[intervals >= CHORD_MS / 1000]
    low, median, high = (
        np.percentile(intervals, (25, 50, 75)) if len(intervals) else (np.nan, np.nan, np.nan)
    )
    return MusicStatistics(
        notes_per_second=(len(notes) - 1) / seconds if seconds > 0 else np.nan,
        pitch_class_entropy=_entropy_bits(np.bincount(pitch % 12, minlength=12)),
        onset_interval_median=float(median),
        onset_interval_spread=float((high - low) / median),
        self_similarity=_self_similarity(start_ms - start_ms[0], pitch % 12),
        pitch_range=float(pitch.max() - pitch.min()),
        velocity_deviation=float(notes["velocity"].astype(float).std()),
    )


def _entropy_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0


def _self_similarity(start_ms: np.ndarray, pitch_class: np.ndarray) -> float:
    window = start_ms // WINDOW_MS
    profiles = np.zeros((window[-1] + 1, 12))
    np.add.at(profiles, (window, pitch_class), 1)
    profiles = profiles[profiles.any(axis=1)]
    if len(profiles) < 2:
        return float("nan")
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    cosines = profiles @ profiles.T
    n = len(profiles)
    return float((cosines.sum() - n) / (n * (n - 1)))


def summarise(statistics: Sequence[MusicStatistics]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each statistic over a set, nan left out.

    Raises:
        UserError: an empty set.
    """
    if not statistics:
        raise UserError("no performances to summarise")
    summary = {}
    for field in fields(MusicStatistics):
        values = np.array([getattr(one, field.name) for one in statistics], float)
        values = values[~np.isnan(values)]
        summary[field.name] = (
            (float(values.mean()), float(values.std())) if len(values) else (np.nan, np.nan)
        )
    return summary


def frechet_distance(a_NxE: np.ndarray, b_MxE: np.ndarray) -> float:
    """Distance of two sets of embeddings, each seen as a normal distribution.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)), with covariances A and B (Dowson and Landau
    1982, as in FID and FAD). It shrinks as sets grow: compare sets of like size only.

    Raises:
        UserError: fewer than two embeddings on a side, or of different width.
    """
    a, b = np.asarray(a_NxE, np.float64), np.asarray(b_MxE, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"cannot compare embeddings of shapes {a.shape} and {b.shape}")
    if min(len(a), len(b)) < 2:
        raise UserError("the Fréchet distance needs two embeddings or more on either side")
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    mean_part = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(max(mean_part + spread, 0.0))
