"""Features without a network, to hold embeddings against: what plain counting already tells."""

from collections.abc import Sequence

import numpy as np

from aria_jax.embed.encode import Encode
from data_pipeline.tokenizer import SEGMENT_MS, Kind, Tokenizer


def pitch_class_histogram(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Share of each of the 12 pitch classes among the notes, float32 [12]."""
    pitches = tokenizer.pitch[ids]
    counts = np.bincount(pitches[pitches >= 0] % 12, minlength=12)
    return (counts / max(counts.sum(), 1)).astype(np.float32)


def note_statistics(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Handcrafted statistics, float32 [24]: pitch classes, and mean and spread of pitch, velocity,
    duration, time between onsets, notes at once, and notes a second.
    """
    at, onset_ms = tokenizer.events(ids)
    at, onset_ms = (
        at[tokenizer.kind[ids[at]] == Kind.NOTE],
        onset_ms[tokenizer.kind[ids[at]] == Kind.NOTE],
    )
    if len(at) < 2:
        return np.zeros(24, np.float32)
    # In slices that begin after the last change of tempo the clock of the aria-utils reading can
    # start below 0 (its get_duration_ms); the first `<T>` is then missing.
    gaps = np.maximum(np.diff(onset_ms), 0)
    chords = np.unique(onset_ms, return_counts=True)[1]
    seconds = max(gaps.sum() / 1000, SEGMENT_MS / 1e6)
    values = (
        tokenizer.pitch[ids[at]],
        tokenizer.velocity[ids[at]],
        np.log1p(tokenizer.dur_ms[ids[at + 2]]),
        np.log1p(gaps),
        chords,
    )
    moments = [moment for value in values for moment in (np.mean(value), np.std(value))]
    rates = [len(at) / seconds, np.mean(gaps == 0)]
    return np.concatenate([pitch_class_histogram(ids, tokenizer), moments, rates]).astype(
        np.float32
    )


BASELINES = {"pitch-class": pitch_class_histogram, "statistics": note_statistics}


def baseline_encoder(name: str, tokenizer: Tokenizer) -> Encode:
    """An encoder of slices that counts instead of computing a network."""

    def encode(slices: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([BASELINES[name](ids.astype(np.int64), tokenizer) for ids in slices])

    return encode
