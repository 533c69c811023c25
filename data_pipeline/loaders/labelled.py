"""Slices with a class: random ones to learn from, all of a piece's to judge it by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError, did_you_mean
from data_pipeline.loaders.pieces import Pieces, Slicer, check_slice_notes, random_slice
from data_pipeline.loaders.stream import Batch, BatchStream, element_rng
from data_pipeline.shards import TokenShards

_ORDER, _SLICE, _AUGMENT = range(20, 23)


def label_values(data_dir: str | Path, label: str) -> tuple[str, ...]:
    """Sorted classes of a label in the training split.

    Raises:
        UserError: no piece has that label.
    """
    shards = TokenShards(data_dir, "train")
    values = shards.label_codes(label)[1]
    if not values:
        known = ", ".join(shards.label_names) or "none at all"
        hint = did_you_mean(label, shards.label_names)
        raise UserError(f"{data_dir}: no piece has a label {label!r}{hint}; there are: {known}")
    return values


def labelled_slices(
    data_dir: str | Path,
    *,
    split: str,
    label: str,
    class_names: Sequence[str],
    seq_len: int,
    global_batch: int,
    seed: int,
    augment: AugmentConfig | None = None,
    min_slice_notes: int = 100,
    max_slice_notes: int = 650,
    slice_notes: int = 300,
    workers: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
) -> BatchStream:
    """Slices of the pieces that have one of the classes (reference: FinetuningDataset).

    With `shuffle` each of these pieces gives one random slice an epoch. Without, an epoch is all
    successive slices of `slice_notes` notes of every piece, in order: the evaluation pass.

    Args:
        class_names: class i is class_names[i]; pieces of another class are left out.

    Yields:
        tokens int32 [B, L]; eos int32 [B], position of `<E>`; label int32 [B]; piece int32 [B],
        number of the piece in its split, -1 in padding rows; n_tokens int32 [B] without padding.

    Raises:
        UserError: unusable arguments, or no piece with one of the classes.
    """
    check_slice_notes(min_slice_notes, max_slice_notes)
    if slice_notes < 1 or seq_len < 4:
        raise UserError(f"slice_notes={slice_notes} must be positive, seq_len={seq_len} above 3")
    slicer = Slicer(Pieces(data_dir, split), seq_len, augment)
    codes, values = slicer.pieces.shards.label_codes(label)
    class_of = {name: i for i, name in enumerate(class_names)}
    classes = np.array([*(class_of.get(value, -1) for value in values), -1])[codes]
    chosen = np.flatnonzero(classes >= 0)
    if not len(chosen):
        raise UserError(
            f"{data_dir}: no piece of split {split!r} has {label!r} in {', '.join(class_names)}"
        )
    examples: RandomSlices | AllSlices
    if shuffle:
        examples = RandomSlices(slicer, seed, chosen, classes, (min_slice_notes, max_slice_notes))
    else:
        examples = AllSlices(slicer, seed, chosen, classes, slice_notes)
    return BatchStream(examples, global_batch, epochs, workers)


class _LabelledSlices(ABC):
    """Makes rows; subclasses say which slice example i of an epoch is."""

    n_examples: int

    def __init__(self, slicer: Slicer, seed: int, classes: np.ndarray):
        self._slicer, self._seed, self._classes = slicer, seed, classes

    @abstractmethod
    def _locate(self, epoch: int, index: int) -> tuple[int, int, int]:
        """Piece, first note and last note + 1 of an example."""

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """See `labelled_slices`."""
        n, pad = len(indices), self._slicer.pieces.tokenizer.pad_id
        tokens = np.full((n, self._slicer.seq_len), pad, dtype=np.int32)
        eos, label = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
        pieces = np.full(n, -1, dtype=np.int32)
        for row, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            if index < 0:
                continue
            piece, start, stop = self._locate(epoch, index)
            rng = element_rng(self._seed, _AUGMENT, epoch, index)
            eos[row] = self._slicer.write(tokens[row], piece, start, stop, rng)
            label[row], pieces[row] = self._classes[piece], piece
        n_tokens = np.where(pieces >= 0, eos + 1, 0).astype(np.int32)
        return {"tokens": tokens, "eos": eos, "label": label, "piece": pieces, "n_tokens": n_tokens}


class RandomSlices(_LabelledSlices):
    """One random slice of each piece an epoch."""

    def __init__(
        self,
        slicer: Slicer,
        seed: int,
        chosen: np.ndarray,
        classes: np.ndarray,
        slice_notes: tuple[int, int],
    ):
        super().__init__(slicer, seed, classes)
        self._chosen, self._slice_notes = chosen, slice_notes
        self.n_examples = len(chosen)
        self._orders: dict[int, np.ndarray] = {}

    def _locate(self, epoch: int, index: int) -> tuple[int, int, int]:
        if epoch not in self._orders:
            order = element_rng(self._seed, _ORDER, epoch).permutation(self._chosen)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        piece = int(self._orders[epoch][index])
        rng = element_rng(self._seed, _SLICE, epoch, index)
        n_notes = self._slicer.pieces.n_notes(piece)
        return (piece, *random_slice(n_notes, *self._slice_notes, rng))


class AllSlices(_LabelledSlices):
    """All successive slices of every piece, the last one as long as it comes."""

    def __init__(
        self,
        slicer: Slicer,
        seed: int,
        chosen: np.ndarray,
        classes: np.ndarray,
        slice_notes: int,
    ):
        super().__init__(slicer, seed, classes)
        self._chosen, self._slice_notes = chosen, slice_notes
        n_slices = -(-slicer.pieces.shards.n_notes[chosen] // slice_notes)
        self._ends = np.cumsum(n_slices)
        self.n_examples = int(self._ends[-1])

    def _locate(self, epoch: int, index: int) -> tuple[int, int, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        start = (index - before) * self._slice_notes
        return int(self._chosen[which]), start, start + self._slice_notes
