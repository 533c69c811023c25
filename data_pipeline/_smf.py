"""Standard MIDI File bytes to notes and controllers, compiled; exact to mido and aria-utils.

The semantics are those of `mido.MidiFile` followed by aria-utils `_extract_track_data`: the same
files are refused, and the same notes are paired, on overlapping and zero-length notes too.
"""

import numba
import numpy as np

# Why a file is refused: status codes of `decode_track`, and the word `rejected.jsonl` gets.
REASONS = {
    1: "truncated",
    2: "running-status-without-status",
    3: "undefined-status-byte",
    4: "data-byte-out-of-range",
    5: "message-too-long",
    6: "time-too-large",
    7: "bad-tempo",
}
MAX_MESSAGE_BYTES = 1_000_000  # mido refuses longer system-exclusive and meta messages
MAX_TICK = 1 << 40

_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def _varint(data, position):
    """Value and next position of a variable-length number; value -1 when cut, -2 when absurd."""
    value = 0
    while position < len(data):
        byte = data[position]
        position += 1
        value = (value << 7) | (byte & 0x7F)
        if value > MAX_TICK:
            return -2, position
        if byte < 0x80:
            return value, position
    return -1, position


@_compiled
def decode_track(data, start, end, notes, pedals, tempi, programs, texts):
    """Decodes one track chunk.

    Args:
        data: uint8 [N], the file.
        start, end: the chunk's content.
        notes: int64 [_, 5] out: start tick, end tick, pitch, velocity, channel.
        pedals: int64 [_, 3] out: tick, value, channel.
        tempi: int64 [_, 2] out: tick, microseconds a beat.
        programs: int64 [_, 3] out: tick, program, channel.
        texts: int64 [_, 2] out: first byte and length of text and copyright messages.

    Returns:
        int64 [6]: status (0 or a key of `REASONS`), and how many rows of each were written.
    """
    counts = np.zeros(6, np.int64)
    # Open notes: one linked list per (channel, pitch) through rows of a growing pool.
    first = np.full(2048, -1, np.int64)
    last = np.full(2048, -1, np.int64)
    pool = np.empty((256, 3), np.int64)  # start tick, velocity, next row
    free = 0
    position = start
    tick = 0
    running = 0
    while position != end:
        delta, position = _varint(data, position)
        if delta < 0:
            counts[0] = 1 if delta == -1 else 6
            return counts
        tick += delta
        if tick > MAX_TICK:
            counts[0] = 6
            return counts
        if position >= len(data):
            counts[0] = 1
            return counts
        status = data[position]
        if status < 0x80:
            if running == 0:
                counts[0] = 2
                return counts
            status = running
            if running == 0xF0 or running == 0xF7:
                position += 1  # mido drops the byte it looked at
        else:
            position += 1
            if status != 0xFF:
                running = status
        if status == 0xFF or status == 0xF0 or status == 0xF7:
            kind = -1
            if status == 0xFF:
                if position >= len(data):
                    counts[0] = 1
                    return counts
                kind = data[position]
                position += 1
            length, position = _varint(data, position)
            if length > MAX_MESSAGE_BYTES:
                counts[0] = 5
                return counts
            if length < 0 or position + length > len(data):
                counts[0] = 1 if length != -2 else 5
                return counts
            if kind == 1 or kind == 2:
                texts[counts[5], 0] = position
                texts[counts[5], 1] = length
                counts[5] += 1
            elif kind == 0x51:
                if length < 3:
                    counts[0] = 7
                    return counts
                tempi[counts[3], 0] = tick
                tempi[counts[3], 1] = (
                    (np.int64(data[position]) << 16)
                    | (np.int64(data[position + 1]) << 8)
                    | np.int64(data[position + 2])
                )
                counts[3] += 1
            position += length
            continue
        high = status & 0xF0
        if high == 0xF0:
            if status == 0xF1 or status == 0xF3:
                n_data = 1
            elif status == 0xF2:
                n_data = 2
            elif status == 0xF4 or status == 0xF5 or status == 0xF9 or status == 0xFD:
                counts[0] = 3
                return counts
            else:
                n_data = 0
        elif high == 0xC0 or high == 0xD0:
            n_data = 1
        else:
            n_data = 2
        if position + n_data > len(data):
            counts[0] = 1
            return counts
        for i in range(n_data):
            if data[position + i] > 127:
                counts[0] = 4
                return counts
        one = np.int64(data[position]) if n_data > 0 else 0
        two = np.int64(data[position + 1]) if n_data > 1 else 0
        position += n_data
        channel = np.int64(status & 0x0F)
        if high == 0xC0:
            programs[counts[4], 0] = tick
            programs[counts[4], 1] = one
            programs[counts[4], 2] = channel
            counts[4] += 1
        elif high == 0xB0 and one == 64:
            pedals[counts[2], 0] = tick
            pedals[counts[2], 1] = two
            pedals[counts[2], 2] = channel
            counts[2] += 1
        elif high == 0x90 and two > 0:
            if free == len(pool):
                grown = np.empty((2 * len(pool), 3), np.int64)
                grown[:free] = pool
                pool = grown
            pool[free, 0] = tick
            pool[free, 1] = two
            pool[free, 2] = -1
            key = channel * 128 + one
            if first[key] < 0:
                first[key] = free
            else:
                pool[last[key], 2] = free
            last[key] = free
            free += 1
        elif high == 0x80 or high == 0x90:
            key = channel * 128 + one
            row = first[key]
            kept_first = -1
            kept_last = -1
            n_closed = 0
            while row >= 0:
                following = pool[row, 2]
                if pool[row, 0] != tick:
                    n = counts[1]
                    notes[n, 0] = pool[row, 0]
                    notes[n, 1] = tick
                    notes[n, 2] = one
                    notes[n, 3] = pool[row, 1]
                    notes[n, 4] = channel
                    counts[1] += 1
                    n_closed += 1
                else:
                    pool[row, 2] = -1
                    if kept_first < 0:
                        kept_first = row
                    else:
                        pool[kept_last, 2] = row
                    kept_last = row
                row = following
            # A note-on at this very tick survives only if the note-off closed an earlier note.
            if n_closed == 0:
                kept_first = -1
            first[key] = kept_first
            last[key] = kept_last
    return counts


@_compiled
def durations_ms(starts, ends, tempo_ticks, tempi, ticks_per_beat):
    """Milliseconds between ticks, rounded half to even (reference: get_duration_ms).

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
    for i in range(len(starts)):
        start, end = starts[i], ends[i]
        segment = np.searchsorted(tempo_ticks, start)
        if segment == n_tempi:
            segment = n_tempi - 1
        if segment > 0:
            segment -= 1
        seconds = 0.0
        now = start
        while segment + 1 < n_tempi:
            following = tempo_ticks[segment + 1]
            stop = end if end < following else following
            seconds += (stop - now) * (tempi[segment] * 1e-6 / ticks_per_beat)
            if end < following:
                break
            now = following
            segment += 1
        if end > tempo_ticks[n_tempi - 1]:
            seconds += (end - now) * (tempi[n_tempi - 1] * 1e-6 / ticks_per_beat)
        out[i] = np.int64(np.rint(seconds * 1e3))
    return out


@_compiled
def pedalled_ends(ends, channels, pedal_ticks, pedal_down, pedal_channels, final_tick):
    """Note ends, each moved to the pedal's release where the pedal held the note.

    Args:
        ends: int64 [N] ticks; channels: uint8 [N].
        pedal_ticks: int64 [P] sorted; pedal_down: bool [P]; pedal_channels: uint8 [P].
        final_tick: where a pedal that is never released lets go.

    Returns:
        int64 [N] (reference: _build_pedal_intervals, resolve_pedal).
    """
    out = ends.copy()
    for channel in range(16):
        n = 0
        for p in range(len(pedal_ticks)):
            if pedal_channels[p] == channel:
                n += 1
        if n == 0:
            continue
        presses = np.empty(n, np.int64)
        releases = np.empty(n, np.int64)
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
