"""The loop of the fingerprint, compiled."""

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def min_hashes(shingles, multipliers, offsets):
    """The least value of each hash function, upper 32 bits of shingle * multiplier + offset.

    Args:
        shingles: uint64 [S >= 1]; multipliers, offsets: uint64 [H].

    Returns:
        uint32 [H].
    """
    out = np.empty(len(multipliers), np.uint32)
    for k in range(len(multipliers)):
        least = np.uint64(0xFFFFFFFFFFFFFFFF)
        for shingle in shingles:
            least = min(least, shingle * multipliers[k] + offsets[k])
        out[k] = least >> np.uint64(32)
    return out
