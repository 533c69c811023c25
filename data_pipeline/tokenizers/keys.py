"""Schemes whose tokens name a key: MuseNet's, and a piano roll in the order of time.

Sources: Christine Payne, "MuseNet", OpenAI 2019: `piano:v72:G1` begins a note, `piano:v0:G1` ends
it, `wait:12` lets time pass; here a wait is of 10 ms to 1 s, longer ones are several, a drum hit
needs no end, labels stand before `<S>`; MuseNet's tokens for tempo and instrumentation are left
out. Feynman Liang, "BachBot", 2016, section 4.1: frames one after the other, in each the notes from
high to low, told apart by whether they begin or are held, then a delimiter; here a frame is 50 ms
instead of a sixteenth, for performances have no beat, and a beginning carries its velocity. In both
velocities are in steps of 10 and instruments those of Aria, so that the schemes differ in nothing
else.
"""

from abc import abstractmethod
from collections import defaultdict, deque
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from data_pipeline.midi import Performance
from data_pipeline.tokenizers.aria import label_tokens
from data_pipeline.tokenizers.base import (
    COMMON_SPECIAL,
    SOUND,
    Tokenizer,
    performance_of,
    sounding_notes,
)
from data_pipeline.vocabulary import (
    HIGHEST_DRUM,
    INSTRUMENTS,
    LABELS,
    LOWEST_DRUM,
    STEP_MS,
    VELOCITY_INDEX,
    VELOCITY_STEP,
    Automaton,
    Kind,
)

MAX_WAIT_STEPS = 100
FRAME_MS = 50
N_VELOCITIES = 13
"""Of a key: 0, with which no note begins, and twelve steps of 10. Drum hits have the twelve."""

_N_KEYS = (len(INSTRUMENTS) + 1) * 128


def key_tokens(silent: int | str) -> tuple:
    """A token of each key and velocity, then of each drum hit; the last of any such vocabulary.

    Args:
        silent: what stands for velocity 0.
    """
    velocities = range(0, N_VELOCITIES * VELOCITY_STEP, VELOCITY_STEP)
    drums = range(LOWEST_DRUM, HIGHEST_DRUM + 1)
    return (
        *((name, p, v or silent) for name in INSTRUMENTS for p in range(128) for v in velocities),
        *(("drum", pitch, velocity) for pitch in drums for velocity in velocities if velocity),
    )


class KeyTokenizer(Tokenizer):
    """A tokenizer whose vocabulary ends with `key_tokens`, which begin at `first_note_id`."""

    augmentations = frozenset(("tempo", "pitch", "velocity"))
    first_note_id: int

    def reachable(self, occurring: np.ndarray) -> np.ndarray:
        """See `Tokenizer.reachable`: of the instruments that occur every key."""
        numbers = self._sound["instrument"]
        is_key = np.arange(self.vocab_size) >= self.first_note_id
        played = np.isin(numbers, np.unique(numbers[occurring & is_key]))
        return np.flatnonzero(~is_key | played)

    @property
    def first_drum_id(self) -> int:
        """The first drum hit."""
        return self.first_note_id + len(INSTRUMENTS) * 128 * N_VELOCITIES

    @abstractmethod
    def _onsets_ms(self, ids: np.ndarray) -> np.ndarray:
        """When each token stands, int64 [L]."""

    @cached_property
    def _sound(self) -> np.ndarray:
        """`SOUND` of each token that names a key; [V]."""
        out = np.zeros(self.vocab_size, SOUND)
        for at in range(self.first_note_id, self.vocab_size):
            name, pitch, velocity = self.tokens[at]
            number = INSTRUMENTS.index(name) if name != "drum" else len(INSTRUMENTS)
            out[at] = (number, pitch, velocity if isinstance(velocity, int) else 0, 0, 0)
        return out

    @cached_property
    def pitch(self) -> np.ndarray:
        """See `Tokenizer.pitch`."""
        begins = np.isin(self.kind, (Kind.NOTE, Kind.DRUM))
        return np.where(begins, self._sound["pitch"].astype(np.int32), -1)

    @cached_property
    def velocity(self) -> np.ndarray:
        """See `Tokenizer.velocity`."""
        return np.where(self.pitch >= 0, self._sound["velocity"].astype(np.int32), -1)

    def key_ids(self, sounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of `SOUND` rows: the token that begins each, and that of its key at velocity 0, which
        means nothing for a drum hit; int64 [N] both.
        """
        instrument, pitch = sounds["instrument"].astype(np.int64), sounds["pitch"].astype(np.int64)
        step = np.maximum(VELOCITY_INDEX[sounds["velocity"]], 1)
        silent = self.first_note_id + (instrument * 128 + pitch) * N_VELOCITIES
        hit = self.first_drum_id + (pitch - LOWEST_DRUM) * (N_VELOCITIES - 1) + step - 1
        return np.where(instrument == len(INSTRUMENTS), hit, silent + step), silent

    def events(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.events`."""
        ids = np.asarray(ids, np.int64)
        at = np.flatnonzero(self.pitch[ids] >= 0)
        return at, self._onsets_ms(ids)[at]

    def token_classes(self) -> tuple[np.ndarray, int, int]:
        """For a grammar: the class of each id, which is its `Kind` but for `<S>` and `<E>`."""
        class_of, bos, eos = self.kind.astype(np.int32), len(Kind), len(Kind) + 1
        class_of[[self.bos_id, self.eos_id]] = bos, eos
        return class_of, bos, eos


class MuseNetTokenizer(KeyTokenizer):
    """17,330 ids; notes of a piece in the order of their onsets, ends before beginnings. Velocity 0
    ends a note.
    """

    preset_name = "musenet"

    @cached_property
    def tokens(self) -> tuple:
        """See `Tokenizer.tokens`."""
        return (
            *COMMON_SPECIAL,
            *(("prefix", label, name) for label in LABELS for name in LABELS[label]),
            *(("wait", n * STEP_MS) for n in range(1, MAX_WAIT_STEPS + 1)),
            *key_tokens(0),
        )

    first_wait_id = len(COMMON_SPECIAL) + sum(map(len, LABELS.values()))
    first_note_id = first_wait_id + MAX_WAIT_STEPS

    @cached_property
    def kind(self) -> np.ndarray:
        """See `Tokenizer.kind`."""
        kind = np.full(self.vocab_size, Kind.NOTE, np.uint8)
        kind[: self.first_wait_id] = Kind.PREFIX
        kind[: len(COMMON_SPECIAL)] = Kind.SPECIAL
        kind[self.first_wait_id : self.first_note_id] = Kind.TIME
        kind[self.first_note_id : self.first_drum_id : N_VELOCITIES] = Kind.NOTE_OFF
        kind[self.first_drum_id :] = Kind.DRUM
        return kind

    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        add_eos: bool = True,
    ) -> np.ndarray:
        """See `Tokenizer.encode`."""
        sounds = sounding_notes(performance)
        start = np.rint(sounds["start"] / STEP_MS).astype(np.int64)
        end = np.maximum(np.rint(sounds["end"] / STEP_MS).astype(np.int64), start + 1)
        on, off = self.key_ids(sounds)
        has_end = sounds["instrument"] != len(INSTRUMENTS)
        ids = np.concatenate([on, off[has_end]])
        steps = np.concatenate([start, end[has_end]])
        begins = np.arange(len(ids)) < len(sounds)
        order = np.lexsort((begins, steps))
        ids, steps = ids[order], steps[order]
        gaps = np.diff(steps, prepend=0)
        n_waits = -(-gaps // MAX_WAIT_STEPS)
        at = np.cumsum(n_waits + 1) - 1
        body = np.full(int(at[-1]) + 1, self.first_note_id - 1)  # the longest wait
        rest = gaps - (n_waits - 1) * MAX_WAIT_STEPS
        waiting = n_waits > 0
        body[at[waiting] - 1] = self.first_wait_id + rest[waiting] - 1
        body[at] = ids
        prefix = [self.id_of(token) for token in label_tokens(labels or {})]
        ending = [self.eos_id] if add_eos else []
        return np.concatenate([prefix, [self.bos_id], body, ending]).astype(np.uint16)

    def _onsets_ms(self, ids: np.ndarray) -> np.ndarray:
        """See `KeyTokenizer._onsets_ms`."""
        waits = np.where(self.kind[ids] == Kind.TIME, ids - self.first_wait_id + 1, 0)
        return np.cumsum(waits) * STEP_MS

    def decode(self, ids: np.ndarray) -> Performance:
        """See `Tokenizer.decode`. The earliest note of its pitch ends first; one that does not end
        lasts to the end of the tokens.
        """
        ids = self.check_ids(ids)
        now = self._onsets_ms(ids)
        kind = self.kind[ids]
        at = np.flatnonzero(np.isin(kind, (Kind.NOTE, Kind.DRUM, Kind.NOTE_OFF)))
        sounds = self._sound[ids[at]]
        sounds["start"] = sounds["end"] = now[at]
        sounding: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)
        ends = now[at] + STEP_MS  # of drum hits
        keys = zip(sounds["instrument"].tolist(), sounds["pitch"].tolist(), strict=True)
        for i, (key, what) in enumerate(zip(keys, kind[at].tolist(), strict=True)):
            if what == Kind.NOTE:
                sounding[key].append(i)
            elif what == Kind.NOTE_OFF and sounding[key]:
                ends[sounding[key].popleft()] = now[at[i]]
        left = [i for waiting in sounding.values() for i in waiting]
        ends[left] = now[-1] if len(now) else 0
        sounds["end"] = np.maximum(ends, sounds["start"] + STEP_MS)
        return performance_of(sounds[kind[at] != Kind.NOTE_OFF])

    def grammar(self) -> Automaton:
        """prefix* <S> (note | end of a note | drum hit | wait)* [<E>]."""
        class_of, bos, eos = self.token_classes()
        following = np.full((3, len(Kind) + 2), -1, np.int32)
        following[0, [Kind.PREFIX, bos]] = 0, 1
        following[1, [Kind.NOTE, Kind.NOTE_OFF, Kind.DRUM, Kind.TIME, eos]] = 1, 1, 1, 1, 2
        return Automaton(class_of, following)


class PianoRollTokenizer(KeyTokenizer):
    """17,209 ids. Two notes of one key and frame are one; a drum hit lasts a frame."""

    preset_name = "piano-roll"
    frame_id = len(COMMON_SPECIAL)
    first_note_id = frame_id + 1

    @cached_property
    def tokens(self) -> tuple:
        """See `Tokenizer.tokens`."""
        return (*COMMON_SPECIAL, "<F>", *key_tokens("held"))

    @cached_property
    def kind(self) -> np.ndarray:
        """See `Tokenizer.kind`."""
        kind = np.full(self.vocab_size, Kind.NOTE, np.uint8)
        kind[: len(COMMON_SPECIAL)] = Kind.SPECIAL
        kind[self.frame_id] = Kind.TIME
        kind[self.first_note_id : self.first_drum_id : N_VELOCITIES] = Kind.HELD
        kind[self.first_drum_id :] = Kind.DRUM
        return kind

    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        add_eos: bool = True,
    ) -> np.ndarray:
        """See `Tokenizer.encode`; there are no tokens for labels."""
        del labels
        sounds = sounding_notes(performance)
        start = np.rint(sounds["start"] / FRAME_MS).astype(np.int64)
        end = np.maximum(np.rint(sounds["end"] / FRAME_MS).astype(np.int64), start + 1)
        is_drum = sounds["instrument"] == len(INSTRUMENTS)
        n_frames = np.where(is_drum, 1, end - start)
        note = np.repeat(np.arange(len(sounds)), n_frames)
        within = np.arange(len(note)) - np.repeat(np.cumsum(n_frames) - n_frames, n_frames)
        frame = start[note] + within
        key = sounds["instrument"].astype(np.int64) * 128 + 127 - sounds["pitch"]
        cell = frame * _N_KEYS + key[note]
        # Of what falls into one cell a beginning counts more than a held note, and the last most.
        order = np.lexsort((note, within == 0, cell))
        last = np.append(cell[order][1:] != cell[order][:-1], True)
        chosen = order[last]
        note, within, frame = note[chosen], within[chosen], frame[chosen]
        begins, held = self.key_ids(sounds)
        body = np.full(len(note) + int(frame[-1]) + 1, self.frame_id)
        body[np.arange(len(note)) + frame] = np.where(within == 0, begins[note], held[note])
        ending = [self.eos_id] if add_eos else []
        return np.concatenate([[self.bos_id], body, ending]).astype(np.uint16)

    def _onsets_ms(self, ids: np.ndarray) -> np.ndarray:
        """See `KeyTokenizer._onsets_ms`."""
        return np.cumsum(ids == self.frame_id) * FRAME_MS

    def decode(self, ids: np.ndarray) -> Performance:
        """See `Tokenizer.decode`; a held key that did not sound in the frame before is silent."""
        ids = self.check_ids(ids)
        frames = self._onsets_ms(ids) // FRAME_MS
        at = np.flatnonzero(ids >= self.first_note_id)
        sounds, frame = self._sound[ids[at]], frames[at]
        begins = self.pitch[ids[at]] >= 0
        key = sounds["instrument"].astype(np.int64) * 128 + sounds["pitch"]
        order = np.lexsort((np.arange(len(at)), frame, key))
        sounds, frame, begins, key = sounds[order], frame[order], begins[order], key[order]
        follows = np.zeros(len(at), bool)
        follows[1:] = (key[1:] == key[:-1]) & (frame[1:] == frame[:-1] + 1)
        first = np.flatnonzero(begins | ~follows)
        last = np.append(first[1:], len(at)) - 1
        sounds["start"] = frame * FRAME_MS
        out = sounds[first]
        if len(first):
            out["end"] = (frame[last] + 1) * FRAME_MS
        return performance_of(out[begins[first]])

    def grammar(self) -> Automaton:
        """<S> (key* <F>)* [<E>]."""
        class_of, bos, eos = self.token_classes()
        following = np.full((4, len(Kind) + 2), -1, np.int32)
        keys = [Kind.NOTE, Kind.HELD, Kind.DRUM]
        following[0, bos] = 1
        following[1, [*keys, Kind.TIME, eos]] = 2, 2, 2, 1, 3
        following[2, [*keys, Kind.TIME]] = 2, 2, 2, 1
        return Automaton(class_of, following)
