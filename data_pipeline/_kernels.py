"""The compiled loops: times and pedal, tokens, filters, fingerprints, products of bytes.

Imported inside the functions that need them: numba takes longer to import than all else here.
"""

import numba
import numpy as np

from data_pipeline.midi import DRUM_CHANNEL
from data_pipeline.vocabulary import (
    DUR_INDEX,
    HIGHEST_DRUM,
    LOWEST_DRUM,
    ONSET_INDEX,
    SEGMENT_MS,
    VELOCITY_INDEX,
    Kind,
)

_compiled = numba.njit(cache=True, nogil=True)
Int = int | np.integer
_DEFAULT_TEMPO = 500_000  # microseconds per beat, where a file says nothing
_PITCHES, _VELOCITIES = 128, 13
_NOTE, _DRUM, _DUR, _ONSET = int(Kind.NOTE), int(Kind.DRUM), int(Kind.DUR), int(Kind.ONSET)


# --- times and pedal of a `Performance` -----------------------------------------------------------


@_compiled
def exact_ms(
    starts: np.ndarray,
    ends: np.ndarray,
    tempo_ticks: np.ndarray,
    tempi: np.ndarray,
    ticks_per_beat: Int,
) -> np.ndarray:
    """Milliseconds between ticks by the standard, rounded once, half to even.

    Before the first tempo 120 beats per minute hold; of several at one tick the last counts.
    Within one tempo the product is rounded as aria-utils rounds it, so that files of one tempo get
    the same ids in both readings. Across tempi the sums are integers, exact in float64 for longer
    than any file may last.

    Args and returns: see `reference_ms`.
    """
    n_tempi = len(tempo_ticks)
    before = np.empty(n_tempi)  # microseconds x ticks per beat up to each tempo
    total, tick, tempo = 0.0, np.int64(0), np.int64(_DEFAULT_TEMPO)
    for i in range(n_tempi):
        total += np.float64(tempo_ticks[i] - tick) * tempo
        before[i] = total
        tick, tempo = tempo_ticks[i], tempi[i]
    out = np.empty(len(starts), np.int64)
    start_segment: Int = np.int64(-1)
    segment: Int = np.int64(-1)
    for i in range(len(starts)):
        start_tick = starts[i]
        start_segment = _segment(start_tick, start_segment, tempo_ticks)
        segment = _segment(ends[i], segment, tempo_ticks)
        if segment == start_segment:
            here = tempi[segment] if segment >= 0 else _DEFAULT_TEMPO
            seconds = (ends[i] - start_tick) * (here * 1e-6 / ticks_per_beat)
            out[i] = np.int64(np.rint(seconds * 1e3))
        else:
            scaled = _scaled(ends[i], segment, before, tempo_ticks, tempi)
            scaled -= _scaled(start_tick, start_segment, before, tempo_ticks, tempi)
            out[i] = np.int64(np.rint(scaled / (ticks_per_beat * 1e3)))
    return out


@_compiled
def _segment(tick: Int, guess: Int, tempo_ticks: np.ndarray) -> Int:
    """Index of the tempo in force at `tick`, -1 before the first; found at once if near `guess`."""
    n_tempi = len(tempo_ticks)
    if (guess < 0 or tempo_ticks[guess] <= tick) and (
        guess + 1 == n_tempi or tick < tempo_ticks[guess + 1]
    ):
        return guess
    return np.int64(np.searchsorted(tempo_ticks, tick, side="right") - 1)


@_compiled
def _scaled(
    tick: Int, segment: Int, before: np.ndarray, tempo_ticks: np.ndarray, tempi: np.ndarray
) -> float:
    """Microseconds x ticks per beat from the start of the file to `tick`."""
    if segment < 0:
        return np.float64(tick) * _DEFAULT_TEMPO
    return before[segment] + np.float64(tick - tempo_ticks[segment]) * tempi[segment]


@_compiled
def reference_ms(
    starts: np.ndarray,
    ends: np.ndarray,
    tempo_ticks: np.ndarray,
    tempi: np.ndarray,
    ticks_per_beat: Int,
) -> np.ndarray:
    """Milliseconds between ticks as aria-utils counts them (get_duration_ms), half to even.

    The reference sums the tempo segments in floating point beginning one segment early where the
    start lies beyond the last tempo change; ids depend on it, so it is kept.

    Args:
        starts, ends: int64 [N] ticks.
        tempo_ticks, tempi: int64 [M >= 1], sorted by tick; microseconds a beat.

    Returns:
        int64 [N].
    """
    n_tempi = len(tempo_ticks)
    out = np.empty(len(starts), np.int64)
    segment = now = 0
    seconds = 0.0
    for i in range(len(starts)):
        start, end = starts[i], ends[i]
        if i == 0 or start != starts[i - 1] or end < ends[i - 1]:
            segment = min(np.searchsorted(tempo_ticks, start), n_tempi - 1)
            segment = max(segment - 1, 0)
            seconds, now = 0.0, start
        # Else: goes on from where the last sum stood, so that sorted ends cost one pass.
        while segment + 1 < n_tempi and tempo_ticks[segment + 1] <= end:
            following = tempo_ticks[segment + 1]
            seconds += (following - now) * (tempi[segment] * 1e-6 / ticks_per_beat)
            now = following
            segment += 1
        total = seconds
        if segment + 1 < n_tempi or end > tempo_ticks[n_tempi - 1]:
            total += (end - now) * (tempi[segment] * 1e-6 / ticks_per_beat)
        out[i] = np.int64(np.rint(total * 1e3))
    return out


@_compiled
def pedalled_ends(
    ends: np.ndarray,
    channels: np.ndarray,
    pedal_ticks: np.ndarray,
    pedal_down: np.ndarray,
    pedal_channels: np.ndarray,
    final_tick: Int,
) -> np.ndarray:
    """Note ends, each moved to the pedal's release where the pedal held the note.

    Args:
        ends: int64 [N] ticks; channels: uint8 [N].
        pedal_ticks: int64 [P] sorted; pedal_down: bool [P]; pedal_channels: uint8 [P].
        final_tick: where a pedal that is never released lets go.

    Returns:
        int64 [N] (reference: _build_pedal_intervals, resolve_pedal).
    """
    out = ends.copy()
    counts = np.zeros(16, np.int64)
    for channel in pedal_channels:
        counts[channel] += 1
    for channel in range(16):
        if counts[channel] == 0:
            continue
        presses = np.empty(counts[channel], np.int64)
        releases = np.empty(counts[channel], np.int64)
        n = 0
        down = False
        for p in range(len(pedal_ticks)):
            if pedal_channels[p] != channel:
                continue
            if pedal_down[p] and not down:
                presses[n] = pedal_ticks[p]
                down = True
            elif not pedal_down[p] and down:
                releases[n] = pedal_ticks[p]
                n += 1
                down = False
        if down:
            releases[n] = final_tick
            n += 1
        for i in range(len(ends)):
            if channels[i] == channel:
                # Intervals are disjoint: only the last one pressed before the end can hold it.
                at = np.searchsorted(presses[:n], ends[i]) - 1
                if at >= 0 and ends[i] < releases[at]:
                    out[i] = releases[at]
    return out


# --- events to ids --------------------------------------------------------------------------------


@_compiled
def note_tokens(
    pitch: np.ndarray,
    velocity: np.ndarray,
    channel: np.ndarray,
    durations_ms: np.ndarray,
    instrument: np.ndarray,
    first_ids: tuple[int, int, int],
    unknown_id: Int,
) -> tuple[np.ndarray, np.ndarray]:
    """First and third token of notes.

    Args:
        pitch, velocity, channel: uint8 [N].
        durations_ms: int64 [N].
        instrument: int64 [N], index into the vocabulary's instruments; of drums ignored.
        first_ids: the first note, drum and duration id.
        unknown_id: stands for a drum that the vocabulary does not have.

    Returns:
        int64 [N] and int64 [N], -1 where a drum hit has no duration.
    """
    first_note, first_drum, first_dur = first_ids
    heads = np.empty(len(pitch), np.int64)
    durations = np.full(len(pitch), -1, np.int64)
    for i in range(len(pitch)):
        key = np.int64(pitch[i])
        if channel[i] == DRUM_CHANNEL:
            known = LOWEST_DRUM <= key <= HIGHEST_DRUM
            heads[i] = first_drum + key - LOWEST_DRUM if known else unknown_id
            continue
        row = instrument[i] * _PITCHES + key
        heads[i] = first_note + row * _VELOCITIES + VELOCITY_INDEX[velocity[i]]
        duration = DUR_INDEX[min(max(durations_ms[i], 0), SEGMENT_MS)]
        durations[i] = first_dur + max(duration, 1)  # nothing sounds for no time
    return heads, durations


@_compiled
def write_events(
    heads: np.ndarray,
    onsets_ms: np.ndarray,
    durations: np.ndarray,
    order: np.ndarray,
    first_onset: Int,
    time_id: Int,
) -> np.ndarray:
    """Ids of events (first token, onset, duration) in `order`, `<T>` where a segment begins.

    Args:
        heads: int64 [N]; onsets_ms: int64 [N], below 0 only as aria-utils counts; durations:
            int64 [N], -1 for none.
        order: int64 [N], by onset.
        first_onset: id of onset 0; time_id: of `<T>`.

    Returns:
        uint16 [L].
    """
    n_tokens = segment = 0
    for i in order:
        here = onsets_ms[i] // SEGMENT_MS
        n_tokens += max(here - segment, 0) + (2 if durations[i] < 0 else 3)
        segment = here
    out = np.empty(n_tokens, np.uint16)
    at = segment = 0
    for i in order:
        here = onsets_ms[i] // SEGMENT_MS
        while segment < here:
            out[at] = time_id
            at += 1
            segment += 1
        segment = here  # less than it was after an onset below 0
        out[at] = heads[i]
        out[at + 1] = first_onset + ONSET_INDEX[onsets_ms[i] - here * SEGMENT_MS]
        at += 2
        if durations[i] >= 0:
            out[at] = durations[i]
            at += 1
    return out


@_compiled
def drop_notes(
    ids: np.ndarray,
    kind: np.ndarray,
    instrument: np.ndarray,
    rates: np.ndarray,
    silent: np.ndarray,
    draws: np.ndarray,
    end_and_padding: tuple[Int, Int],
) -> np.ndarray:
    """`augment.drop_notes`, padded to the length of `ids`.

    Args:
        ids: uint16 [L]; kind, instrument: of each id of the vocabulary.
        rates: float64 [pieces]; silent: bool [pieces, instruments]; draws: float64 [L] in [0, 1).
        end_and_padding: ids of `<E>` and `<P>`.
    """
    out = np.full(len(ids), end_and_padding[1], np.uint16)
    written = position = piece = 0
    first = True
    while position < len(ids):
        token = ids[position]
        what, player = kind[token], instrument[token]
        length = 1
        if what in (_NOTE, _DRUM):
            if position + 1 < len(ids) and kind[ids[position + 1]] == _ONSET:
                length = 2
                if what == _NOTE and position + 2 < len(ids) and kind[ids[position + 2]] == _DUR:
                    length = 3
            whole = length == (3 if what == _NOTE else 2)
            dropped = silent[piece, player]
            if whole and not dropped:
                dropped = not first and draws[position] < rates[piece]
                first = False
        else:  # an instrument's announcement, or what is of none
            dropped = player >= 0 and silent[piece, player]
        if not dropped:
            for part in range(length):
                out[written + part] = ids[position + part]
            written += length
        position += length
        if token == end_and_padding[0]:
            piece += 1
            first = True
    return out


# --- what filters count in a sliding window -------------------------------------------------------


@_compiled
def window_counts(
    times_s: np.ndarray, pitches: np.ndarray, starts_s: np.ndarray, window_s: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Notes that begin in each window, both ends included.

    Args:
        times_s: float64 [N], sorted; pitches: uint8 [N].
        starts_s: float64 [K], sorted; window_s: length.

    Returns:
        Notes of each window, int64 [K]; different pitches of each, int64 [K]; the most notes of
        one pitch in any window.
    """
    n_notes = np.zeros(len(starts_s), np.int64)
    n_pitches = np.zeros(len(starts_s), np.int64)
    counts = np.zeros(128, np.int64)
    first = last = unique = most_of_one = 0
    for k in range(len(starts_s)):
        # Out before in: then no count ever exceeds what it is once the window is complete.
        while first < last and times_s[first] < starts_s[k]:
            counts[pitches[first]] -= 1
            unique -= counts[pitches[first]] == 0
            first += 1
        while last < len(times_s) and times_s[last] <= starts_s[k] + window_s:
            if times_s[last] >= starts_s[k]:
                unique += counts[pitches[last]] == 0
                counts[pitches[last]] += 1
                most_of_one = max(most_of_one, counts[pitches[last]])
            else:
                first = last + 1
            last += 1
        n_notes[k], n_pitches[k] = last - first, unique
    return n_notes, n_pitches, most_of_one


# --- the fingerprint ------------------------------------------------------------------------------


@_compiled
def min_hashes(shingles: np.ndarray, multipliers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The least value of each hash function, upper 32 bits of shingle * multiplier + offset.

    Args:
        shingles: uint64 [S >= 1]; multipliers, offsets: uint64 [H].

    Returns:
        uint32 [H].
    """
    out = np.empty(len(multipliers), np.uint32)
    for k in range(len(multipliers)):
        least = np.uint64(0xFFFFFFFFFFFFFFFF)
        for shingle in shingles:
            least = min(least, shingle * multipliers[k] + offsets[k])
        out[k] = least >> np.uint64(32)
    return out


# --- searching ------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def byte_products(
    bytes_NxE: np.ndarray, steps_N: np.ndarray, query_E: np.ndarray, out_N: np.ndarray
) -> None:
    """Scalar products of rows of int8, each times its step, with a vector; all else float32."""
    for i in range(len(bytes_NxE)):
        total = np.float32(0)
        for j in range(len(query_E)):
            total += np.float32(bytes_NxE[i, j]) * query_E[j]
        out_N[i] = total * steps_N[i]
