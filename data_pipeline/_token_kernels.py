"""The loops of `Tokenizer`, compiled: events to ids."""

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
)

_compiled = numba.njit(cache=True, nogil=True)

_PITCHES, _VELOCITIES = 128, 13


@_compiled
def note_tokens(pitch, velocity, channel, durations_ms, instrument, first_ids, unknown_id):
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
def write_events(heads, onsets_ms, durations, order, first_onset, time_id):
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
