"""Standard MIDI File bytes to notes and controllers, compiled; exact to mido and aria-utils.

The notes, times and controllers are those of `mido.MidiFile` followed by aria-utils
`_extract_track_data`, on overlapping and zero-length notes too. Files that mido refuses are
refused, except for the content of messages that no token depends on: system-exclusive bytes above
127, key and time signatures that do not exist.
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

# Columns of what `decode_track` counts.
_STATUS, _NOTES, _PEDALS, _TEMPI, _PROGRAMS, _TEXTS = range(6)

_SYSEX, _ESCAPE, _META = 0xF0, 0xF7, 0xFF
_TEXT, _COPYRIGHT, _TEMPO = 0x01, 0x02, 0x51

_compiled = numba.njit(cache=True, nogil=True)

# Data bytes after each status byte; -1: no such message (mido's table).
_N_DATA = np.full(256, 2, np.int64)
_N_DATA[0xC0:0xE0] = 1
_N_DATA[0xF1], _N_DATA[0xF2], _N_DATA[0xF3] = 1, 2, 1
_N_DATA[[0xF6, 0xF8, 0xFA, 0xFB, 0xFC, 0xFE]] = 0
_N_DATA[[0xF4, 0xF5, 0xF9, 0xFD]] = -1

_KNOWN_META = np.zeros(256, np.bool_)
_KNOWN_META[[*range(8), 9, 0x20, 0x21, 0x2F, 0x51, 0x54, 0x58, 0x59, 0x7F]] = True


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
def _put(table, row, values):
    # Numba's own `table[row] = values` is several times slower.
    for column in range(len(values)):
        table[row, column] = values[column]


@_compiled
def decode_track(data, start, end, notes, pedals, tempi, programs, texts):
    """Decodes one track chunk.

    Args:
        data: uint8 [end], the file as far as the chunk's end.
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
    # Notes as they begin, linked to lists of open notes per channel and pitch.
    first = np.full(2048, -1, np.int64)
    last = np.full(2048, -1, np.int64)
    pool = np.empty((len(notes), 3), np.int64)  # start tick, velocity, next row
    n_opened = tick = 0
    running = np.int64(0)
    position = start
    while position != end:
        delta, position = _varint(data, position)
        if delta < 0 or tick + delta > MAX_TICK:
            counts[_STATUS] = 1 if delta == -1 else 6
            return counts
        tick += delta
        if position >= end:
            counts[_STATUS] = 1
            return counts
        status = np.int64(data[position])
        if status >= 0x80:
            position += 1
            if status != _META:
                running = status
        else:
            status = running
            if running == 0 or _N_DATA[running] == 0:
                counts[_STATUS] = 2
                return counts
            if running in (_SYSEX, _ESCAPE):
                position += 1  # mido drops the byte it looked at
        if status in (_META, _SYSEX, _ESCAPE):
            position, lost = _skip_message(
                data, position, status, tick, delta, tempi, texts, counts
            )
            tick -= lost
            if counts[_STATUS]:
                return counts
            continue
        n_data = _N_DATA[status]
        if n_data < 0 or position + n_data > end:
            counts[_STATUS] = 3 if n_data < 0 else 1
            return counts
        one = np.int64(data[position]) if n_data > 0 else 0
        two = np.int64(data[position + 1]) if n_data > 1 else 0
        if one > 127 or two > 127:
            counts[_STATUS] = 4
            return counts
        position += n_data
        kind, channel = status & 0xF0, status & 0x0F
        if kind == 0xC0:
            _put(programs, counts[_PROGRAMS], (tick, one, channel))
            counts[_PROGRAMS] += 1
        elif kind == 0xB0 and one == 64:
            _put(pedals, counts[_PEDALS], (tick, two, channel))
            counts[_PEDALS] += 1
        elif kind == 0x90 and two > 0:
            key = channel * 128 + one
            _put(pool, n_opened, (tick, two, -1))
            if first[key] < 0:
                first[key] = n_opened
            else:
                pool[last[key], 2] = n_opened
            last[key] = n_opened
            n_opened += 1
        elif kind == 0x80 or kind == 0x90:
            key = channel * 128 + one
            n = counts[_NOTES]
            first[key], last[key], counts[_NOTES] = _close(pool, first[key], tick, key, notes, n)
    return counts


@_compiled
def _skip_message(data, position, status, tick, delta, tempi, texts, counts):
    """Steps over a meta or system-exclusive message and keeps its tempo or text.

    Returns:
        Next position, and the ticks that mido loses: the delta time of a meta message it does not
        know. Faults go to `counts`.
    """
    kind = np.int64(-1)
    if status == _META:
        if position >= len(data):
            counts[_STATUS] = 1
            return position, 0
        kind = np.int64(data[position])
        position += 1
    length, position = _varint(data, position)
    if length > MAX_MESSAGE_BYTES or length == -2:
        counts[_STATUS] = 5
    elif length < 0 or position + length > len(data):
        counts[_STATUS] = 1
    elif kind in (_TEXT, _COPYRIGHT):
        _put(texts, counts[_TEXTS], (position, length))
        counts[_TEXTS] += 1
    elif kind == _TEMPO and length < 3:
        counts[_STATUS] = 7
    elif kind == _TEMPO:
        tempo = np.int64(0)
        for byte in data[position : position + 3]:
            tempo = tempo * 256 + np.int64(byte)
        _put(tempi, counts[_TEMPI], (tick, tempo))
        counts[_TEMPI] += 1
    elif kind >= 0 and not _KNOWN_META[kind]:
        return position + length, delta
    return position + length, 0


@_compiled
def _close(pool, row, tick, key, notes, n):
    """Ends the open notes of one pitch and channel at `tick`.

    Args:
        pool: notes as they began; row: the first open one.
        key: channel * 128 + pitch.
        notes, n: where finished notes go, and how many there are.

    Returns:
        First and last row of the notes that stay open, and the new `n`. Notes that began at this
        very tick stay open if earlier ones were ended, else they are forgotten.
    """
    before = n
    kept_first = kept_last = -1
    while row >= 0:
        following = pool[row, 2]
        if pool[row, 0] != tick:
            _put(notes, n, (pool[row, 0], tick, key & 127, pool[row, 1], key >> 7))
            n += 1
        else:
            pool[row, 2] = -1
            if kept_first < 0:
                kept_first = row
            else:
                pool[kept_last, 2] = row
            kept_last = row
        row = following
    if n == before:
        return -1, -1, n
    return kept_first, kept_last, n


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
