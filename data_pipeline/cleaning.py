"""Performances without what a corpus does not want: instruments, pedal presses without effect."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import (
    DRUM_CHANNEL,
    PEDAL_DOWN,
    Performance,
    note_programs,
    resolve_overlaps,
)
from data_pipeline.vocabulary import FAMILIES, HIGHEST_DRUM, IGNORED, LOWEST_DRUM


@dataclass(frozen=True)
class Cleaning:
    """What is done to every performance before it is filtered and tokenised; by default nothing.

    The tokenizer leaves instruments out that it has no tokens for, whatever is set here.

    Attributes:
        solo_piano: drop what anything but a piano plays, and the drums.
        remove_instruments: families whose notes are dropped.
        pedal_threshold, pedal_hysteresis: the pedal goes down at a value of threshold + hysteresis
            and up at threshold - hysteresis; see `threshold_pedal`.
        remove_redundant_pedals: drop pedal events without effect on any note.
        resolve_overlaps: end a note where the next of its pitch and channel begins.
    """

    solo_piano: bool = False
    remove_instruments: tuple[str, ...] = ()
    pedal_threshold: int = PEDAL_DOWN
    pedal_hysteresis: int = 0
    remove_redundant_pedals: bool = False
    resolve_overlaps: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.remove_instruments) - set(FAMILIES))
        if unknown:
            raise UserError(f"no instrument {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
        threshold, hysteresis = self.pedal_threshold, self.pedal_hysteresis
        if not 0 <= hysteresis <= min(threshold, 127 - threshold):
            raise UserError(
                f"pedal threshold {threshold} ± hysteresis {hysteresis} must lie in 0..127"
            )

    def clean(self, performance: Performance) -> Performance:
        """The performance without what is not wanted."""
        if self.solo_piano:
            performance = keep_piano(performance)
        if self.remove_instruments:
            performance = remove_instruments(performance, self.remove_instruments)
        if (self.pedal_threshold, self.pedal_hysteresis) != (PEDAL_DOWN, 0):
            performance = threshold_pedal(performance, self.pedal_threshold, self.pedal_hysteresis)
        if self.resolve_overlaps:
            performance = resolve_overlaps(performance)
        if self.remove_redundant_pedals:
            performance = remove_redundant_pedals(performance)
        return performance


def remove_instruments(
    performance: Performance, families: Collection[str] = IGNORED
) -> Performance:
    """Without what instruments of `families` play; drums stay.

    A channel that changes its program loses the notes under the unwanted ones; in the reference,
    and under `compat`, all of them (remove_instruments).
    """
    return _without(performance, np.array([family in families for family in FAMILIES]))


def keep_piano(performance: Performance) -> Performance:
    """Without what anything but a piano plays, and without drums."""
    return _without(performance, np.array([family != "piano" for family in FAMILIES]), drums=True)


def _without(performance: Performance, unwanted: np.ndarray, drums: bool = False) -> Performance:
    """Without the notes of `unwanted` families, bool [16], and of drums; channels of which nothing
    is left go with all they say.
    """
    notes, programs = performance.notes, performance.programs
    named = unwanted[programs["program"] // 8] & (programs["channel"] != DRUM_CHANNEL)
    if not (drums or named.any() or unwanted[0]):
        return performance
    is_drum = notes["channel"] == DRUM_CHANNEL
    if performance.compat:
        drop = np.isin(notes["channel"], programs["channel"][named])
    else:
        drop = unwanted[note_programs(performance) // 8] & ~is_drum
    drop |= is_drum & drums
    left = np.unique(notes["channel"][~drop])
    gone = {*notes["channel"][drop].tolist(), *programs["channel"][named].tolist()} - {*left}
    gone |= {DRUM_CHANNEL} if drums else set()

    def kept(rows: np.ndarray) -> np.ndarray:
        return ~np.isin(rows["channel"], list(gone))

    return replace(
        performance,
        notes=notes[~drop],
        pedals=performance.pedals[kept(performance.pedals)],
        programs=programs[kept(programs) & ~named],
    )


def supported_notes(performance: Performance) -> Performance:
    """Only the notes that Aria's vocabulary has tokens for: what is counted and sliced.

    Raises:
        InvalidMidi: there are none.
    """
    performance = remove_instruments(performance)
    notes = performance.notes
    pitch_known = (notes["pitch"] >= LOWEST_DRUM) & (notes["pitch"] <= HIGHEST_DRUM)
    known = (notes["channel"] != DRUM_CHANNEL) | pitch_known
    if not known.any():
        raise InvalidMidi("no-notes", "no notes of a supported instrument")
    return performance if known.all() else replace(performance, notes=notes[known])


def threshold_pedal(performance: Performance, threshold: int, hysteresis: int = 0) -> Performance:
    """Continuous pedal values as 127 and 0: down from `threshold + hysteresis` on, up from
    `threshold - hysteresis` on, between them as it was before (reference: apply_pedal_threshold).
    """
    pedals = performance.pedals.copy()
    for channel in np.unique(pedals["channel"]):
        at = np.flatnonzero(pedals["channel"] == channel)
        value = pedals["value"][at].astype(int)
        down = value >= threshold + hysteresis
        decided = down | (value <= threshold - hysteresis)
        latest = np.maximum.accumulate(np.where(decided, np.arange(len(at)), -1))
        pedals["value"][at] = np.where((latest >= 0) & down[latest], 127, 0)
    return replace(performance, pedals=pedals)


def remove_redundant_pedals(performance: Performance) -> Performance:
    """Only the pedal presses during which a note ends, each with its release, those at a note's
    end included; resolving the pedal gives the same notes (reference: remove_redundant_pedals).

    Repeated presses and releases go. A press that is never released holds until the last note, so
    it stays if a note ends under it (in the reference it goes if it is the file's last event).
    """
    notes, pedals = performance.notes, performance.pedals
    keep = np.zeros(len(pedals), bool)
    for channel in np.unique(pedals["channel"]):
        at = np.flatnonzero(pedals["channel"] == channel)
        down = pedals["value"][at] >= PEDAL_DOWN
        at = at[down != np.concatenate([[False], down[:-1]])]  # press, release, press ...
        presses, releases = at[::2], at[1::2]
        ends = np.sort(notes["end"][notes["channel"] == channel])
        released = pedals["tick"][releases]
        if len(presses) > len(releases):
            released = np.append(released, np.iinfo(np.int64).max)
        ended_before = np.searchsorted(ends, pedals["tick"][presses], side="right")
        useful = np.searchsorted(ends, released, side="right") > ended_before
        keep[presses[useful]] = True
        keep[releases[useful[: len(releases)]]] = True
    return replace(performance, pedals=pedals[keep])
