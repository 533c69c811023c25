"""Hand-made MIDI bytes, down to the events that no writer writes."""

import numpy as np


def track(*events: bytes) -> bytes:
    """A track chunk of delta times and events; the end-of-track is added."""
    body = b"".join(events) + b"\x00\xff\x2f\x00"
    return b"MTrk" + len(body).to_bytes(4, "big") + body


def chunk(kind: bytes, body: bytes, more: int = 0) -> bytes:
    """A chunk that declares `more` bytes than it has."""
    return kind + (len(body) + more).to_bytes(4, "big") + body


def midi_file(
    *tracks: bytes, division: int = 480, kind: int = 1, declared: int | None = None
) -> bytes:
    """A header before track chunks, of which it declares as many as there are or `declared`."""
    n_tracks = len(tracks) if declared is None else declared
    fields = (kind, n_tracks, division)
    return chunk(b"MThd", b"".join(x.to_bytes(2, "big") for x in fields)) + b"".join(tracks)


def note(pitch: int = 60, *, after: int = 0, lasts: int = 400, channel: int = 0) -> bytes:
    """A note of velocity 64, `after` ticks from the last event."""
    strike = varint(after) + bytes([0x90 | channel, pitch, 64])
    return strike + varint(lasts) + bytes([0x80 | channel, pitch, 64])


def tempo(us_per_beat: int, *, after: int = 0) -> bytes:
    """A tempo of so many microseconds per beat, `after` ticks from the last event."""
    return varint(after) + b"\xff\x51\x03" + us_per_beat.to_bytes(3, "big")


def varint(value: int) -> bytes:
    """A variable-length number."""
    out = [value & 0x7F]
    while value := value >> 7:
        out.append(0x80 | value & 0x7F)
    return bytes(reversed(out))


def random_file(rng: np.random.Generator) -> bytes:
    """One to three tracks of every kind of event, with overlapping notes and running status."""
    tracks = []
    for _ in range(rng.integers(1, 4)):
        channels = [0, 9, int(rng.integers(16))]
        tracks.append(track(*_events(rng, int(rng.integers(1, 150)), channels)))
    return midi_file(*tracks, division=int(rng.choice([96, 384, 480, 960])))


def _events(rng: np.random.Generator, n: int, channels: list[int]) -> list[bytes]:
    events, running = [], -1
    for _ in range(n):
        delta = varint(int(rng.choice([0, 0, 0, 0, 1, 5, 60, 240, 2000, 40_000])))
        event = _event(rng, int(rng.choice(channels)))
        omit_status = event[0] == running and rng.random() < 0.7
        events.append(delta + event[omit_status:])
        running = event[0] if event[0] < 0xF0 else -1
    return events


def _event(rng: np.random.Generator, channel: int) -> bytes:
    pitch = int(rng.choice([60, 61, 62, 64, 35, 127, 0, 90]))
    rare = [
        bytes([0xC0 | channel, int(rng.integers(128))]),
        bytes([0xD0 | channel, 5]),
        bytes([0xE0 | channel, 5, 6]),
        bytes([0xA0 | channel, pitch, 6]),
        bytes([0xB0 | channel, 7, 100]),
        bytes([0xB0 | channel, int(rng.choice([120, 121, 123, 127])), 0]),
        b"\xff\x51\x03" + int(rng.integers(100_000, 2_000_000)).to_bytes(3, "big"),
        b"\xff\x01\x05Bach\xe9",
        b"\xff\x02\x03abc",
        b"\xff\x59\x02\x00\x00",
        b"\xff\x0a\x01\x00",  # a meta message that mido does not know
        b"\xf0\x04\x01\x02\x03\xf7",
        b"\xf2\x01\x02",
        b"\xf8",
    ]
    which = rng.random()
    if which < 0.45:
        return bytes([0x90 | channel, pitch, int(rng.integers(1, 128))])
    if which < 0.6:
        return bytes([0x80 | channel, pitch, 64])
    if which < 0.75:
        return bytes([0x90 | channel, pitch, 0])
    if which < 0.87:
        return bytes([0xB0 | channel, 64, int(rng.choice([0, 63, 64, 127]))])
    return rare[rng.integers(len(rare))]
