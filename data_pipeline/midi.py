"""Standard MIDI Files to `Performance` (structured NumPy arrays) and back.

Two readings: what the file says by the standard, and what EleutherAI's aria-utils makes of it
(`compat="aria-utils"`), its faults included.
"""

from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.artifact import write_atomically
from data_pipeline.errors import InvalidMidi, UserError, check_file, expect

if TYPE_CHECKING:
    from miditoolkit import MidiFile

NOTE = np.dtype(
    [("pitch", "u1"), ("velocity", "u1"), ("channel", "u1"), ("start", "i8"), ("end", "i8")]
)
PEDAL = np.dtype([("tick", "i8"), ("value", "u1"), ("channel", "u1")])
TEMPO = np.dtype([("tick", "i8"), ("tempo", "i8")])
PROGRAM = np.dtype([("tick", "i8"), ("program", "u1"), ("channel", "u1")])

STANDARD = "standard"
COMPAT = ("aria-utils",)
"""Readings other than the standard's, as `read_midi` takes them."""
DRUM_CHANNEL = 9
PEDAL_DOWN = 64  # controller values from here on press the pedal
MAX_HOURS = 24
"""No piece lasts longer; a broken delta time would otherwise ask for gigabytes of `<T>` tokens."""
_DEFAULT_TEMPO = np.array([(0, 500_000)], TEMPO)
_DEFAULT_PROGRAM = np.array([(0, 0, 0)], PROGRAM)


def check_compat(compat: str | None) -> None:
    """Raises UserError unless `compat` is None or one of `COMPAT`."""
    if compat is not None and compat not in COMPAT:
        raise UserError(f"no reading {compat!r} of MIDI files; there is {', '.join(COMPAT)}")


def reading_name(compat: str | None) -> str:
    """The word for a reading in manifests: "standard", or the name in `COMPAT`."""
    check_compat(compat)
    return compat or STANDARD


def compat_of(reading: str) -> str | None:
    """`compat` of the word that `reading_name` gives; UserError for any other word."""
    check_compat(compat := None if reading == STANDARD else reading)
    return compat


def _none(dtype: np.dtype) -> np.ndarray:
    return np.zeros(0, dtype)


@dataclass(frozen=True, eq=False)
class Performance:
    """What a MIDI file says, in ticks (reference: aria-utils MidiDict).

    Equal to another that says the same: events of one tick may stand in another order where they
    belong to different channels, and so may notes.

    Attributes:
        ticks_per_beat: positive.
        notes: `NOTE` [N] sorted by start (stable).
        pedals: `PEDAL` [P] sustain-pedal events sorted by tick.
        tempi: `TEMPO` [>= 1] microseconds per beat, sorted by tick.
        programs: `PROGRAM` [>= 1] program changes sorted by tick.
        texts: text and copyright messages.
        compat: the reading it comes from; times, programs in force and pedal follow it.
        repaired: why a truncated file was read in part only; empty for a whole one.
    """

    ticks_per_beat: int
    notes: np.ndarray
    pedals: np.ndarray = field(default_factory=lambda: _none(PEDAL))
    tempi: np.ndarray = field(default_factory=lambda: _DEFAULT_TEMPO)
    programs: np.ndarray = field(default_factory=lambda: _DEFAULT_PROGRAM)
    texts: tuple[str, ...] = ()
    compat: str | None = None
    repaired: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Performance):
            return NotImplemented

        def says(p: Performance) -> list:
            by_channel = [x[np.lexsort((x["tick"], x["channel"]))] for x in (p.pedals, p.programs)]
            tables = [np.sort(p.notes), p.tempi, *by_channel]
            return [p.ticks_per_beat, p.texts, p.compat, p.repaired, *(t.tolist() for t in tables)]

        return says(self) == says(other)

    __hash__ = None  # type: ignore[assignment]

    def between_ms(self, starts: np.ndarray | int, ends: np.ndarray) -> np.ndarray:
        """Milliseconds from `starts` to `ends` (ticks), int64, rounded half to even."""
        from data_pipeline._kernels import exact_ms, reference_ms

        ends = np.ascontiguousarray(ends, np.int64)
        starts = np.ascontiguousarray(np.broadcast_to(np.asarray(starts, np.int64), ends.shape))
        return (reference_ms if self.compat else exact_ms)(
            starts,
            ends,
            np.ascontiguousarray(self.tempi["tick"]),
            np.ascontiguousarray(self.tempi["tempo"]),
            self.ticks_per_beat,
        )

    def ms(self, ticks: np.ndarray) -> np.ndarray:
        """Ticks as milliseconds from the start of the file, int64."""
        return self.between_ms(0, ticks)

    @cached_property
    def duration_ms(self) -> int:
        """When the last note ends, in ms from the start of the file; 0 without notes."""
        return int(self.ms(np.array([self.notes["end"].max(initial=0)]))[0])

    def slice_notes(self, start: int, stop: int) -> "Performance":
        """Notes `start:stop`, all else as it is (reference: aria/embedding.py _get_chunks)."""
        return replace(self, notes=self.notes[start:stop])


def programs_at(performance: Performance, channels: np.ndarray, ticks: np.ndarray) -> np.ndarray:
    """Program in force on `channels` at `ticks`, uint8 as long as they are.

    Program 0, a piano, before a channel's first change. Under `compat` a channel has one program,
    its last.
    """
    programs = performance.programs
    out = np.zeros(len(ticks), np.uint8)
    if not programs["program"].any():
        return out
    for channel in np.unique(programs["channel"]):
        changes, here = programs[programs["channel"] == channel], channels == channel
        at = np.searchsorted(changes["tick"], ticks[here], side="right") - 1
        if performance.compat:
            at[:] = len(changes) - 1
        out[here] = np.where(at < 0, 0, changes["program"][at])
    return out


def note_programs(performance: Performance) -> np.ndarray:
    """Program in force where each note begins, uint8 [N]; on the drum channel it names the kit."""
    return programs_at(performance, performance.notes["channel"], performance.notes["start"])


def pedalled_ends(performance: Performance) -> np.ndarray:
    """End tick of each note once the sustain pedal is folded into it, int64 [N]."""
    from data_pipeline._kernels import pedalled_ends as compiled

    notes, pedals = performance.notes, performance.pedals
    if not len(notes):
        return np.zeros(0, np.int64)
    return compiled(
        np.ascontiguousarray(notes["end"]),
        np.ascontiguousarray(notes["channel"]),
        np.ascontiguousarray(pedals["tick"]),
        pedals["value"] >= PEDAL_DOWN,
        np.ascontiguousarray(pedals["channel"]),
        int(notes["end"][-1]),
    )


def resolve_overlaps(performance: Performance) -> Performance:
    """Ends a note where the next one of the same pitch and channel begins."""
    notes = performance.notes.copy()
    order = np.lexsort((notes["end"], notes["start"], notes["pitch"], notes["channel"]))
    ordered = notes[order]
    same = (ordered["pitch"][1:] == ordered["pitch"][:-1]) & (
        ordered["channel"][1:] == ordered["channel"][:-1]
    )
    overlaps = same & (ordered["end"][:-1] > ordered["start"][1:])
    ordered["end"][:-1][overlaps] = ordered["start"][1:][overlaps]
    notes[order] = ordered
    return replace(performance, notes=notes)


def resolve_pedal(performance: Performance) -> Performance:
    """Folds the pedal into the notes and resolves the overlaps this makes; drops the pedal."""
    notes = performance.notes.copy()
    notes["end"] = pedalled_ends(performance)
    return resolve_overlaps(replace(performance, notes=notes, pedals=_none(PEDAL)))


def read_midi(
    source: str | Path | bytes,
    *,
    compat: str | None = None,
    repair: bool = False,
    of_tracks: Container[int] | None = None,
) -> Performance:
    """Reads a MIDI file, from disk or from its bytes.

    Args:
        source: a path, or the file's bytes; a RIFF envelope (.rmi) or .gz is opened.
        compat: None for the standard; one of `COMPAT` for that program's reading.
        repair: of a truncated file, read what is whole before the break; `repaired` says so.
            Notes that still sound end at the break (under `compat` they are left out, as in a
            whole file).
        of_tracks: numbers, from 0, of the tracks whose notes are read; None for all.

    Raises:
        InvalidMidi: not a readable MIDI file; `reason` says why in a word.
        UserError: no such `compat`, no such file, or a folder.
        OSError: the file cannot be opened for another reason.
    """
    from data_pipeline import _smf
    from data_pipeline.build.archives import gunzipped

    check_compat(compat)
    name = "MIDI bytes" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else check_file(source, "one MIDI file").read_bytes()
    data = _smf.unwrapped(gunzipped(data, name), name)
    kind, division, tracks, repaired = _smf.decoded_tracks(data, name, not compat, repair)
    if kind == 2 and len(tracks) > 1 and not compat:
        raise InvalidMidi("format-2", f"{name}: format 2, {len(tracks)} pieces in one file")
    if of_tracks is not None:
        tracks = [[t[0][: len(t[0]) * (i in of_tracks)], *t[1:]] for i, t in enumerate(tracks)]
    notes, pedals, tempi, programs = (
        _sorted_by_tick([track[i] for track in tracks], dtype)
        for i, dtype in enumerate((NOTE, PEDAL, TEMPO, PROGRAM))
    )
    ticks_per_beat, smpte_tempo = _smf.time_division(division, name, not compat)
    if smpte_tempo is not None:
        tempi = np.array([(0, smpte_tempo)], TEMPO)
    notes, pedals = _apply_channel_modes(notes, pedals)
    notes = _without_open_notes(notes)
    texts = (data[at : at + n] for track in tracks for at, n in track[4].tolist())
    performance = Performance(
        ticks_per_beat=ticks_per_beat,
        notes=notes,
        pedals=pedals,
        tempi=tempi if len(tempi) else _DEFAULT_TEMPO,
        programs=programs if len(programs) else _DEFAULT_PROGRAM,
        texts=tuple(text.decode("latin1") if compat else _text(text) for text in texts),
        compat=compat,
        repaired=repaired,
    )
    refuse_overlong(np.array([performance.duration_ms]), name)
    return performance


def refuse_overlong(times_ms: np.ndarray, name: str) -> None:
    """Raises InvalidMidi where a time lies beyond `MAX_HOURS`."""
    hours = times_ms.max(initial=0) / 3_600_000
    if hours > MAX_HOURS:
        raise InvalidMidi("too-long", f"{name}: lasts {hours:,.0f} hours; the limit is {MAX_HOURS}")


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin1")


# Fields in the order of the columns that `decode_track` writes.
_COLUMNS = {
    NOTE: ("start", "end", "pitch", "velocity", "channel"),
    PEDAL: ("tick", "value", "channel"),
    TEMPO: ("tick", "tempo"),
    PROGRAM: ("tick", "program", "channel"),
}


def _sorted_by_tick(tables: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Tables of several tracks as one structured array, sorted by their first column."""
    columns = _COLUMNS[dtype]
    rows = np.concatenate([np.empty((0, len(columns)), np.int64), *tables])
    ticks = np.ascontiguousarray(rows[:, 0])
    ordered = (ticks[1:] >= ticks[:-1]).all()
    order = slice(None) if ordered else np.argsort(ticks, kind="stable")
    out = np.empty(len(rows), dtype)
    for column, field_name in enumerate(columns):
        out[field_name] = rows[:, column][order]  # a column at a time: half the time of rows[order]
    return out


def _apply_channel_modes(notes: np.ndarray, pedals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Notes and pedals with the channel mode messages among the pedals carried out.

    All of them but the reset of controllers end the notes of their channel, in whatever track;
    "all sound off" also ends what the pedal holds, which is written as a release and a press. The
    reset releases the pedal.
    """
    from data_pipeline._smf import ALL_SOUND_OFF, CHANNEL_MODE, RESET_CONTROLLERS

    if not (pedals["value"] >= CHANNEL_MODE).any():
        return notes, pedals
    mode = pedals["value"].astype(np.int64) - CHANNEL_MODE
    ending = (mode >= 0) & (mode != RESET_CONTROLLERS)
    for channel in np.unique(pedals["channel"][ending]):
        ticks = pedals["tick"][ending & (pedals["channel"] == channel)]
        here = notes["channel"] == channel
        after = np.searchsorted(ticks, notes["start"][here], side="right")
        ends = np.append(ticks, np.iinfo(np.int64).max)[after]
        notes["end"][here] = np.minimum(notes["end"][here], ends)
    rows, held = [], [0] * 16
    for tick, value, channel in pedals.tolist():
        if value < CHANNEL_MODE:
            rows.append((tick, value, channel))
            held[channel] = value
        elif value == CHANNEL_MODE + RESET_CONTROLLERS and held[channel]:
            rows.append((tick, 0, channel))
            held[channel] = 0
        elif value == CHANNEL_MODE + ALL_SOUND_OFF and held[channel] >= PEDAL_DOWN:
            rows += [(tick, 0, channel), (tick, held[channel], channel)]
    return notes, np.array(rows, PEDAL)


def _without_open_notes(notes: np.ndarray) -> np.ndarray:
    """Without notes that never end, as the reference; a drum hit needs no end."""
    from data_pipeline._smf import OPEN

    never_ends = notes["end"] == OPEN
    if not never_ends.any():
        return notes
    notes["end"] = np.where(never_ends, notes["start"], notes["end"])
    return notes[~never_ends | (notes["channel"] == DRUM_CHANNEL)]


def write_midi(performance: Performance, path: str | Path) -> None:
    """Writes `midi_bytes`, all or nothing."""
    expect(performance, Performance, "write_midi: a Performance, e.g. `.full` of a continuation,")
    write_atomically(path, midi_bytes(performance))


def midi_bytes(performance: Performance) -> bytes:
    """The MIDI file of a performance, which `read_midi` makes the same performance of.

    But for what no MIDI file can hold: a note that reaches past the next onset of its pitch and
    channel ends there (of decoded ids, whose durations are rounded to 10 ms, by that step), and
    notes that last no time or have velocity 0 are left out. Drum hits may last no time.

    Raises:
        UserError: a value that no MIDI file can hold, such as a pitch of 200.
    """
    from data_pipeline._smf_writer import file_bytes

    p = resolve_overlaps(performance)
    return file_bytes(p.ticks_per_beat, p.notes, p.pedals, p.tempi, p.programs, p.texts)


def to_miditoolkit(performance: Performance) -> "MidiFile":
    """The object of the package miditoolkit: an instrument for each program of a channel that notes
    are played with, each with the channel's pedal; without texts.
    """
    from miditoolkit import ControlChange, Instrument, MidiFile, Note, TempoChange

    p = performance
    midi = MidiFile(ticks_per_beat=p.ticks_per_beat)
    midi.tempo_changes = [TempoChange(60e6 / us, tick) for tick, us in p.tempi.tolist() if us]
    channels, programs = p.notes["channel"], note_programs(p)
    for channel, program in sorted(set(zip(channels.tolist(), programs.tolist(), strict=True))):
        instrument = Instrument(program, is_drum=channel == DRUM_CHANNEL)
        chosen = p.notes[(channels == channel) & (programs == program)]
        instrument.notes = [
            Note(v, pitch, start, end) for pitch, v, _, start, end in chosen.tolist()
        ]
        pedals = p.pedals[p.pedals["channel"] == channel].tolist()
        instrument.control_changes = [ControlChange(64, value, tick) for tick, value, _ in pedals]
        midi.instruments.append(instrument)
    return midi


def from_miditoolkit(midi: "MidiFile") -> Performance:
    """The performance of miditoolkit's object, each pitched instrument on a channel of its own.

    Raises:
        UserError: more instruments than channels.
    """
    free = [channel for channel in range(16) if channel != DRUM_CHANNEL]
    notes, pedals, programs = [], [], []
    for instrument in midi.instruments:
        if not free and not instrument.is_drum:
            raise UserError("a performance holds 15 instruments beside the drums, this one more")
        channel = DRUM_CHANNEL if instrument.is_drum else free.pop(0)
        programs.append((0, instrument.program, channel))
        notes += [(n.pitch, n.velocity, channel, n.start, n.end) for n in instrument.notes]
        controls = instrument.control_changes
        pedals += [(c.time, c.value, channel) for c in controls if c.number == 64]
    tempi = [(change.time, round(60e6 / change.tempo)) for change in midi.tempo_changes]

    def table(rows: list[tuple], dtype: np.dtype, tick: str = "tick") -> np.ndarray:
        out = np.array(rows, dtype)
        return out[np.argsort(out[tick], kind="stable")]

    return Performance(
        ticks_per_beat=midi.ticks_per_beat,
        notes=table(notes, NOTE, "start"),
        pedals=table(pedals, PEDAL),
        tempi=table(tempi, TEMPO) if tempi else _DEFAULT_TEMPO,
        programs=table(programs, PROGRAM) if programs else _DEFAULT_PROGRAM,
    )
