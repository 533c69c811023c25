"""Standard MIDI File bytes to notes and controllers, compiled: one decoder, two readings.

By the standard a track ends with its end-of-track event, running status belongs to channel
messages, all events take time, and a drum hit may last no time. The other reading has the notes,
times and controllers of `mido.MidiFile` followed by aria-utils `_extract_track_data`, faults
included; it refuses the files that mido refuses, except for the content of messages that no token
depends on: system-exclusive bytes above 127, key and time signatures that do not exist.
"""

import struct
from contextlib import suppress

import numba
import numpy as np

from data_pipeline.errors import InvalidMidi

# Why a file is refused: status codes of `decode_track`, and the word `rejected.jsonl` gets.
_TRUNCATED = 1
REASONS = {
    _TRUNCATED: "truncated",
    2: "running-status-without-status",
    3: "undefined-status-byte",
    4: "data-byte-out-of-range",
    5: "message-too-long",
    6: "time-too-large",
    7: "bad-tempo",
}
MAX_MESSAGE_BYTES = 1_000_000  # mido refuses longer system-exclusive and meta messages
MAX_TICK = 1 << 40
OPEN = 2 * MAX_TICK
"""End tick of a note that nothing ends before its track does."""

# What `decode_track` returns: status, rows per table, where it stopped, whether the track ended.
_STATUS, _NOTES, _PEDALS, _TEMPI, _PROGRAMS, _TEXTS, _STOP, _ENDED = range(8)

_SYSEX, _ESCAPE, _META = 0xF0, 0xF7, 0xFF
_TEXT, _COPYRIGHT, _END_OF_TRACK, _TEMPO = 0x01, 0x02, 0x2F, 0x51
_DRUMS = 9
_PEDAL, ALL_SOUND_OFF, RESET_CONTROLLERS, _LOCAL_CONTROL = 64, 120, 121, 122
CHANNEL_MODE = 128
"""Added to the controller number of a channel mode message where pedal values stand."""

_compiled = numba.njit(cache=True, nogil=True)
Int = int | np.integer

# Data bytes after each status byte; -1: no such message (mido's table).
_N_DATA = np.full(256, 2, np.int64)
_N_DATA[0xC0:0xE0] = 1
_N_DATA[0xF1], _N_DATA[0xF2], _N_DATA[0xF3] = 1, 2, 1
_N_DATA[[0xF6, 0xF8, 0xFA, 0xFB, 0xFC, 0xFE]] = 0
_N_DATA[[0xF4, 0xF5, 0xF9, 0xFD]] = -1

_KNOWN_META = np.zeros(256, np.bool_)
_KNOWN_META[[*range(8), 9, 0x20, 0x21, 0x2F, 0x51, 0x54, 0x58, 0x59, 0x7F]] = True


def unwrapped(data: bytes, name: str) -> bytes:
    """The MIDI file inside a RIFF envelope, else `data`."""
    if data[:4] == b"RIFF" and data[8:12] == b"RMID":
        position = 12
        while data[position : position + 4] != b"data" and position + 8 <= len(data):
            size = int.from_bytes(data[position + 4 : position + 8], "little")
            position += 8 + size
            position += size % 2 and data[position : position + 1] == b"\0"  # padding
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        data = data[position + 8 : position + 8 + size]
    if data[:4] != b"MThd":
        raise InvalidMidi("not-midi", f"{name}: not a MIDI file (it does not start with MThd)")
    return data


def time_division(division: int, name: str, standard: bool) -> tuple[int, int | None]:
    """Ticks per beat, and the tempo in microseconds that holds where a beat is a second of SMPTE.

    aria-utils takes a division of frames for a negative number of ticks per beat.
    """
    frames, ticks_per_frame = -(division >> 8), division & 0xFF
    if division > 0 or (division and not standard):
        return division, None
    if frames not in (24, 25, 29, 30) or not ticks_per_frame:
        raise InvalidMidi("no-ticks-per-beat", f"{name}: {division} is no time division")
    if frames == 29:  # 30 frames with some left out: 29.97 per second
        return 30 * ticks_per_frame, 1_001_000
    return frames * ticks_per_frame, 1_000_000


def decoded_tracks(
    data: bytes, name: str, standard: bool, repair: bool
) -> tuple[int, int, list[list[np.ndarray]], str]:
    """Format, division, the tables of each track, and what is missing of a truncated file.

    By the standard tracks go on to the end of the file whatever the header says, a track ends
    where it says so, and chunks of other types are skipped.
    """
    size = int.from_bytes(data[4:8], "big")
    if len(data) < 14 or size < 6:
        raise InvalidMidi("truncated", f"{name}: cut inside the header")
    kind, n_declared, division = struct.unpack(">hHh" if standard else ">hhh", data[8:14])
    tracks: list[list[np.ndarray]] = []
    missing = []
    position = 8 + size
    while position + 8 <= len(data) and (standard or len(tracks) < n_declared):
        chunk, start = data[position : position + 4], position + 8
        end = start + int.from_bytes(data[position + 4 : start], "big")
        number = f"track {len(tracks) + 1} of {max(n_declared, len(tracks) + 1)}"
        position = _behind_padding(data, end) if standard else end
        if standard and chunk == b"MThd":
            raise InvalidMidi("two-files", f"{name}: another MIDI file begins at byte {start - 8}")
        if chunk != b"MTrk":
            unknown = standard and _is_chunk_type(chunk)
            if unknown and end <= len(data):
                continue
            padding = standard and len(tracks) >= n_declared
            if (unknown or padding) and b"MTrk" not in data[start - 8 :]:
                break
            raise InvalidMidi("no-track-header", f"{name}: {number} has no MTrk header")
        track = _decode_track(data, start, end, f"{name}: {number}", standard)
        follows = end if track[3] else position  # what seems padding may be the event's last byte
        if standard and not (track[2] or _is_chunk_type(data[follows : follows + 4])):
            with suppress(InvalidMidi):  # perhaps its length was too small
                longer = _decode_track(data, start, len(data), name, standard)
                track = longer if longer[2] else track
        tables, stop, ended, truncated = track
        tracks.append(tables)
        if standard and ended:
            behind = _behind_padding(data, stop)
            if stop > end or data[behind : behind + 4] == b"MTrk":
                position = behind  # its length was wrong
        elif truncated or end > len(data):
            where = f"after {len(data) - start} of" if end > len(data) else "in the last event of"
            missing.append(f"{number} is cut {where} {end - start} bytes")
    if len(tracks) < n_declared:
        missing.append(f"track {len(tracks) + 1} of {n_declared} is missing")
    if missing and not repair:
        message = f"{name}: {missing[0]}; --repair (tokenize, data build) reads what is before"
        raise InvalidMidi("truncated", message)
    return kind, division, tracks, "; ".join(missing)


def _behind_padding(data: bytes, position: int) -> int:
    """`position`, or where a track or the end of the file follows the zeros that stand there."""
    if data[position : position + 1] != b"\0":
        return position
    rest = data[position:].lstrip(b"\0")
    return len(data) - len(rest) if rest[:4] in (b"", b"MTrk") else position


def _is_chunk_type(chunk: bytes) -> bool:
    return chunk.isascii() and chunk.decode().isprintable()


def _decode_track(
    data: bytes, start: int, end: int, name: str, standard: bool
) -> tuple[list[np.ndarray], int, bool, bool]:
    """Notes, pedals, tempi, programs and places of texts of one track, int64 [N, columns] each;
    where it stops, whether it says that it ends, and whether it is truncated inside an event.
    """
    # No kind of event can outgrow these: (fewest bytes one takes, columns).
    sizes = ((3, 5), (3, 3), (7, 2), (2, 3), (4, 2))
    bytes_N = np.frombuffer(data, np.uint8)[:end]
    end = max(start, len(bytes_N))
    tables = [np.empty(((end - start) // n + 1, columns), np.int64) for n, columns in sizes]
    counts = decode_track(bytes_N, start, end, standard, *tables)
    status = int(counts[_STATUS])
    if status not in (0, _TRUNCATED):
        reason = REASONS[status]
        raise InvalidMidi(reason, f"{name}: broken MIDI data ({reason.replace('-', ' ')})")
    rows = [table[:n] for table, n in zip(tables, counts[1:], strict=False)]
    return rows, int(counts[_STOP]), bool(counts[_ENDED]), status == _TRUNCATED


@_compiled
def _varint(data: np.ndarray, position: Int, standard: bool) -> tuple[Int, Int]:
    """Value and next position of a variable-length number; -1 when truncated, -2 when absurd."""
    value = 0
    begin = position
    while position < len(data):
        byte = data[position]
        position += 1
        value = (value << 7) | (byte & 0x7F)
        if value > MAX_TICK or (standard and position - begin > 4):
            return -2, position
        if byte < 0x80:
            return value, position
    return -1, position


@_compiled
def _put(table: np.ndarray, row: Int, values: tuple[Int, ...]) -> None:
    # Numba's own `table[row] = values` is several times slower.
    for column in range(len(values)):
        table[row, column] = values[column]


@_compiled
def decode_track(
    data: np.ndarray,
    start: Int,
    end: Int,
    standard: bool,
    notes: np.ndarray,
    pedals: np.ndarray,
    tempi: np.ndarray,
    programs: np.ndarray,
    texts: np.ndarray,
) -> np.ndarray:
    """Decodes one track chunk.

    Args:
        data: uint8 [end], the file as far as the chunk's end.
        start, end: the chunk's content.
        standard: which reading; False is aria-utils.
        notes: int64 [_, 5] out: start tick, end tick, pitch, velocity, channel. By the standard
            also notes without an end: they end at `OPEN`, or where a truncated track breaks off.
        pedals: int64 [_, 3] out: tick, value, channel. By the standard also channel mode messages,
            in place of the value `CHANNEL_MODE` + controller.
        tempi: int64 [_, 2] out: tick, microseconds per beat.
        programs: int64 [_, 3] out: tick, program, channel. By the standard a change that is
            written after a note of its tick counts from the next tick.
        texts: int64 [_, 2] out: first byte and length of text and copyright messages.

    Returns:
        int64 [8]: status (0 or a key of `REASONS`), how many rows of each were written, where
        decoding stopped, and 1 if that was at an end-of-track event. What lies before a fault has
        been written.
    """
    counts = np.zeros(8, np.int64)
    # Notes as they begin, linked to lists of open notes per channel and pitch.
    first = np.full(2048, -1, np.int64)
    last = np.full(2048, -1, np.int64)
    last_onset = np.full(16, -1, np.int64)
    pool = np.empty((len(notes), 3), np.int64)  # start tick, velocity, next row
    n_opened = tick = 0
    running = np.int64(0)
    position = start
    while position != end:
        delta, position = _varint(data, position, standard)
        if delta < 0 or tick + delta > MAX_TICK:
            counts[_STATUS] = _TRUNCATED if delta == -1 else 6
            break
        if position >= end:
            counts[_STATUS] = _TRUNCATED
            break
        tick += delta
        status = np.int64(data[position])
        if status >= 0x80:
            position += 1
            if status < _SYSEX or (status != _META and not standard):
                running = status
        else:
            status = running
            if running == 0 or _N_DATA[running] == 0:
                counts[_STATUS] = 2
                break
            if running in (_SYSEX, _ESCAPE):
                position += 1  # mido drops the byte it looked at
        if status in (_META, _SYSEX, _ESCAPE):
            position, known = _skip_message(
                data, position, status, tick, standard, tempi, texts, counts
            )
            if counts[_STATUS] or (standard and counts[_ENDED]):
                break
            if not known and not standard:
                tick -= delta  # mido loses the time of meta messages that it does not know
            continue
        n_data = _N_DATA[status]
        if n_data < 0 or position + n_data > end:
            counts[_STATUS] = 3 if n_data < 0 else _TRUNCATED
            break
        one = np.int64(data[position]) if n_data > 0 else 0
        two = np.int64(data[position + 1]) if n_data > 1 else 0
        if one > 127 or two > 127:
            counts[_STATUS] = 4
            break
        position += n_data
        kind, channel = status & 0xF0, status & 0x0F
        if kind == 0xC0:
            after_note = standard and last_onset[channel] == tick
            _put(programs, counts[_PROGRAMS], (tick + after_note, one, channel))
            counts[_PROGRAMS] += 1
        elif kind == 0xB0 and (one == _PEDAL or (standard and one >= ALL_SOUND_OFF)):
            if one != _LOCAL_CONTROL:
                value = two if one == _PEDAL else CHANNEL_MODE + one
                _put(pedals, counts[_PEDALS], (tick, value, channel))
                counts[_PEDALS] += 1
        elif kind == 0x90 and two > 0:
            key = channel * 128 + one
            _put(pool, n_opened, (tick, two, -1))
            if first[key] < 0:
                first[key] = n_opened
            else:
                pool[last[key], 2] = n_opened
            last[key] = n_opened
            last_onset[channel] = tick
            n_opened += 1
        elif kind == 0x80 or kind == 0x90:
            key = channel * 128 + one
            n = counts[_NOTES]
            keep_short = standard and channel == _DRUMS
            first[key], last[key], counts[_NOTES] = _close(
                pool, first[key], tick, key, notes, n, keep_short
            )
    counts[_STOP] = position
    if standard:
        close_at = OPEN if counts[_ENDED] else tick
        for slot in range(2048):
            if first[slot] >= 0:
                n, drum = counts[_NOTES], slot >> 7 == _DRUMS
                newest, _, n = _close(pool, first[slot], close_at, slot, notes, n, drum)
                _, _, counts[_NOTES] = _close(pool, newest, close_at, slot, notes, n, drum)
    return counts


@_compiled
def _skip_message(
    data: np.ndarray,
    position: Int,
    status: Int,
    tick: Int,
    standard: bool,
    tempi: np.ndarray,
    texts: np.ndarray,
    counts: np.ndarray,
) -> tuple[Int, bool]:
    """Steps over a meta or system-exclusive message and keeps its tempo or text.

    Returns:
        Next position, and whether mido knows the message. Faults and the end of the track go to
        `counts`.
    """
    kind = np.int64(-1)
    if status == _META:
        if position >= len(data):
            counts[_STATUS] = _TRUNCATED
            return position, True
        kind = np.int64(data[position])
        position += 1
    length, position = _varint(data, position, standard)
    if length == -2 or (length > MAX_MESSAGE_BYTES and not standard):
        counts[_STATUS] = 5
    elif length < 0 or position + length > len(data):
        counts[_STATUS] = _TRUNCATED
    elif kind in (_TEXT, _COPYRIGHT):
        _put(texts, counts[_TEXTS], (position, length))
        counts[_TEXTS] += 1
    elif kind == _END_OF_TRACK:
        counts[_ENDED] = 1
    elif kind == _TEMPO and length < 3:
        counts[_STATUS] = 0 if standard else 7
    elif kind == _TEMPO:
        tempo = np.int64(0)
        for byte in data[position : position + 3]:
            tempo = tempo * 256 + np.int64(byte)
        if tempo or not standard:  # a beat of no time is impossible
            _put(tempi, counts[_TEMPI], (tick, tempo))
            counts[_TEMPI] += 1
    return position + length, bool(kind < 0 or _KNOWN_META[kind])


@_compiled
def _close(
    pool: np.ndarray, row: Int, tick: Int, key: Int, notes: np.ndarray, n: Int, keep_short: bool
) -> tuple[Int, Int, Int]:
    """Ends the open notes of one pitch and channel at `tick`.

    Args:
        pool: notes as they began; row: the first open one.
        key: channel * 128 + pitch.
        notes, n: where finished notes go, and how many there are.
        keep_short: whether notes that began at this very tick are notes.

    Returns:
        First and last row of the notes that stay open, and the new `n`. Notes that began at this
        very tick stay open if earlier ones were ended; else they end, or are forgotten.
    """
    before, begin = n, row
    kept_first: Int = -1
    kept_last: Int = -1
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
    if n != before:
        return kept_first, kept_last, n
    row = begin
    while keep_short and row >= 0:
        _put(notes, n, (tick, tick, key & 127, pool[row, 1], key >> 7))
        n += 1
        row = pool[row, 2]
    return -1, -1, n
