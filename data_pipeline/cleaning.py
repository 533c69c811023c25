"""Performances without what a corpus does not want: instruments, pedal presses without effect."""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from data_pipeline.midi import DRUM_CHANNEL, PEDAL_DOWN, Performance
from data_pipeline.vocabulary import FAMILIES, IGNORED


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
