"""Windows of fixed length for next-token prediction: pieces one after the other, or packed."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError
from data_pipeline.loaders import Batch, BatchStream, element_rng
from data_pipeline.slices import Pieces, augmented
from data_pipeline.tokenizers import Tokenizer

MIN_TOKENS_FOR_DIM = 160
"""Shorter pieces get no `<D>` (reference: 150 tokens without prefix, `<S>` and `<E>`)."""

# Names of the independent streams of random numbers drawn from one seed.
_PIECE_ORDER, _WINDOW_ORDER, _AUGMENT, _DIM = range(4)


def lm_windows(
    data_dir: str | Path,
    *,
    split: str,
    seq_len: int,
    global_batch: int,
    seed: int,
    augment: AugmentConfig | None = None,
    packing: str = "concat",
    workers: int = 0,
    add_dim: bool = False,
    max_piece_tokens: int | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
) -> BatchStream:
    """Batches for next-token prediction (reference: aria/datasets.py PretrainingDataset).

    "concat" joins the pieces, in another order every epoch, and splits the stream every `seq_len`
    tokens; the windows are then shuffled. A window's last target is the first token of the next
    window, so that every token but the first of the epoch is predicted once. "best-fit" splits
    only pieces longer than a window and packs the parts into rows so that attention need not
    cross pieces.

    Args:
        add_dim: put `<D>` about 100 tokens before the end of each piece, another place every
            epoch (task `continue`).
        max_piece_tokens: longer pieces, without `<D>`, are left out.
        shuffle: False keeps the order of the shards.
        epochs: None for no end.

    Yields:
        inputs, targets int32 [B, L]; loss_mask bool [B, L]; segment_ids int32 [B, L], 0 for
        padding, else 1, 2, … within the row; positions int32 [B, L], from 0 in each segment.

    Raises:
        UserError: unusable data or arguments.
    """
    if packing not in _PACKINGS:
        raise UserError(f"packing={packing!r} is none of {', '.join(_PACKINGS)}")
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} must be at least 2")
    corpus = _Corpus(Pieces(data_dir, split), seed, add_dim, max_piece_tokens)
    if not len(corpus.kept):
        raise UserError(
            f"{data_dir}: no piece of split {split!r} has {max_piece_tokens} tokens or fewer; "
            "raise data.max_piece_tokens (none keeps all)"
        )
    examples = _PACKINGS[packing](corpus, seq_len, seed, shuffle, augment)
    return BatchStream(examples, global_batch, epochs, workers)


@dataclass(frozen=True)
class _Corpus:
    """Pieces as the windows see them: those short enough, with `<D>` if wanted."""

    pieces: Pieces
    seed: int
    add_dim: bool
    max_piece_tokens: int | None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pieces.tokenizer

    @cached_property
    def kept(self) -> np.ndarray:
        """Numbers of the pieces that are used, int64 [N]."""
        lengths = self.pieces.shards.lengths
        limit = self.max_piece_tokens
        return np.arange(len(lengths)) if limit is None else np.flatnonzero(lengths <= limit)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, `<D>` included, int64 [N]."""
        lengths = self.pieces.shards.lengths[self.kept]
        return lengths + (lengths > MIN_TOKENS_FOR_DIM) if self.add_dim else lengths

    def ids(self, piece: int, epoch: int) -> np.ndarray:
        piece = int(self.kept[piece])
        ids = self.pieces.ids(piece)
        if not self.add_dim or len(ids) <= MIN_TOKENS_FOR_DIM:
            return ids
        return self.tokenizer.with_dim(ids, element_rng(self.seed, _DIM, epoch, piece))


@dataclass(frozen=True)
class EpochOrder:
    """The order of an epoch's pieces and windows; the last few epochs are remembered."""

    seed: int
    shuffle: bool
    _known: OrderedDict = field(default_factory=OrderedDict)

    def permutation(self, stream: int, epoch: int, n: int) -> np.ndarray:
        """int64 [n], a function of (seed, stream, epoch)."""
        if not self.shuffle:
            epoch = 0
        key = (stream, epoch, n)
        if (known := self._known.get(key)) is None:
            rng = element_rng(self.seed, stream, epoch)
            known = rng.permutation(n) if self.shuffle else np.arange(n)
            self._known[key] = known
            while len(self._known) > 4:
                self._known.popitem(last=False)
        return known

    def __getstate__(self) -> dict:
        return {"seed": self.seed, "shuffle": self.shuffle, "_known": OrderedDict()}


class _Windows:
    """What both ways of filling a window are given."""

    def __init__(
        self,
        corpus: _Corpus,
        seq_len: int,
        seed: int,
        shuffle: bool,
        augment: AugmentConfig | None,
    ):
        self._corpus, self._seq_len, self._seed = corpus, seq_len, seed
        self._order, self._config = EpochOrder(seed, shuffle), augment


class ConcatWindows(_Windows):
    """The pieces of an epoch as one stream, split every `seq_len` tokens."""

    def __init__(self, corpus: _Corpus, seq_len: int, *others: Any):
        super().__init__(corpus, seq_len, *others)
        self._n_tokens = int(corpus.lengths.sum())
        self.n_examples = max(1, -(-(self._n_tokens - 1) // seq_len))
        self._offsets: dict[int, np.ndarray] = {}

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """See `lm_windows`."""
        tokenizer = self._corpus.tokenizer
        tokens = np.full((len(indices), self._seq_len + 1), tokenizer.pad_id, dtype=np.int32)
        for row, epoch, index in zip(tokens, epochs.tolist(), indices.tolist(), strict=True):
            if index < 0:
                continue
            windows = self._order.permutation(_WINDOW_ORDER, epoch, self.n_examples)
            ids = self._window(epoch, int(windows[index]))
            rng = element_rng(self._seed, _AUGMENT, epoch, index)
            ids = augmented(ids, self._config, rng, tokenizer)[: self._seq_len + 1]
            row[: len(ids)] = ids
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = np.arange(self._seq_len, dtype=np.int32)
        return {
            "inputs": np.ascontiguousarray(inputs),
            "targets": np.ascontiguousarray(targets),
            "loss_mask": targets != tokenizer.pad_id,
            "segment_ids": (inputs != tokenizer.pad_id).astype(np.int32),
            "positions": np.tile(positions, (len(indices), 1)),
        }

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Tokens of a window and the one after it, uint16."""
        lengths = self._corpus.lengths
        pieces = self._order.permutation(_PIECE_ORDER, epoch, len(lengths))
        ends = self._ends(epoch, pieces)
        start = window * self._seq_len
        stop = min(start + self._seq_len + 1, self._n_tokens)
        parts = []
        number = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            piece = int(pieces[number])
            begin = int(ends[number]) - int(lengths[piece])
            part = self._corpus.ids(piece, epoch)[start - begin : stop - begin]
            parts.append(part)
            start += len(part)
            number += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ends(self, epoch: int, pieces: np.ndarray) -> np.ndarray:
        """Where in the epoch's stream each of its pieces ends, int64 [N]."""
        if (known := self._offsets.get(epoch)) is None:
            known = np.cumsum(self._corpus.lengths[pieces])
            # Two epochs: a batch may hold the end of one and the beginning of the next.
            self._offsets = {e: o for e, o in self._offsets.items() if e == epoch - 1}
            self._offsets[epoch] = known
        return known


class PackedWindows(_Windows):
    """Rows of whole pieces, or of parts of pieces that are longer than a row."""

    def __init__(self, corpus: _Corpus, seq_len: int, *others: Any):
        super().__init__(corpus, seq_len, *others)
        self._plan = pack_best_fit(corpus.lengths, seq_len)
        self.n_examples = len(self._plan.first) - 1

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """See `lm_windows`."""
        pad = self._corpus.tokenizer.pad_id
        shape = (len(indices), self._seq_len)
        batch = {
            "inputs": np.full(shape, pad, dtype=np.int32),
            "targets": np.full(shape, pad, dtype=np.int32),
            "loss_mask": np.zeros(shape, dtype=bool),
            "segment_ids": np.zeros(shape, dtype=np.int32),
            "positions": np.zeros(shape, dtype=np.int32),
        }
        for row, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            if index >= 0:
                rows = self._order.permutation(_WINDOW_ORDER, epoch, self.n_examples)
                self._fill({k: v[row] for k, v in batch.items()}, epoch, int(rows[index]))
        return batch

    def _fill(self, row: Batch, epoch: int, number: int) -> None:
        plan, at = self._plan, 0
        for part in range(int(plan.first[number]), int(plan.first[number + 1])):
            start, length = int(plan.start[part]), int(plan.length[part])
            ids = self._corpus.ids(int(plan.piece[part]), epoch)
            # One token more where the piece goes on in another row: it is this part's last target.
            ids = ids[start : start + length + 1]
            rng = element_rng(self._seed, _AUGMENT, epoch, part)
            ids = augmented(ids, self._config, rng, self._corpus.tokenizer)
            inputs, targets = ids[:length], ids[1 : length + 1]
            row["inputs"][at : at + len(inputs)] = inputs
            row["targets"][at : at + len(targets)] = targets
            row["loss_mask"][at : at + len(targets)] = True
            row["segment_ids"][at : at + len(inputs)] = part - int(plan.first[number]) + 1
            row["positions"][at : at + len(inputs)] = np.arange(len(inputs))
            at += len(inputs)


_PACKINGS: dict[str, type[ConcatWindows] | type[PackedWindows]] = {
    "concat": ConcatWindows,
    "best-fit": PackedWindows,
}


# --- best-fit packing -----------------------------------------------------------------------------


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
