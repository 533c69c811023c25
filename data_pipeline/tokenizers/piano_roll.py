"""A piano roll as a sequence in the order of time: the keys of each frame, then a sign for its end.

Source: Feynman Liang, "BachBot", 2016, section 4.1: frames one after the other, in each the notes
from high to low, told apart by whether they begin or are held, then a delimiter. Here a frame is
50 ms instead of a sixteenth, for performances have no beat; a beginning carries its velocity in
steps of 10, and instruments are those of Aria.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from data_pipeline.midi import Performance
from data_pipeline.tokenizers.base import (
    COMMON_SPECIAL,
    N_VELOCITIES,
    KeyTokenizer,
    key_tokens,
    performance_of,
    sounding_notes,
)
from data_pipeline.vocabulary import INSTRUMENTS, Automaton, Kind

FRAME_MS = 50
_N_KEYS = (len(INSTRUMENTS) + 1) * 128


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
        """See `Tokenizer.kind`; a held key says how long its note is."""
        kind = np.full(self.vocab_size, Kind.NOTE, np.uint8)
        kind[: len(COMMON_SPECIAL)] = Kind.SPECIAL
        kind[self.frame_id] = Kind.TIME
        kind[self.first_note_id : self.first_drum_id : N_VELOCITIES] = Kind.DUR
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
        keys = [Kind.NOTE, Kind.DUR, Kind.DRUM]
        following[0, bos] = 1
        following[1, [*keys, Kind.TIME, eos]] = 2, 2, 2, 1, 3
        following[2, [*keys, Kind.TIME]] = 2, 2, 2, 1
        return Automaton(class_of, following)
