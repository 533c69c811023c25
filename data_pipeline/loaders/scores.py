"""Rows of a score and its performance, of which the performance is to be learnt."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError
from data_pipeline.loaders import Batch, BatchStream, element_rng
from data_pipeline.loaders.windows import EpochOrder
from data_pipeline.slices import Pieces, augmented, check_slice_notes, random_slice

# Numbers of the streams of random numbers, one for each use.
_ORDER, _SLICE, _AUGMENT = range(30, 33)


def score_windows(
    data_dir: str | Path,
    *,
    split: str,
    seq_len: int,
    global_batch: int,
    seed: int,
    augment: AugmentConfig | None = None,
    min_slice_notes: int = 100,
    max_slice_notes: int = 650,
    workers: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
) -> BatchStream:
    """Batches that teach to perform scores: in each row some notes of a score, then their
    performance, which alone has a loss.

    An epoch is as many slices of a piece as it takes to see all of it: random ones, or without
    `shuffle` one after the other.

    Yields:
        As `lm_windows`; loss_mask is true where the target stands behind the performance's `<S>`.

    Raises:
        UserError: unusable arguments, or shards of another tokenizer than "render".
    """
    check_slice_notes(min_slice_notes, max_slice_notes)
    pieces = Pieces(data_dir, split)
    if pieces.tokenizer.scheme != "render":
        raise UserError(
            f"{data_dir}: task render takes scores with their performances, built with "
            f"--tokenizer render, and this is {pieces.tokenizer.scheme}"
        )
    notes, order = (min_slice_notes, max_slice_notes), EpochOrder(seed, shuffle)
    examples = ScoreWindows(pieces, seq_len, seed, order, augment, notes)
    return BatchStream(examples, global_batch, epochs, workers)


@dataclass
class ScoreWindows:
    """See `score_windows`."""

    pieces: Pieces
    seq_len: int
    seed: int
    order: EpochOrder
    config: AugmentConfig | None
    slice_notes: tuple[int, int]

    def __post_init__(self) -> None:
        self._ends = np.cumsum(-(-self.pieces.shards.n_notes // self.slice_notes[1]))
        self.n_examples = int(self._ends[-1])

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """See `score_windows`."""
        tokenizer, length = self.pieces.tokenizer, self.seq_len
        tokens = np.full((len(indices), length + 1), tokenizer.pad_id, dtype=np.int32)
        begins = np.full(len(indices), length)
        for row, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            if index < 0:
                continue
            rng = element_rng(self.seed, _AUGMENT, epoch, index)
            ids = augmented(self._slice(epoch, index), self.config, rng, tokenizer)[: length + 1]
            tokens[row, : len(ids)] = ids
            starts = np.flatnonzero(ids == tokenizer.bos_id)
            begins[row] = starts[1] if len(starts) > 1 else length
        inputs, targets = (np.ascontiguousarray(part) for part in (tokens[:, :-1], tokens[:, 1:]))
        positions = np.arange(length, dtype=np.int32)
        return {
            "inputs": inputs,
            "targets": targets,
            "loss_mask": (targets != tokenizer.pad_id) & (positions >= begins[:, None]),
            "segment_ids": (inputs != tokenizer.pad_id).astype(np.int32),
            "positions": np.tile(positions, (len(indices), 1)),
        }

    def _slice(self, epoch: int, index: int) -> np.ndarray:
        index = int(self.order.permutation(_ORDER, epoch, self.n_examples)[index])
        piece = int(np.searchsorted(self._ends, index, side="right"))
        most = self.slice_notes[1]
        start = (index - (int(self._ends[piece - 1]) if piece else 0)) * most
        stop = start + most
        if self.order.shuffle:
            rng = element_rng(self.seed, _SLICE, epoch, index)
            start, stop = random_slice(self.pieces.n_notes(piece), *self.slice_notes, rng)
        return self.pieces.notes(piece, start, stop)
