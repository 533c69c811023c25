"""Times and pedal of a `Performance`, compiled."""

import numba
import numpy as np

_DEFAULT_TEMPO = 500_000  # microseconds per beat, where a file says nothing

_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def exact_ms(starts, ends, tempo_ticks, tempi, ticks_per_beat):
    """Milliseconds between ticks by the standard, rounded once, half to even.

    Before the first tempo 120 beats per minute hold; of several at one tick the last counts.
    Within one tempo the product is rounded as aria-utils rounds it, so that files of one tempo get
    the same ids in both readings. Across tempi the sums are integers, exact in float64 for longer
    than any file may last.

    Args and returns: see `reference_ms`.
    """
    n_tempi = len(tempo_ticks)
    before = np.empty(n_tempi)  # microseconds x ticks per beat up to each tempo
    total, tick, tempo = 0.0, np.int64(0), np.int64(_DEFAULT_TEMPO)
    for i in range(n_tempi):
        total += np.float64(tempo_ticks[i] - tick) * tempo
        before[i] = total
        tick, tempo = tempo_ticks[i], tempi[i]
    out = np.empty(len(starts), np.int64)
    start_segment = segment = np.int64(-1)
    for i in range(len(starts)):
        start_tick = starts[i]
        start_segment = _segment(start_tick, start_segment, tempo_ticks)
        segment = _segment(ends[i], segment, tempo_ticks)
        if segment == start_segment:
            here = tempi[segment] if segment >= 0 else _DEFAULT_TEMPO
            seconds = (ends[i] - start_tick) * (here * 1e-6 / ticks_per_beat)
            out[i] = np.int64(np.rint(seconds * 1e3))
        else:
            scaled = _scaled(ends[i], segment, before, tempo_ticks, tempi)
            scaled -= _scaled(start_tick, start_segment, before, tempo_ticks, tempi)
            out[i] = np.int64(np.rint(scaled / (ticks_per_beat * 1e3)))
    return out


@_compiled
def _segment(tick, guess, tempo_ticks):
    """Index of the tempo in force at `tick`, -1 before the first; found at once if near `guess`."""
    n_tempi = len(tempo_ticks)
    if (guess < 0 or tempo_ticks[guess] <= tick) and (
        guess + 1 == n_tempi or tick < tempo_ticks[guess + 1]
    ):
        return guess
    return np.int64(np.searchsorted(tempo_ticks, tick, side="right") - 1)


@_compiled
def _scaled(tick, segment, before, tempo_ticks, tempi):
    """Microseconds x ticks per beat from the start of the file to `tick`."""
    if segment < 0:
        return np.float64(tick) * _DEFAULT_TEMPO
    return before[segment] + np.float64(tick - tempo_ticks[segment]) * tempi[segment]


@_compiled
def reference_ms(starts, ends, tempo_ticks, tempi, ticks_per_beat):
    """Milliseconds between ticks as aria-utils counts them (get_duration_ms), half to even.

    The reference sums the tempo segments in floating point beginning one segment early where the
    start lies beyond the last tempo change; ids depend on it, so it is kept.

    Args:
        starts, ends: int64 [N] ticks.
        tempo_ticks, tempi: int64 [M >= 1], sorted by tick; microseconds a beat.

    Returns:
        int64 [N].
    """
    n_tempi = len(tempo_ticks)
    out = np.empty(len(starts), np.int64)
    segment = now = 0
    seconds = 0.0
    for i in range(len(starts)):
        start, end = starts[i], ends[i]
        if i == 0 or start != starts[i - 1] or end < ends[i - 1]:
            segment = min(np.searchsorted(tempo_ticks, start), n_tempi - 1)
            segment = max(segment - 1, 0)
            seconds, now = 0.0, start
        # Else: goes on from where the last sum stood, so that sorted ends cost one pass.
        while segment + 1 < n_tempi and tempo_ticks[segment + 1] <= end:
            following = tempo_ticks[segment + 1]
            seconds += (following - now) * (tempi[segment] * 1e-6 / ticks_per_beat)
            now = following
            segment += 1
        total = seconds
        if segment + 1 < n_tempi or end > tempo_ticks[n_tempi - 1]:
            total += (end - now) * (tempi[segment] * 1e-6 / ticks_per_beat)
        out[i] = np.int64(np.rint(total * 1e3))
    return out


@_compiled
def pedalled_ends(ends, channels, pedal_ticks, pedal_down, pedal_channels, final_tick):
    """Note ends, each moved to the pedal's release where the pedal held the note.

    Args:
        ends: int64 [N] ticks; channels: uint8 [N].
        pedal_ticks: int64 [P] sorted; pedal_down: bool [P]; pedal_channels: uint8 [P].
        final_tick: where a pedal that is never released lets go.

    Returns:
        int64 [N] (reference: _build_pedal_intervals, resolve_pedal).
    """
    out = ends.copy()
    counts = np.zeros(16, np.int64)
    for channel in pedal_channels:
        counts[channel] += 1
    for channel in range(16):
        if counts[channel] == 0:
            continue
        presses = np.empty(counts[channel], np.int64)
        releases = np.empty(counts[channel], np.int64)
        n = 0
        down = False
        for p in range(len(pedal_ticks)):
            if pedal_channels[p] != channel:
                continue
            if pedal_down[p] and not down:
                presses[n] = pedal_ticks[p]
                down = True
            elif not pedal_down[p] and down:
                releases[n] = pedal_ticks[p]
                n += 1
                down = False
        if down:
            releases[n] = final_tick
            n += 1
        for i in range(len(ends)):
            if channels[i] == channel:
                # Intervals are disjoint: only the last one pressed before the end can hold it.
                at = np.searchsorted(presses[:n], ends[i]) - 1
                if at >= 0 and ends[i] < releases[at]:
                    out[i] = releases[at]
    return out
