"""Reading MIDI: miditoolkit's notes, hostile bytes, and what is written reads back."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import NOTE, PEDAL, TEMPO, Performance, midi_bytes, read_midi, resolve_pedal
from tests.corpora import random_performance


def track(*events: bytes) -> bytes:
    body = b"".join(events) + b"\x00\xff\x2f\x00"
    return b"MTrk" + len(body).to_bytes(4, "big") + body


def midi_file(*tracks: bytes, division: int = 480, kind: int = 1) -> bytes:
    header = kind.to_bytes(2, "big") + len(tracks).to_bytes(2, "big") + division.to_bytes(2, "big")
    return b"MThd\x00\x00\x00\x06" + header + b"".join(tracks)


def rows(performance):
    return [tuple(int(x) for x in (n["pitch"], n["start"], n["end"])) for n in performance.notes]


def test_miditoolkit_reads_the_same_notes():
    from miditoolkit import MidiFile

    performance = random_performance(np.random.default_rng(1), 300)
    data = midi_bytes(performance)
    theirs = MidiFile(file=io.BytesIO(data))
    expected = sorted((n.pitch, n.start, n.end) for i in theirs.instruments for n in i.notes)
    assert sorted(rows(read_midi(data))) == expected


def test_running_status_and_zero_velocity_end_a_note():
    data = midi_file(track(b"\x00\x90\x3c\x40", b"\x10\x3e\x40", b"\x10\x3c\x00", b"\x10\x3e\x00"))
    assert rows(read_midi(data)) == [(60, 0, 32), (62, 16, 48)]


def test_a_note_off_closes_every_open_note_of_its_pitch():
    # As the reference: both notes end together, and a note-on at that very tick goes on.
    data = midi_file(
        track(
            b"\x00\x90\x3c\x40", b"\x08\x90\x3c\x41", b"\x08\x90\x3c\x42",
            b"\x00\x80\x3c\x00", b"\x08\x80\x3c\x00",
        )
    )  # fmt: skip
    assert rows(read_midi(data)) == [(60, 0, 16), (60, 8, 16), (60, 16, 24)]


def test_the_pedal_holds_notes_until_it_rises():
    notes = np.array([(60, 64, 0, 0, 100), (62, 64, 0, 300, 400)], NOTE)
    pedals = np.array([(50, 127, 0), (200, 0, 0)], PEDAL)
    resolved = resolve_pedal(Performance(500, notes, pedals))
    assert rows(resolved) == [(60, 0, 200), (62, 300, 400)] and not len(resolved.pedals)


def test_tempo_changes_count_from_where_they_stand():
    tempi = np.array([(0, 500_000), (1000, 250_000)], TEMPO)
    performance = Performance(500, np.zeros(0, NOTE), tempi=tempi)
    assert performance.ms(np.array([0, 500, 1000, 2000])).tolist() == [0, 500, 1000, 1500]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not-midi"),
        (b"RIFF\x00\x00\x00\x00RMID", "not-midi"),
        (b"MThd\x00\x00\x00\x06\x00\x01", "truncated"),
        (midi_file(track(b"\x00\x90\x3c\x40"))[:-3], "truncated"),
        (midi_file(b"MTrk\x7f\xff\xff\xff"), "truncated"),
        (midi_file(b"MTrx\x00\x00\x00\x00"), "no-track-header"),
        (midi_file(track(), division=0), "no-ticks-per-beat"),
        (midi_file(track(), division=0xE728), "no-ticks-per-beat"),
        (midi_file(track(b"\x00\x3c\x40")), "running-status-without-status"),
        (midi_file(track(b"\x00\xf4")), "undefined-status-byte"),
        (midi_file(track(b"\x00\x90\xff\x40")), "data-byte-out-of-range"),
        (midi_file(track(b"\x00\xff\x51\x01\x00")), "bad-tempo"),
        (midi_file(track(b"\xff\xff\xff\xff\xff\xff\xff\x7f\x90\x3c\x40")), "time-too-large"),
    ],
)
def test_a_broken_file_is_refused_with_its_reason(data, reason):
    with pytest.raises(InvalidMidi) as caught:
        read_midi(data)
    assert caught.value.reason == reason


def test_ten_million_bytes_of_notes_are_read_in_bounded_memory():
    body = b"\x00\x90\x3c\x40" + b"\x01\x3c\x00\x00\x3c\x40" * 1_600_000
    data = midi_file(b"MTrk" + len(body).to_bytes(4, "big") + body)
    assert len(read_midi(data).notes) == 1_600_000


def test_a_riff_envelope_is_opened():
    inner = midi_file(track(b"\x00\x90\x3c\x40", b"\x10\x3c\x00"))
    size = len(inner).to_bytes(4, "little")
    assert rows(read_midi(b"RIFF" + size + b"RMIDdata" + size + inner)) == [(60, 0, 16)]


def test_five_thousand_mutations_raise_nothing_but_invalid_midi():
    rng = np.random.default_rng(0)
    seed = midi_bytes(random_performance(rng, 40))
    for _ in range(5000):
        data = bytearray(seed)
        for _ in range(rng.integers(1, 8)):
            at = int(rng.integers(len(data)))
            match rng.integers(3):
                case 0:
                    data[at] = rng.integers(256)
                case 1:
                    del data[at : at + int(rng.integers(1, 9))]
                case _:
                    data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        try:
            performance = read_midi(bytes(data))
            performance.ms(performance.notes["end"])
        except InvalidMidi:
            pass


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80))
def test_what_is_written_reads_back(seed, n):
    from data_pipeline.midi import resolve_overlaps

    performance = resolve_overlaps(random_performance(np.random.default_rng(seed), n))
    written = [row for row in rows(performance) if row[2] > row[1]]
    assert sorted(rows(read_midi(midi_bytes(performance)))) == sorted(written)
