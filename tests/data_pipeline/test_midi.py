"""Reading MIDI: mido's and miditoolkit's notes, broken bytes, and what is written reads back."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import (
    NOTE,
    PEDAL,
    PROGRAM,
    TEMPO,
    Performance,
    from_miditoolkit,
    midi_bytes,
    note_programs,
    read_midi,
    resolve_pedal,
    to_miditoolkit,
)
from tests.corpora import random_performance
from tests.smf import midi_file, note, random_file, tempo, track


def rows(performance):
    return [tuple(int(x) for x in (n["pitch"], n["start"], n["end"])) for n in performance.notes]


def test_miditoolkit_reads_the_same_notes():
    from miditoolkit import MidiFile

    performance = random_performance(np.random.default_rng(1), 300)
    data = midi_bytes(performance)
    by_miditoolkit = MidiFile(file=io.BytesIO(data))
    expected = sorted(
        (n.pitch, n.start, n.end) for i in by_miditoolkit.instruments for n in i.notes
    )
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


def test_some_tracks_are_read_with_what_holds_for_all():
    data = midi_file(
        track(tempo(250_000), note(60)), track(note(62, channel=1)), track(note(64, channel=2))
    )
    performance = read_midi(data, of_tracks=(0, 2))
    assert performance.notes["pitch"].tolist() == [60, 64]
    assert performance.tempi["tempo"].tolist() == [250_000]
    assert not len(read_midi(data, of_tracks=()).notes)
    assert read_midi(data, of_tracks=range(3)) == read_midi(data)


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


# --- writing ---


def sorted_rows(draw, dtype, columns, min_size=0, max_size=6):
    rows = draw(st.lists(st.tuples(*columns), min_size=min_size, max_size=max_size))
    table = np.array(rows, dtype)
    return table[np.argsort(table[dtype.names[0]], kind="stable")]


@st.composite
def performances(draw) -> Performance:
    """Anything that a MIDI file can hold."""
    channel, value, tick = st.integers(0, 15), st.integers(0, 127), st.integers(0, 3000)
    channels = st.sampled_from([0, 0, 1, 9, 15])
    strokes = st.tuples(
        st.sampled_from([60, 60, 61, 127, 0]), st.integers(1, 127), channels,
        st.integers(0, 900), st.integers(0, 500),
    )  # fmt: skip
    free_at: dict[tuple[int, int], int] = {}
    notes = []
    for pitch, velocity, on, gap, length in draw(st.lists(strokes, max_size=25)):
        start = free_at.get((on, pitch), 0) + gap
        end = start + max(length, int(on != 9))
        free_at[on, pitch] = end
        notes.append((pitch, velocity, on, start, end))
    table = np.array(notes, NOTE)
    tempo = st.integers(1, (1 << 24) - 1)
    return Performance(
        ticks_per_beat=draw(st.integers(1, 32767)),
        notes=table[np.argsort(table["start"], kind="stable")],
        pedals=sorted_rows(draw, PEDAL, (tick, value, channel)),
        tempi=sorted_rows(draw, TEMPO, (tick, tempo), min_size=1),
        programs=sorted_rows(draw, PROGRAM, (tick, value, channel), min_size=1),
        texts=tuple(draw(st.lists(st.text(max_size=20), max_size=3))),
    )


@settings(max_examples=150, deadline=None)
@given(performances())
def test_what_is_written_reads_back(performance):
    """Notes of one tick may come in another order, which `==` does not ask for; ids of them may."""
    data = midi_bytes(performance)
    again = read_midi(data)
    assert again == performance
    assert midi_bytes(again) == midi_bytes(read_midi(midi_bytes(again)))
    for notes in (performance.notes, again.notes):
        assert (np.diff(notes["start"]) >= 0).all()
    times = np.arange(0, 4000, 37)
    np.testing.assert_array_equal(again.ms(times), performance.ms(times))


@settings(max_examples=40, deadline=None)
@given(performances())
def test_miditoolkit_reads_what_is_written(performance):
    from miditoolkit import MidiFile

    midi = MidiFile(file=io.BytesIO(midi_bytes(performance)))
    # Of drum hits of no length it drops some and keeps others, by what else the file holds.
    found = [
        (i.is_drum, n.pitch, n.velocity, n.start, n.end)
        for i, n in notes_of(midi)
        if n.end > n.start
    ]
    expected = [
        (channel == 9, pitch, velocity, start, end)
        for pitch, velocity, channel, start, end in performance.notes.tolist()
        if end > start
    ]
    assert sorted(found) == sorted(expected)
    assert midi.ticks_per_beat == performance.ticks_per_beat


def notes_of(midi):
    return [(instrument, note) for instrument in midi.instruments for note in instrument.notes]


@settings(max_examples=40, deadline=None)
@given(performances())
def test_miditoolkit_objects_hold_every_note_with_its_program(performance):
    midi = to_miditoolkit(performance)
    found = [(i.program, i.is_drum, n.pitch, n.velocity, n.start, n.end) for i, n in notes_of(midi)]
    programs = note_programs(performance).tolist()
    rows = zip(programs, performance.notes.tolist(), strict=True)
    expected = [(p, channel == 9, pitch, v, start, end)
                for p, (pitch, v, channel, start, end) in rows]  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert len(from_miditoolkit(midi).notes) == len(performance.notes)


def test_miditoolkit_objects_come_back():
    notes = np.array([(60, 64, 0, 0, 10), (72, 70, 3, 5, 90), (36, 99, 9, 5, 20)], NOTE)
    pedals = np.array([(3, 127, 0), (80, 0, 0)], PEDAL)
    tempi = np.array([(0, 461_538), (50, 333_333)], TEMPO)
    programs = np.array([(0, 0, 0), (0, 40, 3), (0, 0, 9)], PROGRAM)
    performance = Performance(480, notes, pedals, tempi, programs)
    again = from_miditoolkit(to_miditoolkit(performance))
    channel_of = {0: 0, 3: 1, 9: 9}
    for rows in (notes, programs):
        rows["channel"] = [channel_of[c] for c in rows["channel"].tolist()]
    assert again == Performance(480, notes, pedals, tempi, programs)


def test_more_instruments_than_channels_are_refused():
    from miditoolkit import Instrument, MidiFile

    midi = MidiFile()
    midi.instruments = [Instrument(program) for program in range(16)]
    with pytest.raises(UserError, match="15 instruments"):
        from_miditoolkit(midi)


def test_what_no_file_can_hold():
    timeless, silent = (62, 64, 0, 9, 9), (64, 0, 0, 9, 50)
    notes = np.array([(60, 64, 0, 0, 100), (60, 64, 0, 50, 150), timeless, silent], NOTE)
    kept = [(60, 0, 50), (60, 50, 150)]  # the overlap ends; no time, no velocity: no note
    assert rows(read_midi(midi_bytes(Performance(500, notes)))) == kept
    good = notes[:1]
    for wrong, message in (
        (Performance(40_000, good), "40000 ticks per beat"),
        (Performance(0, good), "0 ticks per beat"),
        (Performance(500, np.array([(200, 64, 0, 0, 1)], NOTE)), "pitch 200"),
        (Performance(500, np.array([(60, 64, 16, 0, 1)], NOTE)), "channel 16"),
        (Performance(500, np.array([(60, 64, 0, -5, 1)], NOTE)), "start -5"),
        (Performance(500, good, tempi=np.array([(0, 1 << 24)], TEMPO)), "tempo 16777216"),
    ):
        with pytest.raises(UserError, match=message):
            midi_bytes(wrong)


def test_a_silence_longer_than_a_delta_time():
    notes = np.array([(60, 64, 0, 0, 10), (62, 64, 0, 1 << 29, (1 << 29) + 10)], NOTE)
    performance = Performance(32767, notes)
    assert read_midi(midi_bytes(performance)) == performance


def test_equal_performances_say_the_same():
    performance = random_performance(np.random.default_rng(3), 20)
    assert performance == replace(performance) and performance != "x"
    assert performance == replace(performance, notes=performance.notes[np.argsort(
        performance.notes["start"], kind="stable")])  # fmt: skip
    for other in (
        replace(performance, notes=performance.notes[1:]),
        replace(performance, texts=("x",)),
        replace(performance, programs=np.array([(0, 1, 0)], PROGRAM)),
        replace(performance, compat="aria-utils"),
    ):
        assert performance != other
