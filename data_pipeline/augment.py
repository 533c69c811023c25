"""Augmentation of token ids: tempo with mix-up, transposition, velocity.

Sequences may be windows of several pieces: each part that ends in `<E>` is changed on its own, and
the length of the whole is kept, cut or padded with `<P>`. Reference: ariautils
tokenizer/absolute.py export_data_aug, _base.py export_aug_fn_concat.
"""

from dataclasses import dataclass

import numba
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.tokenizer import SEGMENT_MS, STEP_MS, Kind, Tokenizer

_compiled = numba.njit(cache=True, nogil=True)

_PITCHES, _VELOCITIES = 128, 13
_TIME, _PREFIX = int(Kind.TIME), int(Kind.PREFIX)
_NOTE, _DRUM, _DUR = int(Kind.NOTE), int(Kind.DRUM), int(Kind.DUR)
_ONSET, _PEDAL = int(Kind.ONSET), int(Kind.PEDAL)
_SEGMENT, _STEP, _BOS = SEGMENT_MS, STEP_MS, Tokenizer.bos_id
_EOS, _PAD, _UNK = Tokenizer.eos_id, Tokenizer.pad_id, Tokenizer.unk_id
_DIM, _T = Tokenizer.dim_id, Tokenizer.time_id
_FIRST_NOTE, _FIRST_DRUM = Tokenizer.first_note_id, Tokenizer.first_drum_id
_FIRST_DUR, _FIRST_ONSET = Tokenizer.first_dur_id, Tokenizer.first_onset_id


@dataclass(frozen=True)
class AugmentConfig:
    """How much each piece is changed, at most; the defaults are the reference's.

    Attributes:
        tempo: factor of all times, drawn from 1 ± tempo.
        pitch: semitones of transposition, drawn from ± pitch.
        velocity: steps of 10, drawn from ± velocity.
        mixup: shuffle the notes of one onset.
    """

    tempo: float = 0.2
    pitch: int = 5
    velocity: int = 1
    mixup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tempo < 1 or self.pitch < 0 or self.velocity < 0:
            raise UserError(
                f"augmentation: tempo must lie in [0, 1), pitch and velocity must not be negative; "
                f"got tempo {self.tempo}, pitch {self.pitch}, velocity {self.velocity}"
            )


def augment(
    ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator, tokenizer: Tokenizer
) -> np.ndarray:
    """`ids` with tempo, pitch and velocity of each piece changed at random; uint16 [L] as given."""
    n_pieces = _n_pieces(ids)
    if config.tempo or config.mixup:
        factors = rng.uniform(1 - config.tempo, 1 + config.tempo, n_pieces)
        ids = change_tempo(ids, factors, tokenizer, rng if config.mixup else None)
        n_pieces = _n_pieces(ids)
    if config.pitch:
        ids = transpose(ids, rng.integers(-config.pitch, config.pitch + 1, n_pieces))
    if config.velocity:
        ids = change_velocity(ids, rng.integers(-config.velocity, config.velocity + 1, n_pieces))
    return ids


def transpose(ids: np.ndarray, semitones: int | np.ndarray) -> np.ndarray:
    """Notes shifted by `semitones` (one for all, or one per piece); uint16 [L].

    Notes that leave 0..127 become `<U>`, as in the reference. Drums stay.
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    return _transpose(ids, _per_piece(ids, semitones, np.int64))


def change_velocity(ids: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
    """Notes louder by `steps` of 10 (one for all, or one per piece), kept in 10..120; uint16."""
    ids = np.ascontiguousarray(ids, np.uint16)
    return _change_velocity(ids, _per_piece(ids, steps, np.int64))


def change_tempo(
    ids: np.ndarray,
    factor: float | np.ndarray,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """All times multiplied by `factor` (one for all, or one per piece); uint16 [L].

    Args:
        ids: window of one or several pieces, uint16 [L].
        factor: above 1 is slower.
        tokenizer: whose kinds the ids have.
        rng: shuffles the events of one onset (mix-up); None keeps their order.

    Events cut by the window's edge are dropped, and so are `<U>` and `<P>`.
    """
    ids = np.ascontiguousarray(ids, np.uint16)
    draws = np.empty(0) if rng is None else rng.random(len(ids))
    return _change_tempo(ids, tokenizer.kind, _per_piece(ids, factor, np.float64), draws)


def _n_pieces(ids: np.ndarray) -> int:
    """Parts of a window: one per `<E>`, and what follows the last."""
    return int(np.count_nonzero(ids == _EOS)) + 1


def _per_piece(ids: np.ndarray, value: float | np.ndarray, dtype: type) -> np.ndarray:
    """`value` for each part of the window, [pieces]."""
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), (_n_pieces(ids),)))


@_compiled
def _transpose(ids, semitones):
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
def _change_velocity(ids, steps):
    out = ids.copy()
    piece = 0
    for i in range(len(ids)):
        token = int(ids[i])
        if _FIRST_NOTE <= token < _FIRST_DRUM:
            step = (token - _FIRST_NOTE) % _VELOCITIES
            out[i] = token - step + min(max(step + steps[piece], 1), _VELOCITIES - 1)
        elif token == _EOS:
            piece += 1
    return out


@_compiled
def _change_tempo(ids, kind, factors, draws):
    n = len(ids)
    out = np.full(n, _PAD, np.uint16)
    begin = written = piece = 0
    while begin < n and written < n:
        end = begin
        while end < n and ids[end] != _EOS:
            end += 1
        written = _slow_piece(ids, kind, begin, end, factors[piece], draws, out, written)
        if end < n and written < n:
            out[written] = _EOS
            written += 1
        begin = end + 1
        piece += 1
    return out


@_compiled
def _events(ids, kind, position, end):
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
def _slow_piece(ids, kind, begin, end, factor, draws, out, written):
    """Writes one piece, without its `<E>`, at `out[written:]`; returns where it ends."""
    n_out = len(out)
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
        target = int(np.rint(onset[first] * _STEP * factor / _STEP))
        segment, target_onset = divmod(target, _SEGMENT // _STEP)
        while target_segment < segment and written < n_out:
            out[written] = _T
            written += 1
            target_segment += 1
        for i in range(first, stop):
            written = _put_event(ids, kind, at[i], target_onset, factor, out, written)
        if dim_after == onset[first] and written < n_out:
            out[written] = _DIM
            written += 1
        if written >= n_out:
            return n_out
        first = stop
    return written


@_compiled
def _put_event(ids, kind, position, onset, factor, out, written):
    """Writes one event, as far as there is room."""
    length = 3 if kind[ids[position]] == _NOTE else 2
    for part in range(min(length, len(out) - written)):
        if part == 0:
            token = int(ids[position])
        elif part == 1:
            token = _FIRST_ONSET + onset
        else:
            steps = np.rint((int(ids[position + 2]) - _FIRST_DUR) * _STEP * factor / _STEP)
            token = _FIRST_DUR + min(max(int(steps), 1), _SEGMENT // _STEP)
        out[written] = token
        written += 1
    return written
