"""What the tokens of Aria's vocabulary are made of: instruments, labels, and quantised times; and
parts of a vocabulary, as ranges of ids.

Reference: ariautils config.json ("abs") and tokenizer/absolute.py.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

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


def reachable_ids(occurring: np.ndarray, tokenizer: "Tokenizer") -> np.ndarray:
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
