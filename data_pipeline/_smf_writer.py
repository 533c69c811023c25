"""Notes and controllers to Standard MIDI File bytes."""

import struct

import numpy as np

from data_pipeline.errors import UserError

_DRUMS = 9
_MAX_DELTA = (1 << 28) - 1
_MAX_TICK = 1 << 40  # as the reader
_END_OF_TRACK = b"\x00\xff\x2f\x00"
_Event = tuple[int, int, bytes]  # tick, rank among the events of that tick, bytes


def file_bytes(
    ticks_per_beat: int,
    notes: np.ndarray,
    pedals: np.ndarray,
    tempi: np.ndarray,
    programs: np.ndarray,
    texts: tuple[str, ...],
) -> bytes:
    """A format 1 file: a track of tempi and texts, then one per channel.

    Args are those of `Performance`; notes of one pitch and channel do not overlap.

    Raises:
        UserError: a value that no MIDI file can hold, such as a pitch of 200.
    """
    _refuse_out_of_range(ticks_per_beat, notes, pedals, tempi, programs)
    encoded = (text.encode(errors="replace") for text in texts)
    conductor = [(0, 0, b"\xff\x01" + _varint(len(text)) + text) for text in encoded]
    conductor += [(tick, 1, b"\xff\x51\x03" + us.to_bytes(3, "big")) for tick, us in tempi.tolist()]
    channels = sorted({c for rows in (notes, pedals, programs) for c in rows["channel"].tolist()})
    tracks = [conductor]
    for channel in channels:
        here = (rows[rows["channel"] == channel] for rows in (notes, pedals, programs))
        tracks.append(_channel_events(channel, *here))
    header = b"MThd" + struct.pack(">LHHh", 6, 1, len(tracks), ticks_per_beat)
    return header + b"".join(map(_track_chunk, tracks))


def _refuse_out_of_range(
    ticks_per_beat: int,
    notes: np.ndarray,
    pedals: np.ndarray,
    tempi: np.ndarray,
    programs: np.ndarray,
) -> None:
    limits = {"pitch": 127, "velocity": 127, "value": 127, "program": 127, "channel": 15}
    limits |= {"tempo": (1 << 24) - 1, "start": _MAX_TICK, "end": _MAX_TICK, "tick": _MAX_TICK}
    wrong = {
        f"{name} {rows[name][bad][0]}"
        for rows in (notes, pedals, tempi, programs)
        for name in rows.dtype.names or ()
        if (bad := (rows[name] < 0) | (rows[name] > limits[name])).any()
    }
    if not (ticks_per_beat and -(1 << 15) <= ticks_per_beat < 1 << 15):
        wrong.add(f"{ticks_per_beat} ticks per beat")
    if wrong:
        raise UserError(f"no MIDI file can hold {', '.join(sorted(wrong))}")


def _channel_events(
    channel: int, notes: np.ndarray, pedals: np.ndarray, programs: np.ndarray
) -> list[_Event]:
    """All that one channel does: at each tick ends, then controllers, then drum hits of no length,
    then beginnings.
    """
    on, off = 0x90 | channel, 0x80 | channel
    events = [(tick, 1, bytes([0xB0 | channel, 64, value])) for tick, value, _ in pedals.tolist()]
    events += [(tick, 1, bytes([0xC0 | channel, number])) for tick, number, _ in programs.tolist()]
    for pitch, velocity, _, start, end in notes.tolist():
        strike, release = bytes([on, pitch, velocity]), bytes([off, pitch, 64])
        if velocity and end > start:
            events += [(start, 3, strike), (end, 0, release)]
        elif velocity and channel == _DRUMS:
            events += [(start, 2, strike), (start, 2, release)]
    return events


def _track_chunk(events: list[_Event]) -> bytes:
    parts, now = [], 0
    for tick, _, event in sorted(events, key=lambda event: event[:2]):
        while tick - now > _MAX_DELTA:  # longer than a delta time: an event that says nothing
            parts.append(_varint(_MAX_DELTA) + b"\xff\x7f\x00")
            now += _MAX_DELTA
        parts.append(_varint(tick - now) + event)
        now = tick
    body = b"".join((*parts, _END_OF_TRACK))
    return b"MTrk" + len(body).to_bytes(4, "big") + body


def _varint(value: int) -> bytes:
    out = [value & 0x7F]
    while value := value >> 7:
        out.append(0x80 | value & 0x7F)
    return bytes(reversed(out))
