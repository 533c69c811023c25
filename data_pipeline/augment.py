"""Augmentation of token ids: tempo with mix-up, rubato, pitch, velocity, sustain, notes that drop.

Sequences may be windows of several pieces: each part that ends in `<E>` is changed on its own, and
the length of the whole is kept, truncated or padded with `<P>`. Tempo, mix-up, pitch and velocity
are those of ariautils tokenizer/absolute.py export_data_aug and _base.py export_aug_fn_concat; the
reference does not know the others.
"""

from dataclasses import dataclass

import numba
import numpy as np

from data_pipeline.settings import AugmentConfig
from data_pipeline.tokenizers.aria import AriaTokenizer
from data_pipeline.vocabulary import INSTRUMENTS, SEGMENT_MS, STEP_MS, Kind

_INSTRUMENTS = len(INSTRUMENTS) + 1  # with drums
_RUBATO_MS, _CURVE_TOKENS = (5_000, 20_000), (100, 800)  # a token is a third of a note


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
    ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator, tokenizer: AriaTokenizer
) -> np.ndarray:
    """`ids` with each piece changed at random as `config` allows; uint16 [L] as given."""
    n = _n_pieces(ids)
    if config.instrument_drop:
        silent = rng.random((n, _INSTRUMENTS)) < config.instrument_drop
        ids = drop_notes(ids, 0, rng, tokenizer, silent=silent)
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
    if config.velocity or config.instrument_velocity:
        steps = rng.integers(-config.velocity, config.velocity + 1, n)[:, None]
        if config.instrument_velocity:
            own = rng.integers(0, 2 * config.instrument_velocity + 1, (n, _INSTRUMENTS))
            steps = steps + own - config.instrument_velocity
        ids = change_velocity(ids, steps)
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
    return _compiled_transpose(ids, _per_piece(ids, semitones, np.int64))


def change_velocity(ids: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
    """Notes louder by `steps` of 10, one for all, one per piece, or [pieces, instruments], kept in
    10..120; uint16 [L].
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    steps = steps if np.ndim(steps) == 2 else np.reshape(steps, (-1, 1))
    steps = np.broadcast_to(steps, (_n_pieces(ids), _INSTRUMENTS))
    return _compiled_change_velocity(ids, np.ascontiguousarray(steps, np.int64))


def change_tempo(
    ids: np.ndarray,
    factor: float | np.ndarray,
    tokenizer: AriaTokenizer,
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

    Events truncated by the window's edge are dropped, and so are `<U>` and `<P>`.
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    draws = np.empty(0) if rng is None else rng.random(len(ids))
    modulation = np.zeros((_n_pieces(ids), 3)) if rubato is None else rubato.table()
    factors = _per_piece(ids, factor, np.float64)
    return _compiled_change_tempo(ids, tokenizer.kind, factors, modulation, draws)


def change_sustain(ids: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Durations, not onsets, multiplied by `factor` (one, or one per piece); uint16 [L]."""
    ids = np.ascontiguousarray(ids, np.uint16)
    return _compiled_change_sustain(ids, _per_piece(ids, factor, np.float64))


def modulate_velocity(ids: np.ndarray, modulation: SineModulation) -> np.ndarray:
    """Velocities moved along a slow wave (depth in steps of 10, period in tokens); uint16 [L]."""
    return _compiled_modulate_velocity(np.ascontiguousarray(ids, np.uint16), modulation.table())


def drop_notes(
    ids: np.ndarray,
    rate: float | np.ndarray,
    rng: np.random.Generator,
    tokenizer: AriaTokenizer,
    *,
    silent: np.ndarray | None = None,
) -> np.ndarray:
    """Each whole note or drum hit left out with probability `rate`, but the first; uint16 [L].

    The first event of every piece stays, so that a piece keeps its beginning.

    Args:
        silent: bool [pieces, instruments], which are left out altogether, and not announced; all
            the same the one stays that a piece begins with.
    """
    from data_pipeline import _kernels as kernels

    ids = np.ascontiguousarray(ids, np.uint16)
    n, kind, instrument = _n_pieces(ids), tokenizer.kind, tokenizer.instrument
    silent = np.zeros((n, _INSTRUMENTS), bool) if silent is None else silent.copy()
    piece = np.cumsum(ids == _EOS) - (ids == _EOS)
    begins = np.flatnonzero(np.isin(kind[ids], (Kind.NOTE, Kind.DRUM)))
    piece, first = np.unique(piece[begins], return_index=True)
    silent[piece, instrument[ids[begins[first]]]] = False
    rates, draws = _per_piece(ids, rate, np.float64), rng.random(len(ids))
    return kernels.drop_notes(ids, kind, instrument, rates, silent, draws, (_EOS, _PAD))


def _n_pieces(ids: np.ndarray) -> int:
    """Parts of a window: one per `<E>`, and what follows the last."""
    return int(np.count_nonzero(ids == AriaTokenizer.eos_id)) + 1


def _per_piece(ids: np.ndarray, value: float | np.ndarray, dtype: type) -> np.ndarray:
    """`value` for each part of the window, [pieces]."""
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), (_n_pieces(ids),)))


# The loops, compiled: windows of uint16 ids in, windows of the same length out. A window's parts,
# each but the last ending in `<E>`, take their own row of the settings.
_compiled = numba.njit(cache=True, nogil=True)
_PITCHES, _VELOCITIES = 128, 13
_TIME, _PREFIX, _NOTE, _DRUM = map(int, (Kind.TIME, Kind.PREFIX, Kind.NOTE, Kind.DRUM))
_DUR, _ONSET, _PEDAL = map(int, (Kind.DUR, Kind.ONSET, Kind.PEDAL))
_SEGMENT, _STEP, _BOS = SEGMENT_MS, STEP_MS, AriaTokenizer.bos_id
_EOS, _PAD, _UNK = AriaTokenizer.eos_id, AriaTokenizer.pad_id, AriaTokenizer.unk_id
_DIM, _T = AriaTokenizer.dim_id, AriaTokenizer.time_id
_FIRST_NOTE, _FIRST_DRUM = AriaTokenizer.first_note_id, AriaTokenizer.first_drum_id
_FIRST_DUR, _FIRST_ONSET = AriaTokenizer.first_dur_id, AriaTokenizer.first_onset_id


@_compiled
def _compiled_transpose(ids: np.ndarray, semitones: np.ndarray) -> np.ndarray:
    out = ids.copy()
    piece = 0
    for i in range(len(ids)):
        token = int(ids[i])
        if _FIRST_NOTE <= token < _FIRST_DRUM:
            pitch = (token - _FIRST_NOTE) // _VELOCITIES % _PITCHES + semitones[piece]
            if 0 <= pitch < _PITCHES:
                out[i] = token + semitones[piece] * _VELOCITIES
            else:
                out[i] = _UNK
        elif token == _EOS:
            piece += 1
    return out


@_compiled
def _compiled_change_velocity(ids: np.ndarray, steps: np.ndarray) -> np.ndarray:
    out = ids.copy()
    piece = 0
    for i in range(len(ids)):
        token = int(ids[i])
        if _FIRST_NOTE <= token < _FIRST_DRUM:
            step = (token - _FIRST_NOTE) % _VELOCITIES
            louder = step + steps[piece, (token - _FIRST_NOTE) // (_PITCHES * _VELOCITIES)]
            out[i] = token - step + min(max(louder, 1), _VELOCITIES - 1)
        elif token == _EOS:
            piece += 1
    return out


@_compiled
def _compiled_change_sustain(ids: np.ndarray, factors: np.ndarray) -> np.ndarray:
    out = ids.copy()
    piece = 0
    for i in range(len(ids)):
        token = int(ids[i])
        if _FIRST_DUR <= token < _FIRST_ONSET:
            steps = int(np.rint((token - _FIRST_DUR) * factors[piece]))
            out[i] = _FIRST_DUR + min(max(steps, 1), _SEGMENT // _STEP)
        elif token == _EOS:
            piece += 1
    return out


@_compiled
def _compiled_modulate_velocity(ids: np.ndarray, modulation: np.ndarray) -> np.ndarray:
    out = ids.copy()
    piece = 0
    for i in range(len(ids)):
        token = int(ids[i])
        if _FIRST_NOTE <= token < _FIRST_DRUM and modulation[piece, 0] > 0:
            step = (token - _FIRST_NOTE) % _VELOCITIES
            wave = np.sin(2 * np.pi * i / modulation[piece, 1] + modulation[piece, 2])
            louder = step + int(np.rint(modulation[piece, 0] * wave))
            out[i] = token - step + min(max(louder, 1), _VELOCITIES - 1)
        elif token == _EOS:
            piece += 1
    return out


@_compiled
def _warped(ms: float, modulation: np.ndarray) -> float:
    """Time under a modulated tempo: the integral of 1 + depth cos(2 pi t / period + phase)."""
    if modulation[0] == 0:
        return float(ms)
    turns = 2 * np.pi / modulation[1]
    return ms + modulation[0] / turns * (np.sin(turns * ms + modulation[2]) - np.sin(modulation[2]))


@_compiled
def _compiled_change_tempo(
    ids: np.ndarray,
    kind: np.ndarray,
    factors: np.ndarray,
    modulation: np.ndarray,
    draws: np.ndarray,
) -> np.ndarray:
    n = len(ids)
    out = np.full(n, _PAD, np.uint16)
    begin = written = piece = 0
    while begin < n and written < n:
        end = begin
        while end < n and ids[end] != _EOS:
            end += 1
        time = (factors[piece], modulation[piece])
        written = _slow_piece(ids, kind, begin, end, time, draws, out, written)
        if end < n and written < n:
            out[written] = _EOS
            written += 1
        begin = end + 1
        piece += 1
    return out


@_compiled
def _events(
    ids: np.ndarray, kind: np.ndarray, position: int, end: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Where the events of a piece are, their onsets in steps, and the onset `<D>` follows (-1)."""
    at = np.empty(end - position, np.int64)
    onset = np.empty(end - position, np.int64)
    n = segment = 0
    latest, dim_after = 0, -1
    while position < end:
        what = kind[ids[position]]
        if what in (_NOTE, _DRUM, _PEDAL):
            length = 3 if what == _NOTE else 2
            whole = position + length <= end and kind[ids[position + 1]] == _ONSET
            if whole and (length == 2 or kind[ids[position + 2]] == _DUR):
                at[n] = position
                onset[n] = segment * (_SEGMENT // _STEP) + ids[position + 1] - _FIRST_ONSET
                latest = max(latest, onset[n])
                n += 1
            position += length
            continue
        if what == _TIME:
            segment += 1
        elif ids[position] == _DIM:
            dim_after = latest
        position += 1
    return at[:n], onset[:n], dim_after


@_compiled
def _slow_piece(
    ids: np.ndarray,
    kind: np.ndarray,
    begin: int,
    end: int,
    time: tuple[float, np.ndarray],
    draws: np.ndarray,
    out: np.ndarray,
    written: int,
) -> int:
    """Writes one piece, without its `<E>`, at `out[written:]`; returns where it ends."""
    n_out = len(out)
    factor, modulation = time
    position = begin
    while position < end and (ids[position] == _BOS or kind[ids[position]] == _PREFIX):
        if written == n_out:
            return written
        out[written] = ids[position]
        written += 1
        position += 1
    at, onset, dim_after = _events(ids, kind, position, end)
    for i in range(1, len(onset)):
        if onset[i] < onset[i - 1]:  # the reference sorts; only transcribed oddities need it
            order = np.argsort(onset, kind="mergesort")
            at, onset = at[order], onset[order]
            break
    first = target_segment = 0
    while first < len(at):
        stop = first + 1
        while stop < len(at) and onset[stop] == onset[first]:
            stop += 1
        if len(draws):
            for i in range(stop - 1, first, -1):
                j = first + int(draws[at[i]] * (i - first + 1))
                at[i], at[j] = at[j], at[i]
        ms = _warped(onset[first] * _STEP, modulation)
        target = int(np.rint(ms * factor / _STEP))
        segment, target_onset = divmod(target, _SEGMENT // _STEP)
        while target_segment < segment and written < n_out:
            out[written] = _T
            written += 1
            target_segment += 1
        for i in range(first, stop):
            steps = 0.0
            if kind[ids[at[i]]] == _NOTE:
                end_ms = (onset[first] + ids[at[i] + 2] - _FIRST_DUR) * _STEP
                steps = (_warped(end_ms, modulation) - ms) * factor / _STEP
            written = _put_event(ids, kind, at[i], target_onset, steps, out, written)
        if dim_after == onset[first] and written < n_out:
            out[written] = _DIM
            written += 1
        if written >= n_out:
            return n_out
        first = stop
    return written


@_compiled
def _put_event(
    ids: np.ndarray,
    kind: np.ndarray,
    position: int,
    onset: int,
    duration: float,
    out: np.ndarray,
    written: int,
) -> int:
    """Writes one event, as far as there is room; onset and duration in steps."""
    length = 3 if kind[ids[position]] == _NOTE else 2
    for part in range(min(length, len(out) - written)):
        if part == 0:
            token = int(ids[position])
        elif part == 1:
            token = _FIRST_ONSET + onset
        else:
            token = _FIRST_DUR + min(max(int(np.rint(duration)), 1), _SEGMENT // _STEP)
        out[written] = token
        written += 1
    return written
