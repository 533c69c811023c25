"""The loop of the filters that look through a sliding window, compiled."""

import numba
import numpy as np

_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def window_counts(times_s, pitches, starts_s, window_s):
    """Notes that begin in each window, both ends included.

    Args:
        times_s: float64 [N], sorted; pitches: uint8 [N].
        starts_s: float64 [K], sorted; window_s: length.

    Returns:
        Notes of each window, int64 [K]; different pitches of each, int64 [K]; the most notes of
        one pitch in any window.
    """
    n_notes = np.zeros(len(starts_s), np.int64)
    n_pitches = np.zeros(len(starts_s), np.int64)
    counts = np.zeros(128, np.int64)
    first = last = unique = most_of_one = 0
    for k in range(len(starts_s)):
        # Out before in: then no count ever exceeds what it is once the window is complete.
        while first < last and times_s[first] < starts_s[k]:
            counts[pitches[first]] -= 1
            unique -= counts[pitches[first]] == 0
            first += 1
        while last < len(times_s) and times_s[last] <= starts_s[k] + window_s:
            if times_s[last] >= starts_s[k]:
                unique += counts[pitches[last]] == 0
                counts[pitches[last]] += 1
                most_of_one = max(most_of_one, counts[pitches[last]])
            else:
                first = last + 1
            last += 1
        n_notes[k], n_pitches[k] = last - first, unique
    return n_notes, n_pitches, most_of_one
