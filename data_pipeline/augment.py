"""Augmentation of token ids: tempo with mix-up, rubato, pitch, velocity, sustain, note drop.

Sequences may be windows of several pieces: each part that ends in `<E>` is changed on its own, and
the length of the whole is kept, cut or padded with `<P>`. Tempo, mix-up, pitch and velocity are
those of ariautils tokenizer/absolute.py export_data_aug and _base.py export_aug_fn_concat; the
reference does not know the others.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline import _augment_kernels as kernels
from data_pipeline.settings import AugmentConfig
from data_pipeline.tokenizer import Tokenizer

_RUBATO_MS = (5_000, 20_000)
_CURVE_TOKENS = (100, 800)  # a token is a third of a note


@dataclass(frozen=True)
class SineModulation:
    """A sine wave for each piece of a window.

    Attributes:
        depth: its height, float [pieces].
        period: in ms or tokens, float [pieces].
        phase: in radians, float [pieces].
    """

    depth: np.ndarray
    period: np.ndarray
    phase: np.ndarray

    def table(self) -> np.ndarray:
        """Depth, period and phase as the columns of float64 [pieces, 3]."""
        return np.stack([self.depth, self.period, self.phase], axis=1).astype(np.float64)


def augment(
    ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator, tokenizer: Tokenizer
) -> np.ndarray:
    """`ids` with each piece changed at random as `config` allows; uint16 [L] as given."""
    n = _n_pieces(ids)
    if config.note_drop:
        rates = _mask_random(rng, config.note_drop_probability, rng.uniform(0, config.note_drop, n))
        ids = drop_notes(ids, rates, rng, tokenizer)
    if config.sustain:
        change = rng.uniform(-config.sustain, config.sustain, n)
        ids = change_sustain(ids, 1 + _mask_random(rng, config.sustain_probability, change))
    if config.tempo or config.mixup or config.rubato:
        factors = rng.uniform(1 - config.tempo, 1 + config.tempo, n)
        rubato = None
        if config.rubato:
            depth = rng.uniform(0, config.rubato, n)
            depth = _mask_random(rng, config.rubato_probability, depth)
            rubato = SineModulation(
                depth, rng.uniform(*_RUBATO_MS, n), rng.uniform(0, 2 * np.pi, n)
            )
        shuffled_by = rng if config.mixup else None
        ids = change_tempo(ids, factors, tokenizer, shuffled_by, rubato=rubato)
    n = _n_pieces(ids)  # where `<E>` was pushed out of the window, one less
    if config.pitch:
        ids = transpose(ids, rng.integers(-config.pitch, config.pitch + 1, n))
    if config.velocity:
        ids = change_velocity(ids, rng.integers(-config.velocity, config.velocity + 1, n))
    if config.velocity_curve:
        height = rng.uniform(0, config.velocity_curve, n)
        height = _mask_random(rng, config.velocity_curve_probability, height)
        period = rng.uniform(*_CURVE_TOKENS, n)
        ids = modulate_velocity(ids, SineModulation(height, period, rng.uniform(0, 2 * np.pi, n)))
    return ids


def _mask_random(rng: np.random.Generator, probability: float, values: np.ndarray) -> np.ndarray:
    """`values`, each set to zero unless it is drawn with `probability`."""
    return np.where(rng.random(len(values)) < probability, values, 0.0)


def transpose(ids: np.ndarray, semitones: int | np.ndarray) -> np.ndarray:
    """Notes shifted by `semitones` (one for all, or one per piece); uint16 [L].

    Notes that leave 0..127 become `<U>`, as in the reference. Drums stay.
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    return kernels.transpose(ids, _per_piece(ids, semitones, np.int64))


def change_velocity(ids: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
    """Notes louder by `steps` of 10 (one for all, or one per piece), kept in 10..120; uint16."""
    ids = np.ascontiguousarray(ids, np.uint16)
    return kernels.change_velocity(ids, _per_piece(ids, steps, np.int64))


def change_tempo(
    ids: np.ndarray,
    factor: float | np.ndarray,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    *,
    rubato: SineModulation | None = None,
) -> np.ndarray:
    """All times multiplied by `factor` (one for all, or one per piece); uint16 [L].

    Args:
        ids: window of one or several pieces, uint16 [L].
        factor: above 1 is slower.
        tokenizer: whose kinds the ids have.
        rng: shuffles the events of one onset (mix-up); None keeps their order.
        rubato: how the local tempo is modulated, before `factor`: depth below 1, period in ms.

    Events cut by the window's edge are dropped, and so are `<U>` and `<P>`.
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    draws = np.empty(0) if rng is None else rng.random(len(ids))
    modulation = np.zeros((_n_pieces(ids), 3)) if rubato is None else rubato.table()
    factors = _per_piece(ids, factor, np.float64)
    return kernels.change_tempo(ids, tokenizer.kind, factors, modulation, draws)


def change_sustain(ids: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Durations, not onsets, multiplied by `factor` (one, or one per piece); uint16 [L]."""
    ids = np.ascontiguousarray(ids, np.uint16)
    return kernels.change_sustain(ids, _per_piece(ids, factor, np.float64))


def modulate_velocity(ids: np.ndarray, modulation: SineModulation) -> np.ndarray:
    """Velocities moved along a slow wave (depth in steps of 10, period in tokens); uint16 [L]."""
    return kernels.modulate_velocity(np.ascontiguousarray(ids, np.uint16), modulation.table())


def drop_notes(
    ids: np.ndarray, rate: float | np.ndarray, rng: np.random.Generator, tokenizer: Tokenizer
) -> np.ndarray:
    """Each whole note or drum hit left out with probability `rate`, but the first; uint16 [L].

    The first event of every piece stays, so that a piece keeps its beginning.
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    rates = _per_piece(ids, rate, np.float64)
    return kernels.drop_notes(ids, tokenizer.kind, rates, rng.random(len(ids)))


def _n_pieces(ids: np.ndarray) -> int:
    """Parts of a window: one per `<E>`, and what follows the last."""
    return int(np.count_nonzero(ids == Tokenizer.eos_id)) + 1


def _per_piece(ids: np.ndarray, value: float | np.ndarray, dtype: type) -> np.ndarray:
    """`value` for each part of the window, [pieces]."""
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), (_n_pieces(ids),)))
