"""Aria's absolute-onset vocabulary, and performances to token ids and back.

A note is three tokens, (instrument, pitch, velocity) (onset) (duration); a drum hit two. Onsets
count from the last `<T>`, one of which stands at every 5 s. Reference: ariautils
tokenizer/absolute.py; published weights depend on the ids.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from data_pipeline.cleaning import remove_instruments, supported_notes
from data_pipeline.errors import InvalidMidi, expect
from data_pipeline.metadata import normalise_class
from data_pipeline.midi import (
    DRUM_CHANNEL,
    NOTE,
    PEDAL,
    PEDAL_DOWN,
    PROGRAM,
    Performance,
    note_programs,
    pedalled_ends,
    refuse_overlong,
)
from data_pipeline.settings import OF_SERIES, AugmentConfig
from data_pipeline.tokenizers.base import Tokenizer
from data_pipeline.vocabulary import (
    DRUM_VELOCITY,
    HIGHEST_DRUM,
    INSTRUMENT_OF_PROGRAM,
    INSTRUMENTS,
    LABELS,
    LOWEST_DRUM,
    PROGRAMS,
    SEGMENT_MS,
    SPECIAL,
    STEP_MS,
    VELOCITY_STEP,
    Kind,
    event_automaton,
    reachable_ids,
)

# Compared without accents: the vocabulary writes "étude", label tables write "etude".
_LABEL_TOKENS = {
    (label, normalise_class(name)): name for label, names in LABELS.items() for name in names
}


def label_tokens(labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Tokens of the labels that the vocabulary knows, e.g. ("prefix", "composer", "bach")."""
    named = ((label, normalise_class(labels.get(label, ""))) for label in LABELS)
    return [("prefix", one[0], _LABEL_TOKENS[one]) for one in named if one in _LABEL_TOKENS]


DIM_FROM_END, DIM_JITTER = 100, 10


@dataclass(frozen=True)
class AriaTokenizer(Tokenizer):
    """Aria's vocabulary and the two directions through it.

    Attributes:
        preset_name: "aria" (17,727 ids) or "pedal": piano with pedal events, as the reference's
            real-time demo uses it (two ids more).
    """

    preset_name: str = "aria"
    augmentations = frozenset(one.name for one in fields(AugmentConfig)) - OF_SERIES

    # --- vocabulary ---

    @cached_property
    def tokens(self) -> tuple:
        """Token of each id: a string, or a tuple such as ("piano", 60, 70) or ("onset", 1230)."""
        prefixes = [("prefix", "instrument", name) for name in (*INSTRUMENTS, "drum")]
        prefixes += [("prefix", label, name) for label in LABELS for name in LABELS[label]]
        notes = [
            (instrument, pitch, velocity)
            for instrument in INSTRUMENTS
            for pitch in range(128)
            for velocity in range(0, 121, VELOCITY_STEP)
        ]
        drums = [("drum", pitch) for pitch in range(LOWEST_DRUM, HIGHEST_DRUM + 1)]
        durations = [("dur", ms) for ms in range(0, SEGMENT_MS + 1, STEP_MS)]
        onsets = [("onset", ms) for ms in range(0, SEGMENT_MS, STEP_MS)]
        pedal = ["<PED_ON>", "<PED_OFF>"] if self.has_pedal else []
        return (*SPECIAL, *prefixes, *notes, *drums, *durations, *onsets, *pedal)

    @property
    def has_pedal(self) -> bool:
        """Whether pedal events are tokens."""
        return self.preset_name == "pedal"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of vocabulary and settings: data and models with the same hash fit together."""
        settings = [self.tokens, SEGMENT_MS, STEP_MS, VELOCITY_STEP]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    dim_id, time_id = 4, 5

    @cached_property
    def kind(self) -> np.ndarray:
        """`Kind` of each id, uint8 [V]."""
        of_first = {"prefix": Kind.PREFIX, "drum": Kind.DRUM, "dur": Kind.DUR, "onset": Kind.ONSET,
                    "<T>": Kind.TIME, "<PED_ON>": Kind.PEDAL, "<PED_OFF>": Kind.PEDAL}  # fmt: skip
        of_first |= {name: Kind.NOTE for name in INSTRUMENTS}
        heads = (token if isinstance(token, str) else token[0] for token in self.tokens)
        return np.array([of_first.get(head, Kind.SPECIAL) for head in heads], np.uint8)

    def _table(self, kinds: tuple[Kind, ...], column: int) -> np.ndarray:
        """Component `column` of the tokens of `kinds`, -1 for the others; int32 [V]."""
        table = np.full(self.vocab_size, -1, np.int32)
        for i in np.flatnonzero(np.isin(self.kind, kinds)):
            table[i] = self.tokens[i][column]
        return table

    @cached_property
    def onset_ms(self) -> np.ndarray:
        """Onset of each onset token in ms, else -1; int32 [V]."""
        return self._table((Kind.ONSET,), 1)

    @cached_property
    def dur_ms(self) -> np.ndarray:
        """Duration of each duration token in ms, else -1; int32 [V]."""
        return self._table((Kind.DUR,), 1)

    @cached_property
    def pitch(self) -> np.ndarray:
        """Pitch of each note or drum token, else -1; int32 [V]."""
        return self._table((Kind.NOTE, Kind.DRUM), 1)

    @cached_property
    def velocity(self) -> np.ndarray:
        """Velocity of each note token, else -1; int32 [V]."""
        return self._table((Kind.NOTE,), 2)

    @cached_property
    def instrument(self) -> np.ndarray:
        """Index into (*INSTRUMENTS, "drum") of note, drum and instrument-prefix tokens, else -1."""
        table = np.full(self.vocab_size, -1, np.int32)
        notes = np.repeat(np.arange(len(INSTRUMENTS)), 128 * 13)
        table[self.first_note_id : self.first_drum_id] = notes
        table[self.kind == Kind.DRUM] = len(INSTRUMENTS)
        table[len(SPECIAL) : len(SPECIAL) + len(INSTRUMENTS) + 1] = np.arange(len(INSTRUMENTS) + 1)
        return table

    # Where each block of the vocabulary begins; ids within a block are in the order of its values.
    first_note_id = len(SPECIAL) + len(INSTRUMENTS) + 1 + sum(map(len, LABELS.values()))
    first_drum_id = first_note_id + len(INSTRUMENTS) * 128 * 13
    first_dur_id = first_drum_id + HIGHEST_DRUM - LOWEST_DRUM + 1
    first_onset_id = first_dur_id + SEGMENT_MS // STEP_MS + 1
    first_pedal_id = first_onset_id + SEGMENT_MS // STEP_MS

    # --- performance -> ids ---

    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        remove_preceding_silence: bool = True,
        add_dim: bool = False,
        add_eos: bool = True,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Token ids of a performance, uint16 [L] (reference: AbsTokenizer.tokenize + encode).

        Args:
            performance: what to tokenise.
            labels: composer, form, genre; those the vocabulary knows become prefix tokens.
            remove_preceding_silence: begin at the first note.
            add_dim: put `<D>` about 100 tokens before the end of pieces of over 150 tokens.
            add_eos: end with `<E>`.
            rng: draws the order of the prefix (without: ascending ids) and jitters `<D>` by ±10.

        Raises:
            InvalidMidi: no note is left once unsupported instruments are removed; the pedal
                preset was given anything but a piano; or it lasts longer than a day.
        """
        expect(performance, Performance, "Tokenizer.encode: a Performance")
        performance = remove_instruments(performance)
        if not len(performance.notes):
            raise InvalidMidi("no-notes", "no notes of a supported instrument")
        instruments = INSTRUMENT_OF_PROGRAM[note_programs(performance)]
        prefix = self._prefix(performance, instruments, labels or {})
        body = self._body(performance, instruments, remove_preceding_silence)
        if rng is not None:
            prefix = rng.permutation(prefix)
        if add_dim and len(body) > 150:
            body = self.with_dim(body, rng)
        ending = [self.eos_id] if add_eos else []
        return np.concatenate([prefix, [self.bos_id], body, ending]).astype(np.uint16)

    def _prefix(
        self, performance: Performance, instruments: np.ndarray, labels: Mapping[str, str]
    ) -> np.ndarray:
        """Prefix ids in ascending order: what the notes are played on (`instruments` [N]), the last
        program of each channel without notes (as in the reference), and labels.
        """
        channels = performance.notes["channel"]
        used = np.bincount(channels, minlength=16) > 0
        pitched = instruments[channels != DRUM_CHANNEL] if used[DRUM_CHANNEL] else instruments
        present = set(np.flatnonzero(np.bincount(pitched)).tolist())
        silent = {int(row["channel"]): int(row["program"]) for row in performance.programs}
        silent.pop(DRUM_CHANNEL, None)
        present |= {int(INSTRUMENT_OF_PROGRAM[p]) for c, p in silent.items() if not used[c]}
        if self.has_pedal and present != {0}:
            raise InvalidMidi("not-piano", "the pedal preset takes solo piano only")
        ids = [len(SPECIAL) + i for i in present]
        if used[DRUM_CHANNEL]:
            ids.append(len(SPECIAL) + len(INSTRUMENTS))
        ids += [self.id_of(token) for token in label_tokens(labels)]
        return np.array(sorted(ids), np.int64)

    def _body(
        self, performance: Performance, instruments: np.ndarray, remove_preceding_silence: bool
    ) -> np.ndarray:
        """Ids between `<S>` and `<E>`, uint16: up to three tokens an event, after its `<T>`s."""
        from data_pipeline import _kernels as kernels

        notes = performance.notes
        ticks = notes["start"]
        # Drums have no pedal (the reference writes `<U>` for it).
        pedals = performance.pedals[performance.pedals["channel"] != DRUM_CHANNEL]
        if self.has_pedal:
            ticks = np.concatenate([ticks, pedals["tick"]])
        order = np.argsort(ticks, kind="stable")
        begin = 0 if not remove_preceding_silence else int(ticks[order[0]])
        onsets_ms = performance.between_ms(begin, ticks)
        refuse_overlong(onsets_ms, "a performance")
        durations_ms = performance.between_ms(notes["start"], pedalled_ends(performance))
        heads, durations = kernels.note_tokens(
            np.ascontiguousarray(notes["pitch"]),
            np.ascontiguousarray(notes["velocity"]),
            np.ascontiguousarray(notes["channel"]),
            durations_ms,
            instruments,
            (self.first_note_id, self.first_drum_id, self.first_dur_id),
            self.unk_id,
        )
        if self.has_pedal:
            pedal_ids = self.first_pedal_id + (pedals["value"] < PEDAL_DOWN)
            heads = np.concatenate([heads, pedal_ids])
            durations = np.concatenate([durations, np.full(len(pedals), -1)])
        return kernels.write_events(
            heads, onsets_ms, durations, order, self.first_onset_id, self.time_id
        )

    def with_dim(self, ids: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """`ids` with `<D>` before the event about 100 tokens from their end, a last `<E>` not
        counted (reference: AbsTokenizer._format).

        Args:
            ids: at least 113 of them after the prefix.
            rng: moves the place by up to 10 tokens.
        """
        jitter = int(rng.integers(-DIM_JITTER, DIM_JITTER + 1)) if rng is not None else 0
        at = len(ids) - int(ids[-1] == self.eos_id) - DIM_FROM_END + jitter
        # Not between a note and its onset or duration.
        at -= {Kind.ONSET: 1, Kind.DUR: 2}.get(Kind(self.kind[ids[at]]), 0)
        return np.insert(ids, at, self.dim_id)

    # --- ids -> performance ---

    def events(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whole notes, drum hits and pedal events in `ids`: position of the first token of each,
        and its onset in ms from the first token; int64 [N] both.
        """
        ids = np.asarray(ids, np.int64)
        kind = self.kind[ids]
        following = np.append(kind, [Kind.SPECIAL])[1:]
        third = np.append(kind, [Kind.SPECIAL, Kind.SPECIAL])[2:]
        whole = ((kind == Kind.NOTE) & (third == Kind.DUR)) | np.isin(kind, (Kind.DRUM, Kind.PEDAL))
        at = np.flatnonzero(whole & (following == Kind.ONSET))
        segment = np.cumsum(kind == Kind.TIME)
        return at, segment[at] * SEGMENT_MS + self.onset_ms[ids[at + 1]]

    def decode(self, ids: np.ndarray) -> Performance:
        """A performance of 1 tick = 1 ms (reference: AbsTokenizer.detokenize).

        Incomplete events and notes of instruments that the prefix does not announce are left out.
        """
        ids = self.check_ids(ids)
        at, onset_ms = self.events(ids)
        first_event = at[0] if len(at) else len(ids)
        channel_of, programs = self._channels(ids[:first_event])
        kind = self.kind[ids[at]]
        pedal = kind == Kind.PEDAL
        pedals = np.zeros(int(pedal.sum()), PEDAL)
        pedals["tick"] = onset_ms[pedal]
        pedals["value"] = np.where(ids[at[pedal]] == self.first_pedal_id, 127, 0)
        at, onset_ms, kind = at[~pedal], onset_ms[~pedal], kind[~pedal]
        drum, channel = kind == Kind.DRUM, channel_of[self.instrument[ids[at]]]
        notes = np.zeros(len(at), NOTE)
        notes["pitch"] = self.pitch[ids[at]]
        notes["velocity"] = np.where(drum, DRUM_VELOCITY, self.velocity[ids[at]])
        notes["channel"] = np.maximum(channel, 0)
        notes["start"] = onset_ms
        dur_at = np.minimum(at + 2, len(ids) - 1)
        notes["end"] = onset_ms + np.where(drum, STEP_MS, self.dur_ms[ids[dur_at]])
        notes = notes[channel >= 0]
        notes = notes[np.argsort(notes["start"], kind="stable")]
        pedals = pedals[np.argsort(pedals["tick"], kind="stable")]
        if len(programs):
            return Performance(500, notes, pedals, programs=programs)
        return Performance(500, notes, pedals)

    def _channels(self, prefix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Channel of each instrument (-1: not announced), int64 [11]; `PROGRAM` rows."""
        channel_of = np.full(len(INSTRUMENTS) + 1, -1, np.int64)
        rows, free = [], 0
        for instrument in self.instrument[prefix[self.kind[prefix] == Kind.PREFIX]]:
            if instrument < 0 or channel_of[instrument] >= 0:
                continue
            if instrument == len(INSTRUMENTS):
                channel_of[instrument] = DRUM_CHANNEL
                rows.append((0, 0, DRUM_CHANNEL))
                continue
            free += free == DRUM_CHANNEL
            channel_of[instrument] = free
            rows.append((0, PROGRAMS[INSTRUMENTS[instrument]], free))
            free += 1
        return channel_of, np.array(rows, PROGRAM)

    # --- ids -> ids ---

    def slice_notes(self, ids: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Notes `start:stop` of a piece, and the pedal events between them, as a piece of their
        own: prefix, `<S>`, notes from onset 0, `<E>`; uint16.

        Onsets are multiples of 10 ms and so is the shift: nothing is quantised twice.
        """
        from data_pipeline import _kernels as kernels

        ids = np.asarray(ids, np.int64)
        at, onset_ms = self.events(ids)
        prefix = ids[: np.argmax(ids == self.bos_id)] if self.bos_id in ids else ids[:0]
        is_note = self.kind[ids[at]] != Kind.PEDAL
        n_so_far = np.cumsum(is_note)
        here = (n_so_far > start) & (n_so_far - is_note < stop)
        at, onset_ms = at[here], onset_ms[here]
        if not len(at):
            return np.concatenate([prefix, [self.bos_id, self.eos_id]]).astype(np.uint16)
        note = self.kind[ids[at]] == Kind.NOTE
        durations = np.where(note, ids[np.minimum(at + 2, len(ids) - 1)], -1)
        body = kernels.write_events(
            ids[at],
            onset_ms - onset_ms[0],
            durations,
            np.arange(len(at)),
            self.first_onset_id,
            self.time_id,
        )
        return np.concatenate([prefix, [self.bos_id], body, [self.eos_id]]).astype(np.uint16)

    def slice_ids(self, ids: np.ndarray, note_at: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Notes `start:stop`, as `slice_notes` takes them.

        Composer, form and genre are left out: they would give away what is to be learned
        (reference: ContrastiveDataset.get_slice empties the metadata).
        """
        start, stop = (int(note_at[i]) if i < len(note_at) else len(ids) for i in (start, stop))
        body = ids[start:stop]
        prefix = ids[: int(np.argmax(ids == self.bos_id))]
        instrument = self.instrument[prefix]
        drums = len(INSTRUMENTS)  # announced where they are heard, as in a slice of the file
        heard = (instrument != drums) | (self.kind[body] == Kind.DRUM).any()
        prefix = prefix[(instrument >= 0) & heard]
        piece = np.concatenate([prefix, [self.bos_id], body])
        return self.slice_notes(piece, 0, len(piece))

    def start(self, instrument: str = "piano") -> np.ndarray:
        """Instrument and `<S>`, int64."""
        return np.array([self.id_of(("prefix", "instrument", instrument)), self.bos_id])

    with_tokens = staticmethod(supported_notes)

    def reachable(self, occurring: np.ndarray) -> np.ndarray:
        """See `vocabulary.reachable_ids`."""
        return reachable_ids(occurring, self)

    def augment(
        self, ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator
    ) -> np.ndarray:
        """See `data_pipeline.augment.augment`; without padding, a little longer if slower."""
        from data_pipeline.augment import augment

        # The length is kept there, but a slower tempo needs more `<T>`s: at most one for each.
        room = np.full(np.count_nonzero(ids == self.time_id) + 2, self.pad_id, ids.dtype)
        changed = augment(np.concatenate([ids, room]), config, rng, self)
        return changed[changed != self.pad_id]

    grammar = event_automaton
