"""MuseNet's scheme: instrument, pitch and velocity of a note in one token, and waits between them.

Source: Christine Payne, "MuseNet", OpenAI 2019: `piano:v72:G1` begins a note, `piano:v0:G1` ends
it, `wait:12` lets time pass. Here a wait is of 10 ms to 1 s, longer ones are several; velocities
are in steps of 10 and instruments those of Aria, so that the schemes differ in nothing else. A drum
hit needs no end. Labels stand before `<S>`; MuseNet's tokens for tempo and instrumentation are left
out.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from data_pipeline.midi import Performance
from data_pipeline.tokenizers.aria import label_tokens
from data_pipeline.tokenizers.base import (
    COMMON_SPECIAL,
    N_VELOCITIES,
    KeyTokenizer,
    key_tokens,
    performance_of,
    sounding_notes,
)
from data_pipeline.vocabulary import INSTRUMENTS, LABELS, STEP_MS, Automaton, Kind

MAX_WAIT_STEPS = 100


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
