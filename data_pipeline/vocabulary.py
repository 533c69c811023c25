"""What the tokens of Aria's vocabulary are made of: instruments, labels, and quantised times; and
parts of a vocabulary, as ranges of ids.

Reference: ariautils config.json ("abs") and tokenizer/absolute.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_pipeline.tokenizers.aria import AriaTokenizer

SEGMENT_MS = 5000
STEP_MS = 10
VELOCITY_STEP = 10
DRUM_VELOCITY = 60
LOWEST_DRUM, HIGHEST_DRUM = 35, 81

# General MIDI families of eight programs. The reference maps program 7 // 8 = 0 to piano and so on.
FAMILIES = (
    "piano", "chromatic", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe",
    "synth_lead", "synth_pad", "synth_effect", "ethnic", "percussive", "sfx",
)  # fmt: skip
IGNORED = {"chromatic", "synth_pad", "synth_effect", "ethnic", "percussive", "sfx"}
INSTRUMENTS = tuple(family for family in FAMILIES if family not in IGNORED)
INSTRUMENT_OF_PROGRAM = np.array(
    [INSTRUMENTS.index(f) if f in INSTRUMENTS else -1 for f in FAMILIES for _ in range(8)]
)
"""Index into `INSTRUMENTS` of each General MIDI program, -1 for those without tokens; [128]."""
# The program that an instrument is played with when ids become MIDI again.
PROGRAMS = {"piano": 0, "organ": 16, "guitar": 24, "bass": 32, "strings": 40, "ensemble": 48,
            "brass": 56, "reed": 64, "pipe": 73, "synth_lead": 80}  # fmt: skip
LABELS = {
    "composer": ("bach", "beethoven", "mozart", "chopin", "rachmaninoff", "liszt", "debussy",
                 "schubert", "brahms", "ravel", "satie", "scarlatti"),
    "form": ("sonata", "prelude", "nocturne", "étude", "waltz", "mazurka", "impromptu", "fugue"),
    "genre": ("jazz", "classical"),
}  # fmt: skip
SPECIAL = ("<S>", "<E>", "<P>", "<U>", "<D>", "<T>")


class Kind(IntEnum):
    """What a token says."""

    SPECIAL = 0
    TIME = 1
    PREFIX = 2
    NOTE = 3
    DRUM = 4
    DUR = 5
    ONSET = 6
    PEDAL = 7
    VELOCITY = 8
    NOTE_OFF = 9
    HELD = 10


PARTS = (Kind.ONSET, Kind.DUR, Kind.VELOCITY)
"""What says more of the note, drum hit or pedal event whose first token stands before it."""


def ids_in(ranges: Iterable[str]) -> list[int]:
    """The ids of ranges such as ("0-5", "17"); none where one cannot be read."""
    ids: list[int] = []
    for text in ranges:
        first, _, last = text.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return []
        ids += range(int(first), int(last or first) + 1)
    return ids


def ranges_of(ids: np.ndarray) -> tuple[str, ...]:
    """Ascending ids as ranges; the inverse of `ids_in`."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return tuple(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def reachable_ids(occurring: np.ndarray, tokenizer: "AriaTokenizer") -> np.ndarray:
    """Ids that a corpus can hold, however it is augmented; ascending int64.

    Those that occur, special tokens, every sounding note of the instruments that occur, and every
    onset and duration.

    Args:
        occurring: bool [V], the ids in the corpus as it is.
    """
    kind, instrument = tokenizer.kind, tokenizer.instrument
    played = np.unique(instrument[occurring & np.isin(kind, (Kind.NOTE, Kind.DRUM))])
    notes = np.isin(kind, (Kind.NOTE, Kind.DRUM)) & np.isin(instrument, played)
    notes &= tokenizer.velocity != 0
    always = np.isin(kind, (Kind.SPECIAL, Kind.TIME, Kind.ONSET, Kind.DUR))
    return np.flatnonzero(occurring | notes | always)


@dataclass(frozen=True, eq=False)
class Automaton:
    """Which tokens may follow which, as tables: a finite automaton over classes of tokens.

    Attributes:
        class_of: class of each id, int32 [V].
        following: state after a token of class C in state S, -1 where it may not come; int32
            [S, C]. Reading begins in state 0.
    """

    class_of: np.ndarray
    following: np.ndarray

    def first_error(self, ids: np.ndarray) -> int:
        """Position of the first token that may not stand where it does; -1 for none."""
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[int, int]:
        """`first_error`, and the state behind the tokens before it."""
        state = 0
        for position, one in enumerate(self.class_of[np.asarray(ids, np.int64)].tolist()):
            following = int(self.following[state, one])
            if following < 0:
                return position, state
            state = following
        return -1, state


def event_automaton(tokenizer: "AriaTokenizer") -> Automaton:
    """prefix* <S> (note onset duration | (drum | pedal) onset | <T> | <D>)* [<E>]; what
    `aria_jax.generate.grammar` asks of onsets on top of it is not in the tables.
    """
    before, between, in_note, in_short, in_duration, end = range(6)
    bos, eos, dim = range(len(Kind), len(Kind) + 3)
    class_of = tokenizer.kind.astype(np.int32)
    class_of[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.dim_id]] = bos, eos, dim
    following = np.full((6, len(Kind) + 3), -1, np.int32)
    following[before, [Kind.PREFIX, bos]] = before, between
    following[between, [Kind.TIME, dim, eos]] = between, between, end
    following[between, [Kind.NOTE, Kind.DRUM, Kind.PEDAL]] = in_note, in_short, in_short
    following[in_note, Kind.ONSET], following[in_short, Kind.ONSET] = in_duration, between
    following[in_duration, Kind.DUR] = between
    return Automaton(class_of, following)


def nearest_index(n_values: int, limit: int, step: int) -> np.ndarray:
    """For 0..limit, the index of the closest of 0, step, 2 step, … ; int64 [limit + 1].

    Ties fall as the reference's binary search lets them fall: the value it met first wins.
    """
    numbers = np.arange(limit + 1)
    left, right = np.zeros_like(numbers), np.full_like(numbers, n_values - 1)
    best = np.zeros_like(numbers)
    while np.any(active := left <= right):
        middle = (left + right) // 2
        closer = active & (np.abs(middle * step - numbers) < np.abs(best * step - numbers))
        best = np.where(closer, middle, best)
        below = middle * step < numbers
        left = np.where(active & below, middle + 1, left)
        right = np.where(active & ~below, middle - 1, right)
    return best


# Value -> index of its token within the block of durations, onsets or velocities.
DUR_INDEX = nearest_index(SEGMENT_MS // STEP_MS + 1, SEGMENT_MS, STEP_MS)
ONSET_INDEX = nearest_index(SEGMENT_MS // STEP_MS, SEGMENT_MS - 1, STEP_MS)
VELOCITY_INDEX = nearest_index(13, 127, VELOCITY_STEP)
VELOCITY_INDEX[1:] = np.maximum(VELOCITY_INDEX[1:], 1)  # a played note never becomes silent
