"""Performances without what a corpus does not want: instruments, pedal presses without effect."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.midi import DRUM_CHANNEL, PEDAL_DOWN, Performance, resolve_overlaps
from data_pipeline.vocabulary import FAMILIES, IGNORED


@dataclass(frozen=True)
class Cleaning:
    """What is done to every performance before it is filtered and tokenised; by default nothing.

    The tokenizer leaves instruments out that it has no tokens for, whatever is set here.

    Attributes:
        solo_piano: drop the channels that ever play anything but a piano, and the drums.
        remove_instruments: families whose channels are dropped.
        remove_redundant_pedals: drop pedal events without effect on any note.
        resolve_overlaps: end a note where the next of its pitch and channel begins.
    """

    solo_piano: bool = False
    remove_instruments: tuple[str, ...] = ()
    remove_redundant_pedals: bool = False
    resolve_overlaps: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.remove_instruments) - set(FAMILIES))
        if unknown:
            raise UserError(f"no instrument {', '.join(unknown)}; there are {', '.join(FAMILIES)}")

    def clean(self, performance: Performance) -> Performance:
        """The performance without what is not wanted."""
        if self.solo_piano:
            performance = keep_piano(performance)
        if self.remove_instruments:
            performance = remove_instruments(performance, self.remove_instruments)
        if self.resolve_overlaps:
            performance = resolve_overlaps(performance)
        if self.remove_redundant_pedals:
            performance = remove_redundant_pedals(performance)
        return performance


def remove_instruments(
    performance: Performance, families: Collection[str] = IGNORED
) -> Performance:
    """Without the channels that ever play one of `families`; drums stay (reference:
    remove_instruments).
    """
    named = np.array([family in families for family in FAMILIES])
    programs = performance.programs
    channels = set(programs["channel"][named[programs["program"] // 8]].tolist())
    return _without_channels(performance, channels - {DRUM_CHANNEL})


def keep_piano(performance: Performance) -> Performance:
    """Without the channels that ever play anything but a piano, and without drums."""
    programs = performance.programs
    channels = set(
        programs["channel"][programs["program"] // 8 != FAMILIES.index("piano")].tolist()
    )
    return _without_channels(performance, channels | {DRUM_CHANNEL})


def _without_channels(performance: Performance, channels: Collection[int]) -> Performance:
    def kept(rows: np.ndarray) -> np.ndarray:
        return rows[~np.isin(rows["channel"], list(channels))]

    if not channels:
        return performance
    return replace(
        performance,
        notes=kept(performance.notes),
        pedals=kept(performance.pedals),
        programs=kept(performance.programs),
    )


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
