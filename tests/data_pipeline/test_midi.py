"""Reading MIDI: mido's and miditoolkit's notes, broken bytes, and what is written reads back."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import NOTE, PEDAL, TEMPO, Performance, midi_bytes, read_midi, resolve_pedal
from tests.corpora import random_performance
from tests.smf import midi_file, random_file, track


def rows(performance):
    return [tuple(int(x) for x in (n["pitch"], n["start"], n["end"])) for n in performance.notes]


def test_miditoolkit_reads_the_same_notes():
    from miditoolkit import MidiFile

    performance = random_performance(np.random.default_rng(1), 300)
    data = midi_bytes(performance)
    theirs = MidiFile(file=io.BytesIO(data))
    expected = sorted((n.pitch, n.start, n.end) for i in theirs.instruments for n in i.notes)
    assert sorted(rows(read_midi(data))) == expected


def plain_reading(data: bytes) -> dict[str, list]:
    """What aria-utils makes of mido's messages, in the plainest Python."""
    from mido import MidiFile

    out = {"notes": [], "pedals": [], "tempi": [], "programs": []}
    for messages in MidiFile(file=io.BytesIO(data)).tracks:
        tick, sounding = 0, {}
        for message in messages:
            tick += message.time
            if message.type == "set_tempo":
                out["tempi"].append((tick, message.tempo))
            elif message.type == "program_change":
                out["programs"].append((tick, message.program, message.channel))
            elif message.type == "control_change" and message.control == 64:
                out["pedals"].append((tick, message.value, message.channel))
            elif message.type == "note_on" and message.velocity:
                key = message.note, message.channel
                sounding.setdefault(key, []).append((tick, message.velocity))
            elif message.type in ("note_on", "note_off"):
                key = message.note, message.channel
                began = sounding.pop(key, [])
                ended = [(*key, start, tick, v) for start, v in began if start != tick]
                if ended and len(ended) < len(began):
                    sounding[key] = [note for note in began if note[0] == tick]
                out["notes"] += ended
    out["notes"].sort(key=lambda note: note[2])
    for name in ("pedals", "tempi", "programs"):
        out[name].sort(key=lambda event: event[0])
    return out


@pytest.mark.parametrize("seed", range(40))
def test_every_event_is_read_as_mido_reads_it(seed):
    data = random_file(np.random.default_rng(seed))
    expected, performance = plain_reading(data), read_midi(data, compat="aria-utils")
    columns = ["pitch", "channel", "start", "end", "velocity"]
    assert performance.notes[columns].tolist() == expected["notes"]
    assert performance.pedals.tolist() == expected["pedals"]
    assert performance.tempi.tolist() == (expected["tempi"] or [(0, 500_000)])
    assert performance.programs.tolist() == (expected["programs"] or [(0, 0, 0)])


def test_messages_that_say_nothing_about_notes_are_not_judged():
    # mido refuses both: a system-exclusive byte above 127, a key that does not exist.
    odd = track(
        b"\x00\xf7\x02\x90\x01", b"\x00\xff\x59\x02\x63\x07", b"\x00\x90\x3c\x40", b"\x10\x3c\x00"
    )
    assert rows(read_midi(midi_file(odd))) == [(60, 0, 16)]


def test_a_long_tempo_map_costs_one_pass():
    n = 200_000
    tempi = np.zeros(n, TEMPO)
    tempi["tick"], tempi["tempo"] = np.arange(n) * 10, 500_000
    ticks = np.arange(n) * 10 + 5
    ms = Performance(500, np.zeros(0, NOTE), tempi=tempi).ms(ticks)  # n² steps would take a minute
    np.testing.assert_array_equal(ms, ticks)


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
        (midi_file(b"MTrx\x00\x00\x00\x00"), "truncated"),
        (midi_file(b"\x00rx\x00\x00\x00\x00\x00"), "no-track-header"),
        (midi_file(track(), division=0), "no-ticks-per-beat"),
        (midi_file(track(), division=0xE700), "no-ticks-per-beat"),
        (midi_file(track(), division=0x9028), "no-ticks-per-beat"),
        (midi_file(track(b"\x00\x3c\x40")), "running-status-without-status"),
        (midi_file(track(b"\x00\xf8", b"\x00\x3c\x40")), "running-status-without-status"),
        (midi_file(track(b"\x00\xf4")), "undefined-status-byte"),
        (midi_file(track(b"\x00\x90\xff\x40")), "data-byte-out-of-range"),
        (midi_file(track(b"\xff\xff\xff\xff\xff\xff\xff\x7f\x90\x3c\x40")), "time-too-large"),
        (midi_file(track(b"\xff\xff\xff\x7f\x90\x3c\x40", b"\x10\x3c\x00")), "too-long"),
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


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80))
def test_what_is_written_reads_back(seed, n):
    from data_pipeline.midi import resolve_overlaps

    performance = resolve_overlaps(random_performance(np.random.default_rng(seed), n))
    written = [row for row in rows(performance) if row[2] > row[1]]
    assert sorted(rows(read_midi(midi_bytes(performance)))) == sorted(written)
