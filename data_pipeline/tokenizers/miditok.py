"""REMI and MIDI-Like through MidiTok (extra `miditok`).

Sources: Huang & Yang, "Pop Music Transformer" (REMI), 2020, in bars of 4/4 with the tempo of the
file; Oore et al., "This Time with Feeling", 2018, and Huang et al., "Music Transformer", 2019
(MIDI-Like), in shifts of 10 ms to 1 s, 32 velocities. Both with a Program token before each note,
so that they hold any instruments. The pedal is folded into the notes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.errors import InvalidMidi, UserError, expect
from data_pipeline.midi import (
    DRUM_CHANNEL,
    NOTE,
    PROGRAM,
    TEMPO,
    Performance,
    midi_bytes,
    refuse_overlong,
    resolve_pedal,
)
from data_pipeline.tokenizers.base import COMMON_SPECIAL, Tokenizer
from data_pipeline.vocabulary import Automaton, Kind

_KINDS = {"Pitch": Kind.NOTE, "NoteOn": Kind.NOTE, "PitchDrum": Kind.DRUM, "DrumOn": Kind.DRUM,
          "NoteOff": Kind.NOTE_OFF, "DrumOff": Kind.NOTE_OFF, "Velocity": Kind.VELOCITY,
          "Duration": Kind.DUR, "TimeShift": Kind.TIME, "Bar": Kind.TIME, "Position": Kind.TIME,
          "Program": Kind.PREFIX}  # fmt: skip
_BEATS_PER_BAR, _POSITIONS_PER_BEAT, _STEPS_PER_BEAT = 4, 8, 50
_SETTINGS: dict[str, dict[str, Any]] = {
    "remi": {
        "beat_res": {(0, 4): _POSITIONS_PER_BEAT, (4, 12): 4},
        "use_tempos": True,
        "num_tempos": 211,
        "tempo_range": (40, 250),
    },
    # A beat is 500 ms here, whatever the file's tempo.
    "midi-like": {"beat_res": {(0, 2): _STEPS_PER_BEAT}},
}


class MidiTokTokenizer(Tokenizer):
    """A tokenizer of MidiTok: its tokens without its special ones, after `COMMON_SPECIAL`.

    Args:
        preset_name: "remi" or "midi-like".

    Raises:
        UserError: MidiTok is not installed.
    """

    augmentations = frozenset(("pitch", "velocity"))

    def __init__(self, preset_name: str):
        try:
            import miditok
        except ImportError as error:
            raise UserError(
                f"the {preset_name} tokenizer needs MidiTok: pip install 'aria-jax[miditok]' "
                f"({error})"
            ) from None
        self.preset_name = preset_name
        config = miditok.TokenizerConfig(
            pitch_range=(0, 127),
            num_velocities=32,
            special_tokens=["PAD", "BOS", "EOS"],
            use_programs=True,
            use_time_signatures=False,
            time_signature_range={4: [_BEATS_PER_BAR]},
            **_SETTINGS[preset_name],
        )
        scheme = {"remi": miditok.REMI, "midi-like": miditok.MIDILike}[preset_name]
        self._miditok = scheme(config)
        if preset_name == "midi-like":
            self.augmentations = self.augmentations | {"tempo"}
        vocabulary: dict[str, int] = self._miditok.vocab
        names = [name for name in vocabulary if name.split("_")[0] not in ("PAD", "BOS", "EOS")]
        self._tokens = (*COMMON_SPECIAL, *names)
        # Ids of MidiTok, -1 for special ones, and back.
        self._miditok_id = np.array([-1] * len(COMMON_SPECIAL) + [vocabulary[n] for n in names])
        self._local = np.full(int(self._miditok_id.max()) + 1, self.unk_id)
        self._local[self._miditok_id[len(COMMON_SPECIAL) :]] = np.arange(
            len(COMMON_SPECIAL), len(self._tokens)
        )

    @property
    def tokens(self) -> tuple:
        """MidiTok's names, e.g. "Pitch_60"."""
        return self._tokens

    @cached_property
    def _types(self) -> list[str]:
        return [name.split("_")[0] for name in self.tokens]

    @cached_property
    def kind(self) -> np.ndarray:
        """See `Tokenizer.kind`."""
        return np.array([_KINDS.get(name, Kind.SPECIAL) for name in self._types], np.uint8)

    def _values(self, *types: str) -> np.ndarray:
        """The number in each token of these types, -1 in others; float [V]."""
        return np.array(
            [
                float(name.split("_")[1]) if kind in types else -1.0
                for name, kind in zip(self.tokens, self._types, strict=True)
            ]
        )

    @cached_property
    def pitch(self) -> np.ndarray:
        """See `Tokenizer.pitch`."""
        return self._values("Pitch", "NoteOn", "PitchDrum", "DrumOn").astype(np.int32)

    @cached_property
    def velocity(self) -> np.ndarray:
        """See `Tokenizer.velocity`; here the velocity is a token of its own."""
        return self._values("Velocity").astype(np.int32)

    @cached_property
    def _shift_steps(self) -> np.ndarray:
        """Steps of 10 ms of each TimeShift token, 0 for others; int64 [V]."""
        steps = np.zeros(self.vocab_size, np.int64)
        for i, (name, kind) in enumerate(zip(self.tokens, self._types, strict=True)):
            if kind == "TimeShift":
                beats, part, _ = name.split("_")[1].split(".")
                steps[i] = int(beats) * _STEPS_PER_BEAT + int(part)
        return steps

    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        add_eos: bool = True,
    ) -> np.ndarray:
        """See `Tokenizer.encode`; there are no tokens for labels. Silence before the first note
        goes, by whole bars in REMI.
        """
        from symusic import Score

        del labels
        performance = resolve_pedal(
            self.with_tokens(expect(performance, Performance, "encode: a Performance"))
        )
        refuse_overlong(np.array([performance.duration_ms]), "a performance")
        first = int(performance.notes["start"][0])
        if self.preset_name == "midi-like":
            performance = _in_ms(performance, first)
        else:
            bar = _BEATS_PER_BAR * performance.ticks_per_beat
            performance = _from_tick(performance, first // bar * bar)
        score = Score.from_midi(midi_bytes(replace(performance, texts=())))
        encoded = self._miditok.encode(score)
        body = self._local[np.array(encoded.ids, np.int64)]
        if not (self.pitch[body] >= 0).any():
            raise InvalidMidi("no-notes", "no notes that last")
        ending = [self.eos_id] if add_eos else []
        return np.concatenate([[self.bos_id], body, ending]).astype(np.uint16)

    def _decode_for_encoding(self, ids: np.ndarray) -> Performance:
        """In ticks, with the tempo that the tokens say."""
        known = self._miditok_id[self.check_ids(ids)]
        if not (known >= 0).any():
            return Performance(500, np.zeros(0, NOTE))
        return _performance_of(self._miditok.decode(known[known >= 0].tolist()))

    def decode(self, ids: np.ndarray) -> Performance:
        """See `Tokenizer.decode`."""
        return _in_ms(self._decode_for_encoding(ids), 0)

    def events(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.events`."""
        ids = np.asarray(ids, np.int64)
        kind = np.append(self.kind[ids], [Kind.SPECIAL] * 2)
        whole = (self.pitch[ids] >= 0) & (kind[1:-1] == Kind.VELOCITY)
        if self.preset_name == "midi-like":
            now = np.cumsum(self._shift_steps[ids]) * 10
        else:
            whole &= kind[2:] == Kind.DUR
            now = self._beats_ms(ids)
        at = np.flatnonzero(whole)
        return at, now[at]

    def _beats_ms(self, ids: np.ndarray) -> np.ndarray:
        """When each token of REMI stands, int64 [L]."""
        is_bar = np.array([name == "Bar" for name in self._types])[ids]
        position = self._values("Position")[ids]
        bar = np.cumsum(is_bar)
        moved = is_bar | (position >= 0)
        latest = np.maximum.accumulate(np.where(moved, np.arange(len(ids)), -1))
        within = np.where(latest >= 0, np.maximum(position, 0)[latest], 0)
        bar_steps = _BEATS_PER_BAR * _POSITIONS_PER_BEAT
        step = np.maximum(bar - 1, 0) * bar_steps + within
        tempo = self._values("Tempo")[ids]
        said = np.maximum.accumulate(np.where(tempo > 0, np.arange(len(ids)), -1))
        bpm = np.where(said >= 0, tempo[said], 120.0)
        before = np.concatenate([[120.0], bpm[:-1]])
        if (tempo > 0).any():  # the first tempo holds from the beginning
            before[: int(np.argmax(tempo > 0)) + 1] = tempo[int(np.argmax(tempo > 0))]
        passed = np.diff(step, prepend=0) * 60_000 / (before * _POSITIONS_PER_BEAT)
        return np.rint(np.cumsum(passed)).astype(np.int64)

    def grammar(self) -> Automaton:
        """MidiTok's graph of the types that may follow one another, and its ends."""
        graph = self._miditok.tokens_types_graph
        types = sorted({kind for kind in self._types if kind not in COMMON_SPECIAL})
        number = {kind: i for i, kind in enumerate(types)}
        bos, eos, other = range(len(types), len(types) + 3)
        special = {"<S>": bos, "<E>": eos, "<P>": other, "<U>": other}
        class_of = np.array([number.get(kind, special.get(kind, other)) for kind in self._types])
        # State 0 is the beginning, then one a class.
        following = np.full((len(types) + 4, len(types) + 3), -1, np.int32)
        following[0, bos] = bos + 1
        for kind in types:
            after = [
                number[other_kind] for other_kind in graph.get(kind, ()) if other_kind in number
            ]
            following[number[kind] + 1, after] = np.array(after, np.int32) + 1
            if kind not in ("Pitch", "NoteOn", "PitchDrum", "DrumOn", "Program"):
                following[number[kind] + 1, eos] = eos + 1
        begins = [
            number[kind] for kind in ("Bar", "TimeShift", "Program", "DrumOn") if kind in number
        ]
        following[bos + 1, begins] = np.array(begins, np.int32) + 1
        return Automaton(class_of.astype(np.int32), following)


def _in_ms(performance: Performance, first: int) -> Performance:
    """Notes in ticks of 1 ms from tick `first`; programs in force stay."""
    notes = performance.notes.copy()
    notes["start"] = performance.between_ms(first, performance.notes["start"])
    lengths = performance.between_ms(performance.notes["start"], performance.notes["end"])
    notes["end"] = notes["start"] + lengths
    programs = performance.programs.copy()
    ticks = np.maximum(programs["tick"], first)
    programs["tick"] = performance.between_ms(first, ticks)
    return Performance(500, notes, programs=programs, compat=performance.compat)


def _from_tick(performance: Performance, first: int) -> Performance:
    """The performance from a tick on that no note begins before."""
    notes, tempi = performance.notes.copy(), performance.tempi.copy()
    programs = performance.programs.copy()
    notes["start"] -= first
    notes["end"] -= first
    tempi = tempi[max(0, int(np.searchsorted(tempi["tick"], first, side="right")) - 1) :]
    tempi["tick"] = np.maximum(tempi["tick"] - first, 0)
    programs["tick"] = np.maximum(programs["tick"] - first, 0)
    return replace(performance, notes=notes, tempi=tempi, programs=programs)


def _performance_of(score: Any) -> Performance:
    """Of symusic's Score; each track on a channel of its own, as far as there are channels."""
    channels = [channel for channel in range(16) if channel != DRUM_CHANNEL]
    tables, programs, n_pitched = [np.zeros(0, NOTE)], [], 0
    for track in score.tracks:
        channel = DRUM_CHANNEL
        if not track.is_drum:
            channel = channels[n_pitched % len(channels)]
            n_pitched += 1
        found = track.notes.numpy()
        table = np.zeros(len(found["time"]), NOTE)
        table["pitch"], table["velocity"] = found["pitch"], found["velocity"]
        table["start"] = found["time"]
        table["end"] = found["time"] + found["duration"]
        table["channel"] = channel
        tables.append(table)
        programs.append((0, max(int(track.program), 0), channel))
    notes = np.concatenate(tables)
    rows = [(int(one.time), round(60e6 / one.qpm)) for one in score.tempos]
    return Performance(
        score.ticks_per_quarter,
        notes[np.argsort(notes["start"], kind="stable")],
        tempi=np.array(rows or [(0, 500_000)], TEMPO),
        programs=np.array(programs or [(0, 0, 0)], PROGRAM),
    )
