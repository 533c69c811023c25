"""Slices of a piece by notes: the one way that loaders, embed, classify and search take them.

A slice is notes start:stop as a piece of its own: instruments, `<S>`, notes from onset 0, `<E>`.
Only notes that have tokens are counted, so that a MIDI file and its record in token shards have the
same notes, slices and instruments. Onsets can differ by one step of 10 ms: the reference tokenises
slices of the file, whose onsets are rounded from the slice's beginning (aria/embedding.py), while
those in shards are rounded from the piece's.

`Pieces` are those of a split, decoded and kept in memory up to a limit; a `Slicer` writes rows of
their slices.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.midi import Performance
from data_pipeline.settings import AugmentConfig
from data_pipeline.shards import TokenShards, load_manifest
from data_pipeline.tokenizers import Tokenizer


def encode_slices(
    performance: Performance, tokenizer: Tokenizer, slice_notes: int
) -> list[np.ndarray]:
    """Consecutive slices of `slice_notes` notes, the last as long as it comes; uint16 each.

    Args:
        performance: `Tokenizer.with_tokens` of one.
    """
    starts = range(0, len(performance.notes), slice_notes)
    if tokenizer.slices_tokens:  # pedal events belong to the notes around them, not to every slice
        ids = tokenizer.encode(performance)
        at = tokenizer.note_positions(ids)
        return [tokenizer.slice_ids(ids, at, start, start + slice_notes) for start in starts]
    parts = (performance.slice_notes(start, start + slice_notes) for start in starts)
    return [tokenizer.encode(part) for part in parts]


def truncated(ids: np.ndarray, max_tokens: int, eos_id: int) -> np.ndarray:
    """At most `max_tokens` of a slice, `<E>` in the place of the last one."""
    ids = ids[:max_tokens].copy()
    ids[-1] = eos_id
    return ids


CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Piece:
    """ids uint16 [L] (read-only) and, once asked for, the first token of every note, int32 [N]."""

    ids: np.ndarray
    note_at: np.ndarray

    @property
    def n_bytes(self) -> int:
        return self.ids.nbytes + self.note_at.nbytes


class Pieces:
    """Random access to the pieces of a split with a least-recently-used cache; picklable.

    Args:
        data_dir: folder written by `data build`.
        split: "train" or "val".
        cache_bytes: limit of the cache, per process.

    Raises:
        UserError: no shards, no such split, other tokenizer than this program's, empty split.
    """

    def __init__(self, data_dir: str | Path, split: str, cache_bytes: int = CACHE_BYTES):
        preset = load_manifest(data_dir)["tokenizer"]["preset"]
        self.tokenizer = Tokenizer.preset(preset)
        self.shards = TokenShards(data_dir, split, self.tokenizer)
        if not len(self.shards):
            raise UserError(
                f"{data_dir}: split {split!r} is empty; build with another --val-fraction "
                "or from more files"
            )
        self.shards.read_ahead()
        self._cache_bytes = cache_bytes
        self._start_empty()

    def _start_empty(self) -> None:
        self._cached: OrderedDict[int, _Piece] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "preset": self.tokenizer.preset_name,
            "cache_bytes": self._cache_bytes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shards = state["shards"]
        self.tokenizer = Tokenizer.preset(state["preset"])
        self._cache_bytes = state["cache_bytes"]
        self._start_empty()

    def __len__(self) -> int:
        return len(self.shards)

    def ids(self, piece: int) -> np.ndarray:
        """All tokens of a piece, uint16 [L]; do not write to them."""
        return self._get(piece).ids

    def n_notes(self, piece: int) -> int:
        """Notes and drum hits of a piece."""
        return len(self._get(piece).note_at)

    def notes(self, piece: int, start: int, stop: int) -> np.ndarray:
        """Notes `start:stop`, as `Tokenizer.slice_ids` takes them."""
        found = self._get(piece)
        return self.tokenizer.slice_ids(found.ids, found.note_at, start, stop)

    def _get(self, piece: int) -> _Piece:
        with self._lock:
            if (found := self._cached.get(piece)) is not None:
                self._cached.move_to_end(piece)
                return found
        ids = self.shards[piece].ids
        note_at = self.tokenizer.note_positions(ids)
        ids.flags.writeable = note_at.flags.writeable = False
        loaded = _Piece(ids, note_at)
        with self._lock:
            if piece not in self._cached:
                self._cached[piece] = loaded
                self._used_bytes += loaded.n_bytes
            while self._used_bytes > self._cache_bytes and len(self._cached) > 1:
                self._used_bytes -= self._cached.popitem(last=False)[1].n_bytes
        return loaded


def augmented(
    ids: np.ndarray,
    config: AugmentConfig | None,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
) -> np.ndarray:
    """`Tokenizer.augment` of ids; `ids` where `config` is None."""
    return ids if config is None else tokenizer.augment(ids, config, rng)


@dataclass(frozen=True)
class Slicer:
    """Slices as rows for a head that reads at `<E>`.

    Attributes:
        pieces: where from.
        seq_len: tokens of a row.
        config: augmentation, or None.
    """

    pieces: Pieces
    seq_len: int
    config: AugmentConfig | None

    def write(
        self, row: np.ndarray, piece: int, start: int, stop: int, rng: np.random.Generator
    ) -> int:
        """Writes notes `start:stop` into `row` (int [L], full of padding); where its `<E>` is."""
        tokenizer = self.pieces.tokenizer
        ids = augmented(self.pieces.notes(piece, start, stop), self.config, rng, tokenizer)
        ids = truncated(ids, self.seq_len, tokenizer.eos_id)
        row[: len(ids)] = ids
        return len(ids) - 1


def check_slice_notes(min_slice_notes: int, max_slice_notes: int) -> None:
    """Raises `UserError` unless 0 < min_slice_notes <= max_slice_notes."""
    if not 0 < min_slice_notes <= max_slice_notes:
        raise UserError(
            f"min_slice_notes={min_slice_notes} must be positive and at most "
            f"max_slice_notes={max_slice_notes}"
        )


def random_slice(
    n_notes: int, min_slice_notes: int, max_slice_notes: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Start and stop of a random slice, drawn as reference: ContrastiveDataset.get_slice.

    A piece shorter than the least number of notes is taken whole; near the end of a piece the
    slice is as long as the piece allows.
    """
    length = int(rng.integers(min_slice_notes, max_slice_notes + 1))
    last_start = max(n_notes - min_slice_notes, 0)
    start = int(rng.integers(0, last_start + 1))
    return start, min(start + length, n_notes)
