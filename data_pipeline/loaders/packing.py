"""Best-fit packing: which pieces, or parts of long ones, share a row."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackingPlan:
    """Parts of pieces in the order of the rows they go to.

    Attributes:
        piece: piece of each part, int64 [P].
        start: first token of the part in its piece, int64 [P].
        length: tokens of the part, int64 [P].
        first: parts first[r]:first[r + 1] make row r, int64 [R + 1].
    """

    piece: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> PackingPlan:
    """Packs pieces of `lengths` (int [N]) into rows of `seq_len` tokens.

    A piece longer than a row is split into full rows and a remainder. Remainders and short pieces,
    longest first, each go to the row with the least space that still holds them (Ding et al.,
    "Fewer Truncations Improve Language Modeling", 2024).
    """
    n_parts = -(-lengths // seq_len)
    piece = np.repeat(np.arange(len(lengths)), n_parts)
    within = np.arange(len(piece)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    start = within * seq_len
    length = np.minimum(lengths[piece] - start, seq_len)
    row = _best_fit_rows(length, seq_len)
    order = np.lexsort((np.arange(len(row)), row))
    n_rows = int(row.max()) + 1 if len(row) else 0
    first = np.searchsorted(row[order], np.arange(n_rows + 1))
    return PackingPlan(piece[order], start[order], length[order], first)


def _best_fit_rows(length: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each part, int64 [P]."""
    row = np.empty(len(length), dtype=np.int64)
    rows_with_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    # Bit s is set while some row has exactly s tokens of space: the tightest fit is one shift away.
    spaces, n_rows = 0, 0
    for part in np.argsort(-length, kind="stable").tolist():
        needed = int(length[part])
        fitting = spaces >> needed
        if fitting:
            space = needed + (fitting & -fitting).bit_length() - 1
            chosen = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = seq_len, n_rows
            n_rows += 1
        row[part] = chosen
        if left := space - needed:
            rows_with_space[left].append(chosen)
            spaces |= 1 << left
    return row
