"""Which pieces are the same performance, and which to keep.

Three tools, for a build that first looks at every file and then decides:

1. `content_hash`: equal for exact copies, whatever their ticks, tempo map, tracks or text.
2. `fingerprint` + `near_duplicates`: the same performance transposed, time-stretched, re-exported
   or trimmed. Two performers of one composition are not duplicates: their timing differs.
3. `cap_per_group`: at most N performances of one composition (paper, section on the dataset).

A fingerprint is a MinHash of shingles. A shingle is eight successive notes as a set of pitches
above the lowest (blind to transposition and to the order of notes that sound together), and two
ratios of time spans (8 notes against the next 8; 16 against the next 16) on a logarithmic scale
in steps of 1/8 octave (blind to a change of tempo, but not to another performer's rubato). The
share of equal MinHash values estimates the Jaccard similarity of the shingle sets, which for a
trimmed copy is the share of the music that is left.

Nothing here depends on the order of the files: the piece with most notes is kept, among equals
the one with the smallest content hash.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.midi import DRUM_CHANNEL, PEDAL_DOWN, Performance, note_programs, programs_at

BANDS = 48
ROWS_PER_BAND = 2
N_HASHES = BANDS * ROWS_PER_BAND
MIN_SIMILARITY = 0.3
"""Estimated Jaccard similarity from which two pieces count as the same performance.

On ASAP two performers of one movement reach 0.27 at most; copies that were quantised to Aria's
10 ms steps, trimmed, stretched and transposed all at once have 0.5 (median), 0.3 for the first
percentile. `python -m benchmarks.bench_dedup` measures it.
"""

_WINDOW = 8
_SPAN = 4 * _WINDOW
MIN_NOTES = 2 * _SPAN
"""Shorter pieces have no fingerprint: only exact copies of them are found."""
_RATIO_STEPS_PER_OCTAVE = 8
_EMPTY = np.uint32(0xFFFFFFFF)
_PAIRS_AT_ONCE = 1 << 16

_random = np.random.default_rng(20_240_229)  # part of the format: fingerprints may be stored
_MULTIPLIERS = _random.integers(1, 2**63, N_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, N_HASHES, dtype=np.uint64)
_POSITION = _random.integers(1, 2**63, _WINDOW + 2, dtype=np.uint64) | np.uint64(1)
_BAND = _random.integers(1, 2**63, ROWS_PER_BAND, dtype=np.uint64) | np.uint64(1)


def content_hash(performance: Performance) -> str:
    """SHA-256 (hex) of what is played: onset and end in ms, pitch, velocity, program, pedal.

    Independent of ticks per beat, tempo map, track layout, channel numbers, text events and
    leading silence. Reference: MidiDict.calculate_hash, which depends on ticks and channels.
    """
    notes, pedals = performance.notes, performance.pedals
    program = note_programs(performance).astype(np.int64)
    program[notes["channel"] == DRUM_CHANNEL] = 128
    pedal_program = programs_at(performance, pedals["channel"], pedals["tick"]).astype(np.int64)
    pedal_program[pedals["channel"] == DRUM_CHANNEL] = 128
    start, end = performance.ms(notes["start"]), performance.ms(notes["end"])
    first = int(start.min()) if len(start) else 0
    sound = (notes["pitch"].astype(np.int64) << 16) | (program << 8)
    sound |= notes["velocity"]
    played = np.stack([start - first, end - first, sound], axis=1)
    played = played[np.lexsort(played.T[::-1])]
    pedal = np.stack(
        [
            np.asarray(performance.ms(pedals["tick"]), dtype=np.int64) - first,
            pedal_program,
            (pedals["value"] >= PEDAL_DOWN).astype(np.int64),
        ],
        axis=1,
    )
    # Only changes count: pianos send a stream of values, exporters thin it out.
    pedal = pedal[np.lexsort((pedal[:, 0], pedal[:, 1]))]
    state = np.diff(pedal[:, 2] + 2 * pedal[:, 1], prepend=0)
    pedal = pedal[state != 0]
    digest = hashlib.sha256()
    for table in (played, pedal):
        digest.update(len(table).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
    return digest.hexdigest()


def fingerprint(performance: Performance) -> np.ndarray:
    """MinHash of the performance, uint32 [N_HASHES]; drums are ignored.

    Pieces of fewer than `MIN_NOTES` notes get a fingerprint that is like no other.
    """
    from data_pipeline._kernels import min_hashes

    notes = performance.notes[performance.notes["channel"] != DRUM_CHANNEL]
    if len(notes) < MIN_NOTES:
        return np.full(N_HASHES, _EMPTY)
    onset_ms = np.asarray(performance.ms(notes["start"]), dtype=np.int64)
    order = np.lexsort((notes["pitch"], onset_ms))
    shingles = _shingles(notes["pitch"][order], onset_ms[order])
    return min_hashes(shingles, _MULTIPLIERS, _OFFSETS)


def _shingles(pitch: np.ndarray, onset_ms: np.ndarray) -> np.ndarray:
    """Distinct shingle hashes, uint64 [S], of notes sorted by onset."""
    n = len(pitch) - _SPAN
    windows = np.lib.stride_tricks.sliding_window_view(pitch.astype(np.int16), _WINDOW)[:n]
    windows = np.sort(windows, axis=1)
    above = (windows - windows[:, :1]).astype(np.uint64)

    def ratio(width: int) -> np.ndarray:
        before = onset_ms[width : n + width] - onset_ms[:n]
        after = onset_ms[2 * width : n + 2 * width] - onset_ms[width : n + width]
        octaves = np.log2(np.maximum(after, 1) / np.maximum(before, 1))
        return np.round(octaves * _RATIO_STEPS_PER_OCTAVE).astype(np.int64).astype(np.uint64)

    parts = [*above.T, ratio(_WINDOW), ratio(2 * _WINDOW)]
    total = np.zeros(n, dtype=np.uint64)
    for part, factor in zip(parts, _POSITION, strict=True):
        total = (total ^ part) * factor
        total ^= total >> np.uint64(29)
    return np.unique(total)


def near_duplicates(
    fingerprints: np.ndarray,
    n_notes: Sequence[int] | np.ndarray,
    hashes: Sequence[str] | np.ndarray,
    *,
    min_similarity: float = MIN_SIMILARITY,
) -> np.ndarray:
    """For every piece the piece that represents it: itself if it is to be kept; int64 [N].

    Pieces that are similar, directly or through others, form a group; its representative is the
    piece with most notes, then the smallest hash. Memory: O(N) beside the fingerprints.

    Args:
        fingerprints: uint32 [N, N_HASHES], from `fingerprint`.
        n_notes: notes of each piece, [N].
        hashes: `content_hash` of each piece, N; equal hashes are duplicates too.
        min_similarity: estimated share of common shingles that makes a duplicate.

    Raises:
        UserError: `min_similarity` is not between 0 and 1.
    """
    if not 0 < min_similarity <= 1:
        raise UserError(f"min_similarity={min_similarity} must be above 0 and at most 1")
    n = len(fingerprints)
    # Best piece first: then the representative of a group is its smallest number.
    hash_array = np.asarray(hashes)
    order = np.lexsort((hash_array, -np.asarray(n_notes, dtype=np.int64)))
    sorted_prints, sorted_hashes = fingerprints[order], hash_array[order]
    edges = [_equal_neighbours(np.unique(sorted_hashes, return_inverse=True)[1])]
    real = np.flatnonzero((sorted_prints != _EMPTY).any(axis=1))
    for band in range(BANDS):
        rows = sorted_prints[real, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND]
        keys = (rows.astype(np.uint64) * _BAND).sum(axis=1)
        pairs = real[_equal_neighbours(keys)]
        edges.append(_similar(sorted_prints, pairs, min_similarity))
    group = _components(np.concatenate(edges), n)
    first = np.full(n, n, dtype=np.int64)
    np.minimum.at(first, group, np.arange(n))
    representative = np.empty(n, dtype=np.int64)
    representative[order] = order[first[group]]
    return representative


def _equal_neighbours(keys: np.ndarray) -> np.ndarray:
    """Pairs int64 [P, 2] of positions with equal keys: each with the next and with the first.

    Not all pairs: a bucket of a thousand would give half a million, and the bands repeat.
    """
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    first = (
        order[np.repeat(starts, np.diff(np.append(starts, len(order))))] if len(order) else order
    )
    later = np.flatnonzero(same) + 1
    chain = np.stack([order[later - 1], order[later]], axis=1)
    star = np.stack([first[later], order[later]], axis=1)
    return np.concatenate([chain, star])


def _similar(fingerprints: np.ndarray, pairs: np.ndarray, min_similarity: float) -> np.ndarray:
    kept = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        equal = (fingerprints[part[:, 0]] == fingerprints[part[:, 1]]).mean(axis=1)
        kept.append(part[equal >= min_similarity])
    return np.concatenate(kept)


def _components(edges: np.ndarray, n: int) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    weights = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((weights, (edges[:, 0], edges[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def cap_per_group(groups: np.ndarray, hashes: np.ndarray, max_per_group: int) -> np.ndarray:
    """Which pieces to keep so that no group (composition) has more than a number of them.

    Those with the smallest hash stay: a fair sample that does not depend on the order of files.

    Args:
        groups: composition of each piece as a number, int [N]; negative ones are never capped.
        hashes: `content_hash` of each piece, [N].
        max_per_group: at least 1.

    Returns:
        bool [N], True for pieces to keep.

    Raises:
        UserError: `max_per_group` is below 1.
    """
    if max_per_group < 1:
        raise UserError(f"max_per_group={max_per_group} must be at least 1")
    groups = np.asarray(groups)
    order = np.lexsort((np.asarray(hashes), groups))
    ordered = groups[order]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    keep = np.empty(len(ordered), dtype=bool)
    keep[order] = (rank < max_per_group) | (ordered < 0)
    return keep
