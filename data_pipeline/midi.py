"""Standard MIDI Files to `Performance` (structured NumPy arrays) and back."""

import io
import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.errors import InvalidMidi

NOTE = np.dtype(
    [("pitch", "u1"), ("velocity", "u1"), ("channel", "u1"), ("start", "i8"), ("end", "i8")]
)
PEDAL = np.dtype([("tick", "i8"), ("value", "u1"), ("channel", "u1")])
TEMPO = np.dtype([("tick", "i8"), ("tempo", "i8")])
PROGRAM = np.dtype([("tick", "i8"), ("program", "u1"), ("channel", "u1")])

DRUM_CHANNEL = 9
PEDAL_DOWN = 64  # controller values from here on press the pedal
MAX_HOURS = 24
"""No piece lasts longer; a broken delta time would otherwise ask for gigabytes of `<T>` tokens."""
_DEFAULT_TEMPO = np.array([(0, 500_000)], TEMPO)
_DEFAULT_PROGRAM = np.array([(0, 0, 0)], PROGRAM)


def _none(dtype: np.dtype) -> np.ndarray:
    return np.zeros(0, dtype)


@dataclass(frozen=True)
class Performance:
    """What a MIDI file says, in ticks (reference: aria-utils MidiDict).

    Attributes:
        ticks_per_beat: positive.
        notes: `NOTE` [N] sorted by start (stable).
        pedals: `PEDAL` [P] sustain-pedal events sorted by tick.
        tempi: `TEMPO` [>= 1] microseconds a beat, sorted by tick.
        programs: `PROGRAM` [>= 1] program changes sorted by tick.
        texts: text and copyright messages.
    """

    ticks_per_beat: int
    notes: np.ndarray
    pedals: np.ndarray = field(default_factory=lambda: _none(PEDAL))
    tempi: np.ndarray = field(default_factory=lambda: _DEFAULT_TEMPO)
    programs: np.ndarray = field(default_factory=lambda: _DEFAULT_PROGRAM)
    texts: tuple[str, ...] = ()

    def between_ms(self, starts: np.ndarray | int, ends: np.ndarray) -> np.ndarray:
        """Milliseconds from `starts` to `ends` (ticks), int64, rounded as the reference rounds."""
        from data_pipeline._smf import durations_ms

        ends = np.ascontiguousarray(ends, np.int64)
        starts = np.ascontiguousarray(np.broadcast_to(np.asarray(starts, np.int64), ends.shape))
        return durations_ms(
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
        if not len(self.notes):
            return 0
        return int(self.ms(np.array([self.notes["end"].max()]))[0])

    def slice_notes(self, start: int, stop: int) -> "Performance":
        """Notes `start:stop`, all else as it is (reference: aria/embedding.py _get_chunks)."""
        return replace(self, notes=self.notes[start:stop])


def pedalled_ends(performance: Performance) -> np.ndarray:
    """End tick of each note once the sustain pedal is folded into it, int64 [N]."""
    from data_pipeline._smf import pedalled_ends as compiled

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


# --- reading -------------------------------------------------------------------------------------


def read_midi(source: str | Path | bytes) -> Performance:
    """Reads a MIDI file, from disk or from its bytes.

    Raises:
        InvalidMidi: not a readable MIDI file; `reason` says why in a word.
        OSError: the file cannot be opened.
    """
    name = "MIDI bytes" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    ticks_per_beat, tracks = _chunks(data, name)
    if ticks_per_beat <= 0:
        raise InvalidMidi("no-ticks-per-beat", f"{name}: its time division is not ticks per beat")
    bytes_N = np.frombuffer(data, np.uint8)
    decoded = [_decode_track(bytes_N, start, end, name) for start, end in tracks]
    notes, pedals, tempi, programs = (
        _sorted_by_tick([track[i] for track in decoded], dtype)
        for i, dtype in enumerate((NOTE, PEDAL, TEMPO, PROGRAM))
    )
    performance = Performance(
        ticks_per_beat=ticks_per_beat,
        notes=notes,
        pedals=pedals,
        tempi=tempi if len(tempi) else _DEFAULT_TEMPO,
        programs=programs if len(programs) else _DEFAULT_PROGRAM,
        texts=tuple(
            data[at : at + n].decode("latin1") for track in decoded for at, n in track[4].tolist()
        ),
    )
    refuse_overlong(performance.ms(notes["start"][-1:]), name)
    return performance


def refuse_overlong(onsets_ms: np.ndarray, name: str) -> None:
    """Raises InvalidMidi where an onset lies beyond `MAX_HOURS`."""
    hours = onsets_ms.max(initial=0) / 3_600_000
    if hours > MAX_HOURS:
        raise InvalidMidi("too-long", f"{name}: lasts {hours:,.0f} hours; the limit is {MAX_HOURS}")


def _chunks(data: bytes, name: str) -> tuple[int, list[tuple[int, int]]]:
    """Ticks per beat, and (start, end) of each track's content."""
    if data[:4] == b"RIFF" and data[8:12] == b"RMID":  # a MIDI file in a RIFF envelope
        found = data.find(b"MThd", 12, 64)
        data = data[found:] if found > 0 else b""
        offset = max(found, 0)
    else:
        offset = 0
    if data[:4] != b"MThd":
        raise InvalidMidi("not-midi", f"{name}: not a MIDI file (it does not start with MThd)")
    if len(data) < 14:
        raise InvalidMidi("truncated", f"{name}: cut inside the header")
    size, _, n_tracks, division = struct.unpack(">Lhhh", data[4:14])
    position, tracks = 8 + size, []
    if size < 6:
        raise InvalidMidi("truncated", f"{name}: its header is too short")
    for number in range(n_tracks):
        if position + 8 > len(data):
            raise InvalidMidi("truncated", f"{name}: track {number + 1} of {n_tracks} is missing")
        if data[position : position + 4] != b"MTrk":
            raise InvalidMidi("no-track-header", f"{name}: track {number + 1} has no MTrk header")
        (length,) = struct.unpack(">L", data[position + 4 : position + 8])
        start, position = position + 8, position + 8 + length
        if position > len(data):
            raise InvalidMidi(
                "truncated",
                f"{name}: track {number + 1} declares {length} bytes, {len(data) - start} are left",
            )
        tracks.append((start + offset, position + offset))
    return division, tracks


def _decode_track(bytes_N: np.ndarray, start: int, end: int, name: str) -> list[np.ndarray]:
    """Notes, pedals, tempi, programs and places of texts of one track, int64 [N, columns] each."""
    from data_pipeline._smf import REASONS, decode_track

    # No kind of event can outgrow these: (fewest bytes one takes, columns).
    sizes = ((3, 5), (3, 3), (7, 2), (2, 3), (4, 2))
    tables = [np.empty(((end - start) // n + 1, columns), np.int64) for n, columns in sizes]
    counts = decode_track(bytes_N[:end], start, end, *tables)
    if counts[0]:
        reason = REASONS[int(counts[0])]
        raise InvalidMidi(reason, f"{name}: broken MIDI data ({reason.replace('-', ' ')})")
    return [table[:n] for table, n in zip(tables, counts[1:], strict=True)]


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
    if (ticks[1:] < ticks[:-1]).any():
        rows = rows[np.argsort(ticks, kind="stable")]
    out = np.empty(len(rows), dtype)
    for column, field_name in enumerate(columns):
        out[field_name] = rows[:, column]
    return out


# --- writing -------------------------------------------------------------------------------------


def write_midi(performance: Performance, path: str | Path) -> None:
    """Writes a MIDI file with one track per channel (miditoolkit)."""
    Path(path).write_bytes(midi_bytes(performance))


def midi_bytes(performance: Performance) -> bytes:
    """The MIDI file of a performance; overlapping notes of one pitch are separated first.

    So of decoded ids, whose durations are rounded to 10 ms, a note that reaches past the next
    onset of its pitch loses that step: a MIDI file cannot hold such an overlap.
    """
    from miditoolkit import ControlChange, Instrument, MidiFile, Note, TempoChange

    performance = resolve_overlaps(performance)
    midi = MidiFile(ticks_per_beat=performance.ticks_per_beat)
    midi.tempo_changes = [
        TempoChange(60e6 / max(int(row["tempo"]), 1), int(row["tick"])) for row in performance.tempi
    ]
    program_of = {int(row["channel"]): int(row["program"]) for row in performance.programs}
    used = {int(channel) for channel in np.unique(performance.notes["channel"])}
    for channel in sorted(used):
        instrument = Instrument(program_of.get(channel, 0), is_drum=channel == DRUM_CHANNEL)
        chosen = performance.notes[performance.notes["channel"] == channel]
        instrument.notes = [
            Note(int(n["velocity"]), int(n["pitch"]), int(n["start"]), int(n["end"]))
            for n in chosen
            if n["end"] > n["start"]
        ]
        instrument.control_changes = [
            ControlChange(64, int(p["value"]), int(p["tick"]))
            for p in performance.pedals
            if p["channel"] == channel
        ]
        midi.instruments.append(instrument)
    buffer = io.BytesIO()
    midi.dump(file=buffer)
    return buffer.getvalue()
