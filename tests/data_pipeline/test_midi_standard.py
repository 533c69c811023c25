"""Reading by the standard: what files from the field say, and what becomes of cut ones."""

import numpy as np
import pytest

from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import (
    NOTE,
    PROGRAM,
    TEMPO,
    Performance,
    compat_of,
    note_programs,
    pedalled_ends,
    read_midi,
    reading_name,
)
from tests.smf import chunk, midi_file, note, tempo, track

PIANO, VIOLIN, FLUTE, BELLS = 0, 40, 73, 14
TWO = [(60, 0, 400), (62, 500, 400)]
"""What `two` plays: pitch, onset and duration in ms."""
two = note(60), note(62, after=100)
EOT = b"\x00\xff\x2f\x00"


def played(performance: Performance) -> list[tuple[int, int, int]]:
    """Pitch, onset and duration in ms of every note."""
    notes = performance.notes
    lasts = performance.between_ms(notes["start"], notes["end"])
    columns = (notes["pitch"], performance.ms(notes["start"]), lasts)
    return [tuple(row) for row in np.stack(columns, axis=1).tolist()]


def file_500(*tracks: bytes, **kwargs) -> bytes:
    """A file in which a tick is a millisecond, by default."""
    return midi_file(*tracks, division=500, **kwargs)


def riff(*chunks: bytes) -> bytes:
    body = b"RMID" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def riff_chunk(kind: bytes, body: bytes, pad: bool = True) -> bytes:
    padding = b"\0" * (len(body) % 2 and pad)
    return kind + len(body).to_bytes(4, "little") + body + padding


plain = file_500(track(*two))
odd_info = riff_chunk(b"LIST", b"INFO" + riff_chunk(b"INAM", b"five\0"))

SAYS = {
    # --- chunks ---
    "unknown chunks": (
        file_500(chunk(b"SEM1", b"x" * 5), track(note(60)), chunk(b"XFIH", b"MTrk\0\0\0\4"),
                 track(note(62, after=500)), declared=2),
        TWO,
    ),
    "an unknown chunk behind all tracks": (plain + chunk(b"Tail", b"abc"), TWO),
    "an unknown chunk behind all tracks, cut": (plain + chunk(b"Tail", b"abc", more=9), TWO),
    "padding behind all tracks": (plain + b"\0" * 20, TWO),
    "tracks padded with zeros that their length does not count": (
        file_500(track(note(60)) + b"\0", track(), track(note(62, after=500)) + b"\0\0\0"),
        TWO,
    ),
    "a track without an end, padded before another": (
        file_500(chunk(b"MTrk", note(60)) + b"\0", track(note(62, after=500))),
        TWO,
    ),
    "an unknown chunk padded to an even length": (
        file_500(chunk(b"Junk", b"x") + b"\0", track(*two), declared=1),
        TWO,
    ),
    "more tracks than declared": (
        file_500(track(note(60)), track(note(62, after=500)), declared=1),
        TWO,
    ),
    "more tracks than declared, behind an unknown chunk": (
        file_500(track(note(60)), chunk(b"Junk", b""), track(note(62, after=500)), declared=1),
        TWO,
    ),
    "no tracks declared": (file_500(track(*two), declared=0), TWO),
    "a longer header": (
        chunk(b"MThd", b"\0\1\0\1\x01\xf4" + b"more") + track(*two),
        TWO,
    ),
    "a track that declares too much, before another": (
        file_500(chunk(b"MTrk", note(60) + EOT, more=6), track(note(62, after=500))),
        TWO,
    ),
    "a track that declares too much, at the end": (
        file_500(chunk(b"MTrk", b"".join(two) + EOT, more=1000)),
        TWO,
    ),
    "a track that declares too little": (
        file_500(chunk(b"MTrk", note(60) + note(62, after=100) + EOT, more=-9)),
        TWO,
    ),
    "a track that declares too little, before another": (
        file_500(chunk(b"MTrk", note(60) + EOT, more=-6), track(note(62, after=500))),
        TWO,
    ),
    "a track that declares a byte too little, before another": (
        file_500(chunk(b"MTrk", note(60) + EOT, more=-1), track(note(62, after=500))),
        TWO,
    ),
    "a padded track that declares too much, before another": (
        file_500(chunk(b"MTrk", note(60) + EOT + b"\0", more=6), track(note(62, after=500))),
        TWO,
    ),
    "a track without an end before padding": (
        file_500(chunk(b"MTrk", b"".join(two))) + b"\0" * 9,
        TWO,
    ),
    "an empty track": (file_500(chunk(b"MTrk", b""), track(*two)), TWO),
    "no end of track": (file_500(chunk(b"MTrk", b"".join(two))), TWO),
    "padding after the end of track": (
        file_500(chunk(b"MTrk", b"".join(two) + EOT + b"\0\0\0")),
        TWO,
    ),
    "notes after the end of track": (
        file_500(chunk(b"MTrk", b"".join(two) + EOT + note(72) + EOT), track()),
        TWO,
    ),
    "an end of track that has content": (
        file_500(chunk(b"MTrk", b"".join(two) + b"\0\xff\x2f\1\0" + note(72))),
        TWO,
    ),
    "format 0 with two tracks": (
        file_500(track(note(60)), track(note(62, after=500)), kind=0),
        TWO,
    ),
    "format 2 with one piece": (file_500(track(*two), kind=2), TWO),
    # --- RIFF ---
    "RIFF": (riff(riff_chunk(b"data", plain)), TWO),
    "RIFF with chunks before and behind": (
        riff(odd_info, riff_chunk(b"DISP", b"odd"), riff_chunk(b"data", plain), odd_info),
        TWO,
    ),
    "RIFF whose odd chunk has no padding": (
        riff(riff_chunk(b"DISP", b"odd", pad=False), riff_chunk(b"data", plain)),
        TWO,
    ),
    "RIFF with an odd chunk without padding before one with it": (
        riff(riff_chunk(b"DISP", b"odd", pad=False), odd_info, riff_chunk(b"data", plain)),
        TWO,
    ),
    "RIFF with a long chunk that mentions MThd": (
        riff(riff_chunk(b"LIST", b"MThd data" * 50), riff_chunk(b"data", plain)),
        TWO,
    ),
    # --- meta events, system exclusive, running status ---
    "time of an unknown meta event": (
        file_500(track(note(60), b"\x32\xff\x4b\x02v1", note(62, after=50))),
        TWO,
    ),
    "meta events of a wrong length": (
        file_500(track(
            b"\0\xff\x51\x02\x01\x01", b"\0\xff\x58\1\4", b"\0\xff\x59\0", b"\0\xff\0\0",
            b"\0\xff\x20\0", b"\0\xff\x54\1\x60", *two, b"\x20\xff\0\0",
        )),
        TWO,
    ),
    "a tempo with more bytes than three": (
        file_500(track(b"\0\xff\x51\5\x0f\x42\x40\0\0", note(60, lasts=200), note(62, after=50,
                 lasts=200))),
        TWO,
    ),
    "running status over a meta event": (
        file_500(track(b"\0\x90\x3c\x40", b"\x83\x10\x3c\0", b"\0\xff\1\1x", b"\x64\x3e\x40",
                       b"\x83\x10\x3e\0")),
        TWO,
    ),
    "running status over a system exclusive message": (
        file_500(track(b"\0\x90\x3c\x40", b"\x83\x10\x3c\0", b"\0\xf0\3\x7e\x7f\xf7",
                       b"\x64\x3e\x40", b"\x83\x10\x3e\0")),
        TWO,
    ),
    "running status over an escape and a clock": (
        file_500(track(b"\0\x90\x3c\x40", b"\x83\x10\x3c\0", b"\0\xf7\1\xf8", b"\0\xf8",
                       b"\x64\x3e\x40", b"\x83\x10\x3e\0")),
        TWO,
    ),
    "a message longer than a megabyte": (
        file_500(track(b"\0\xf0\xbd\x84\x41" + b"\1" * 1_000_001, *two)),
        TWO,
    ),
    # --- time ---
    "25 frames of 40 ticks": (midi_file(track(tempo(300_000), *two), division=0xE728), TWO),
    "24 frames of 50 ticks": (
        midi_file(track(note(60, lasts=480), note(62, after=120, lasts=480)), division=0xE832),
        TWO,
    ),
    "30 frames of 100 ticks": (
        midi_file(track(note(60, lasts=1200), note(62, after=300, lasts=1200)), division=0xE264),
        TWO,
    ),
    "29.97 frames of 100 ticks": (
        midi_file(track(note(60, lasts=29970), note(62, lasts=2997)), division=0xE364),
        [(60, 0, 10_000), (62, 10_000, 1000)],
    ),
    "one tick per beat": (midi_file(track(note(lasts=2)), division=1), [(60, 0, 1000)]),
    "most ticks per beat": (
        midi_file(track(note(lasts=32767)), division=32767),
        [(60, 0, 500)],
    ),
    "a tempo at the end": (file_500(track(*two, tempo(1_000_000))), TWO),
    "a tempo under a note": (
        file_500(track(note(60), note(62, after=100)), track(tempo(1_000_000, after=700))),
        [(60, 0, 400), (62, 500, 600)],
    ),
    "a first tempo that is late": (
        file_500(track(tempo(1_000_000, after=2000)), track(note(60), note(62, after=1650,
                 lasts=200))),
        [(60, 0, 400), (62, 2100, 400)],
    ),
    "several tempi on one tick": (
        file_500(track(tempo(1_000_000), tempo(123_456), tempo(500_000), *two)),
        TWO,
    ),
    "several tempi on one tick, in two tracks": (
        file_500(track(tempo(1_000_000)), track(tempo(500_000)), track(*two)),
        TWO,
    ),
    "no time for a beat": (file_500(track(tempo(0), *two)), TWO),
    "no time for a beat from some tick on": (
        file_500(track(tempo(500_000), tempo(0, after=100)), track(*two)),
        TWO,
    ),
    "tempi in any track": (
        file_500(track(), track(note(60, lasts=400), note(62, after=600, lasts=200)),
                 track(tempo(1_000_000))),
        [(60, 0, 800), (62, 2000, 400)],
    ),
    # --- ends of notes ---
    "all notes off": (
        file_500(track(b"\0\x90\x3c\x40", b"\x83\x10\xb0\x7b\0", b"\x64\x90\x3e\x40",
                       b"\x83\x10\xb0\x7b\0")),
        TWO,
    ),
    "all notes off in another track": (
        file_500(track(note(60, lasts=900)), track(b"\x83\x10\xb0\x7b\0"), track(
            b"\x83\x74\x90\x3e\x40", b"\x83\x10\x80\x3e\0")),
        TWO,
    ),
    "all notes off on another channel": (
        file_500(track(*two), track(b"\x64\xb1\x7b\0")),
        TWO,
    ),
    "all notes off where a note begins": (
        file_500(track(b"\0\xb0\x7b\0", note(60), b"\x64\xb0\x7b\0", note(62))),
        TWO,
    ),
    "all sound off, and off again": (
        file_500(track(b"\0\x90\x3c\x40", b"\x83\x10\xb0\x78\0", b"\x64\x90\x3c\x40",
                       b"\x83\x10\x80\x3c\0")),
        [(60, 0, 400), (60, 500, 400)],
    ),
    "poly on ends notes": (
        file_500(track(b"\0\x90\x3c\x40", b"\x83\x10\xb0\x7f\0", note(62, after=100))),
        TWO,
    ),
    "local control does not": (
        file_500(track(b"\0\x90\x3c\x40", b"\x64\xb0\x7a\0", b"\x82\x2c\x80\x3c\0",
                       note(62, after=100))),
        TWO,
    ),
    "a note without an end": (file_500(track(*two, b"\0\x90\x48\x40", b"\x64\xb0\1\1")), TWO),
    "a note of no time": (file_500(track(note(60), note(61, lasts=0), note(62, after=100))), TWO),
    "an end of no note": (
        file_500(track(b"\0\x90\x4f\0", note(60), b"\0\x80\x3c\0", note(62, after=100))),
        TWO,
    ),
    # --- drums ---
    "drum hits of no time": (
        file_500(track(*(note(36, after=500, lasts=0, channel=9) for _ in range(3)))),
        [(36, 500, 0), (36, 1000, 0), (36, 1500, 0)],
    ),
    "drum hits without ends": (
        file_500(track(b"\0\x99\x24\x40", b"\x83\x74\x26\x40")),
        [(36, 0, 0), (38, 500, 0)],
    ),
    "a drum struck again where it ends, and ended there": (
        file_500(track(b"\0\x99\x24\x40", b"\x83\x74\x24\x50", b"\0\x24\0", b"\0\x24\0")),
        [(36, 0, 500), (36, 500, 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
def test_notes_are_read_as_the_file_says(name):
    data, expected = SAYS[name]
    assert sorted(played(read_midi(data)), key=lambda row: row[1]) == expected


REFUSED = {
    "format 2": (file_500(track(*two), track(*two), kind=2), "format-2"),
    "a track less than declared": (file_500(track(*two), declared=2), "truncated"),
    "a cut undeclared track": (
        file_500(track(*two), chunk(b"MTrk", note(), more=4), declared=1),
        "truncated",
    ),
    "two files, one behind the other": (plain + plain, "two-files"),
    "a note that lasts days": (
        file_500(track(*two, b"\0\x90\x3c\x40", b"\xff\xff\xff\x7f\x80\x3c\0")),
        "too-long",
    ),
    "a number of five bytes": (
        file_500(track(b"\x80\x80\x80\x80\x00\x90\x3c\x40")),
        "time-too-large",
    ),
    "a length of five bytes": (
        file_500(track(b"\0\xff\1\x80\x80\x80\x80\x00", *two)),
        "message-too-long",
    ),
    "a message past the end": (file_500(track(*two, b"\0\xf0\x7f\1")), "truncated"),
    "bytes that are no chunk between tracks": (
        file_500(track(*two), b"\0\1\2\3\0\0\0\0", track(*two)),
        "no-track-header",
    ),
    "bytes that are no chunk before an undeclared track": (
        file_500(track(*two), b"\0\1\2\3", track(*two), declared=1),
        "no-track-header",
    ),
    "an unknown chunk so long that a track would be lost": (
        file_500(track(*two), chunk(b"Junk", b"", more=99), track(*two), declared=1),
        "no-track-header",
    ),
    "an unknown chunk that is cut, before a declared track": (
        file_500(track(*two), chunk(b"Junk", b"abc", more=9), declared=2),
        "truncated",
    ),
    "a track that declares too little and does not end": (
        file_500(chunk(b"MTrk", b"".join(two), more=-6)),
        "truncated",
    ),
    "RIFF without data": (riff(odd_info), "not-midi"),
    "RIFF of something else": (riff(riff_chunk(b"data", b"RIFF")), "not-midi"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_by_name(name):
    data, reason = REFUSED[name]
    with pytest.raises(InvalidMidi) as caught:
        read_midi(data)
    assert caught.value.reason == reason


# --- programs ---


def programs_played(*tracks: bytes, compat: str | None = None) -> list[int]:
    performance = read_midi(file_500(*tracks), compat=compat)
    return note_programs(performance).tolist()


def change(program: int, *, channel: int = 0) -> bytes:
    return bytes([0, 0xC0 | channel, program])


@pytest.mark.parametrize(
    "tracks, expected",
    [
        ([track(note(), note())], [PIANO, PIANO]),
        ([track(note(), change(VIOLIN), note())], [PIANO, VIOLIN]),
        ([track(change(FLUTE), note(), change(VIOLIN), note())], [FLUTE, VIOLIN]),
        ([track(change(FLUTE), change(VIOLIN), note())], [VIOLIN]),
        ([track(b"\0\xb0\0\0", b"\0\xb0\x20\0", change(VIOLIN), note())], [VIOLIN]),
        ([track(note(channel=1), change(VIOLIN), note(channel=1))], [PIANO, PIANO]),
        ([track(change(VIOLIN)), track(note(), note())], [VIOLIN, VIOLIN]),
        ([track(note(), note()), track(change(VIOLIN))], [VIOLIN, VIOLIN]),
        # Written behind the note, on its tick: it sounds with what was in force before.
        ([track(b"\0\x90\x3c\x40", change(VIOLIN), b"\x10\x80\x3c\0", note())], [PIANO, VIOLIN]),
    ],
)
def test_a_note_has_the_program_in_force_where_it_begins(tracks, expected):
    assert programs_played(*tracks) == expected


def test_aria_utils_gives_a_channel_its_last_program():
    tracks = track(change(FLUTE), note(), change(VIOLIN), note())
    assert programs_played(tracks, compat="aria-utils") == [VIOLIN, VIOLIN]


# --- pedal ---


def ends(*events: bytes) -> list[int]:
    return pedalled_ends(read_midi(file_500(track(*events)))).tolist()


def test_channel_modes_and_the_pedal():
    press, release = b"\0\xb0\x40\x7f", b"\x82\x2c\xb0\x40\0"  # 300 ticks later
    assert ends(press, note(lasts=100), release) == [400]
    # All notes off lets the keys go, not the pedal; all sound off ends both, the pedal stays down.
    off, silence, reset = (bytes([100, 0xB0, number, 0]) for number in (123, 120, 121))
    strike = b"\0\x90\x3c\x40"
    assert ends(press, strike, off, release) == [400]
    assert ends(press, note(lasts=100), silence, release) == [200]
    assert ends(press, strike, silence, note(62, lasts=100), release) == [100, 500]
    assert ends(press, note(lasts=100), reset, note(62, lasts=100), release) == [200, 300]
    without = read_midi(file_500(track(reset, silence, note())))
    assert not len(without.pedals), "nothing to reset"
    half = read_midi(file_500(track(b"\0\xb0\x40\x20", reset, note())))
    assert half.pedals["value"].tolist() == [0x20, 0]


# --- times ---


def test_a_tempo_map_is_integrated_exactly():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, per_beat = int(rng.integers(1, 40)), int(rng.integers(1, 2000))
        tempi = np.zeros(n, TEMPO)
        tempi["tick"] = np.sort(rng.integers(0, 20_000, n))
        tempi["tempo"] = rng.integers(1, 2_000_000, n)
        performance = Performance(per_beat, np.zeros(0, NOTE), tempi=tempi)
        in_force = np.full(30_000, 500_000)
        for tick, us in tempi.tolist():
            in_force[tick:] = us
        scaled = np.concatenate([[0], np.cumsum(in_force)])  # microseconds x ticks per beat
        starts, stops = np.sort(rng.integers(0, 30_000, (2, 300)), axis=0)
        exact = (scaled[stops] - scaled[starts]) / (per_beat * 1000)
        np.testing.assert_allclose(performance.between_ms(starts, stops), exact, atol=0.5 + 1e-6)


def test_milliseconds_never_run_backwards():
    tempi = np.array([(7, 333_333), (7, 1), (50, 777_777), (90, 500_001)], TEMPO)
    performance = Performance(96, np.zeros(0, NOTE), tempi=tempi)
    for start in (0, 6, 7, 49, 50, 89, 300):
        assert (np.diff(performance.between_ms(start, np.arange(start, 600))) >= 0).all()


# --- texts ---


def test_texts_are_utf_8_or_latin_1():
    texts = ("Frédéric".encode(), b"Fr\xe9d\xe9ric", b"\x83s\x83A\xff")
    data = file_500(track(*(b"\0\xff\1" + bytes([len(t)]) + t for t in texts), *two))
    assert read_midi(data).texts == ("Frédéric", "Frédéric", "\x83s\x83Aÿ")
    assert read_midi(data, compat="aria-utils").texts[0] == "FrÃ©dÃ©ric"


# --- readings ---


def test_readings_have_names():
    assert (reading_name(None), reading_name("aria-utils")) == ("standard", "aria-utils")
    assert (compat_of("standard"), compat_of("aria-utils")) == (None, "aria-utils")
    for wrong in (lambda: read_midi(plain, compat="mido"), lambda: compat_of("x")):
        with pytest.raises(UserError, match="aria-utils"):
            wrong()


def test_aria_utils_keeps_its_faults():
    # The delta time of an unknown meta event is lost, undeclared tracks are not read, a note after
    # the end of track is.
    unknown = file_500(track(note(60), b"\x32\xff\x4b\0", note(62, after=50)))
    assert played(read_midi(unknown, compat="aria-utils"))[1] == (62, 450, 400)
    assert (
        len(
            read_midi(file_500(track(note()), track(note()), declared=1), compat="aria-utils").notes
        )
        == 1
    )
    late = file_500(chunk(b"MTrk", b"".join(two) + EOT + note(72)))
    assert len(read_midi(late, compat="aria-utils").notes) == 3
    two_pieces = file_500(track(note(60)), track(note(60)), kind=2)
    assert played(read_midi(two_pieces, compat="aria-utils")) == [(60, 0, 400)] * 2
    frames = read_midi(midi_file(track(*two), division=0xE728), compat="aria-utils")
    assert frames.ticks_per_beat < 0


# --- repairing ---


def test_a_cut_file_gives_what_is_whole_before_the_break():
    whole = file_500(track(note(60)), track(note(72), note(74, after=100), note(76, after=100)))
    expected = played(read_midi(whole))
    for n in range(len(whole)):
        data = whole[:n]
        try:
            read_midi(data)
            complete = True
        except InvalidMidi as error:
            complete = False
            assert error.reason in ("truncated", "not-midi")
        if n < 14:
            with pytest.raises(InvalidMidi):
                read_midi(data, repair=True)
            continue
        repaired = read_midi(data, repair=True)
        assert bool(repaired.repaired) is not complete
        for pitch, onset, lasts in played(repaired):
            # Whole, or ended at the break.
            assert any((pitch, onset) == row[:2] and 0 < lasts <= row[2] for row in expected), (
                n,
                pitch,
            )
    assert "track 2 of 2 is cut after" in read_midi(whole[:-20], repair=True).repaired
    assert "track 2 of 2 is missing" in read_midi(whole[:-48], repair=True).repaired
    past_the_end = file_500(track(note(60), b"\0\xf0\x7f\1"))
    assert "cut in the last event of 17 bytes" in read_midi(past_the_end, repair=True).repaired


def test_a_note_that_sounds_at_the_break_ends_there():
    data = file_500(track(note(60, lasts=400), note(62, after=100, lasts=300), b"\x64\xb0\1\1"))
    broken = data[: data.rindex(b"\x80\x3e") + 1]  # inside the note-off, 300 ticks after the onset
    assert played(read_midi(broken, repair=True)) == [(60, 0, 400), (62, 500, 300)]
    assert played(read_midi(broken, repair=True, compat="aria-utils")) == [(60, 0, 400)]


def test_other_faults_are_not_repaired():
    for broken in (track(b"\x00\xf4"), track(b"\x00\x90\xff\x40"), b"\0\1\2\3\0\0\0\0"):
        with pytest.raises(InvalidMidi):
            read_midi(file_500(track(*two), broken), repair=True)


def test_a_whole_file_is_not_repaired():
    assert read_midi(plain, repair=True) == read_midi(plain)


def test_programs_count_by_channel():
    notes = np.array([(60, 64, c, t, t + 5) for t in (0, 10, 20) for c in (0, 1, 9)], NOTE)
    programs = np.array([(0, BELLS, 9), (10, VIOLIN, 1), (20, FLUTE, 1)], PROGRAM)
    played_on = note_programs(Performance(500, notes, programs=programs)).reshape(3, 3)
    assert played_on[:, 0].tolist() == [PIANO] * 3
    assert played_on[:, 1].tolist() == [PIANO, VIOLIN, FLUTE]
    assert played_on[:, 2].tolist() == [BELLS] * 3
