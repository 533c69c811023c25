"""Batches of slices: with a class each, or in pairs.

Labelled slices are random ones to learn from and all of a piece's to judge it by. Two slices of one
performance are what contrastive learning calls a positive pair.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError, did_you_mean
from data_pipeline.loaders import Batch, BatchStream, element_rng
from data_pipeline.shards import TokenShards
from data_pipeline.slices import Pieces, Slicer, check_slice_notes, random_slice

# Numbers of the streams of random numbers, one for each use.
_PAIR_ORDER, _PAIR_SLICES, _PAIR_VIEW = range(10, 13)
_ORDER, _SLICE, _AUGMENT = range(20, 23)


Numbering = tuple[Sequence[str], int]
"""Compositions by name, each numbered by its place, and the first number of unnamed ones."""


def composition_numbers(data_dirs: Sequence[str | Path], split: str) -> list[Numbering]:
    """For `contrastive_pairs` of each corpus of a mixture: the same work has the same number in
    all, and a piece of an unknown work one of its own.
    """
    shards = [TokenShards(data_dir, split) for data_dir in data_dirs]
    names = sorted({name for each in shards for name in each.label_codes("composition")[1]})
    first = len(names) + np.cumsum([0, *(len(each) for each in shards)])
    return [(names, int(number)) for number in first[:-1]]


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


def contrastive_pairs(
    data_dir: str | Path,
    *,
    split: str,
    seq_len: int,
    global_batch: int,
    seed: int,
    augment: AugmentConfig | None = None,
    min_slice_notes: int = 100,
    max_slice_notes: int = 650,
    consecutive: bool = False,
    composer_group: int = 1,
    compositions: Numbering | None = None,
    workers: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
) -> BatchStream:
    """Pairs of slices, each augmented on its own (reference: ContrastiveDataset).

    Every piece is drawn once an epoch; its slices differ from epoch to epoch.

    Args:
        consecutive: the second slice begins where the first one ends.
        composer_group: place up to that many pieces of one composer next to each other, as hard
            negatives of the same batch; 1 mixes everything.
        compositions: numbers of the works, where those of another corpus stand beside them.

    Yields:
        tokens int32 [B, 2, L]; eos int32 [B, 2], position of `<E>`; composition int32 [B]: equal
        where the pieces are of one composition, -1 in padding rows (finite streams only).

    Raises:
        UserError: unusable data or arguments.
    """
    check_slice_notes(min_slice_notes, max_slice_notes)
    if composer_group < 1:
        raise UserError(f"composer_group={composer_group} must be at least 1")
    if seq_len < 4:
        raise UserError(f"seq_len={seq_len} must be at least 4")
    examples = PairExamples(
        Slicer(Pieces(data_dir, split), seq_len, augment),
        seed,
        (min_slice_notes, max_slice_notes),
        consecutive,
        composer_group,
        shuffle,
        compositions,
    )
    return BatchStream(examples, global_batch, epochs, workers)


class PairExamples:
    """See `contrastive_pairs`."""

    def __init__(
        self,
        slicer: Slicer,
        seed: int,
        slice_notes: tuple[int, int],
        consecutive: bool,
        composer_group: int,
        shuffle: bool,
        compositions: Numbering | None = None,
    ):
        self._slicer, self._seed, self._slice_notes = slicer, seed, slice_notes
        self._consecutive, self._composer_group = consecutive, composer_group
        self._shuffle = shuffle
        shards = slicer.pieces.shards
        self.n_examples = len(shards)
        self._composer = shards.label_codes("composer")[0]
        codes, values = shards.label_codes("composition")
        names, first = (values, len(values)) if compositions is None else compositions
        place = {name: number for number, name in enumerate(names)}
        codes = np.array([*(place[value] for value in values), -1])[codes]
        own = first + np.arange(len(shards))  # a piece of unknown composition is its own
        self._composition = np.where(codes >= 0, codes, own).astype(np.int32)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """See `contrastive_pairs`."""
        n, pad = len(indices), self._slicer.pieces.tokenizer.pad_id
        tokens = np.full((n, 2, self._slicer.seq_len), pad, dtype=np.int32)
        eos = np.zeros((n, 2), dtype=np.int32)
        composition = np.full(n, -1, dtype=np.int32)
        for row, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            if index < 0:
                continue
            piece = int(self._order(epoch)[index])
            composition[row] = self._composition[piece]
            rng = element_rng(self._seed, _PAIR_SLICES, epoch, index)
            slices = self._draw(self._slicer.pieces.n_notes(piece), rng)
            for view, (start, stop) in enumerate(slices):
                rng = element_rng(self._seed, _PAIR_VIEW + view, epoch, index)
                eos[row, view] = self._slicer.write(tokens[row, view], piece, start, stop, rng)
        return {"tokens": tokens, "eos": eos, "composition": composition}

    def _draw(self, n_notes: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Start and stop of the two slices."""
        if not self._consecutive:
            return [random_slice(n_notes, *self._slice_notes, rng) for _ in range(2)]
        least, most = self._slice_notes
        first, second = rng.integers(least, most + 1, 2).tolist()
        if first + second > n_notes:  # both shrink alike
            first = max(1, n_notes * first // (first + second))
            second = max(n_notes - first, 0)
        start = int(rng.integers(0, max(n_notes - first - second, 0) + 1))
        middle, end = start + first, start + first + second
        # A single note has no successor: both views are that note.
        return [(start, middle), (middle, end) if end > middle else (start, middle)]

    def _order(self, epoch: int) -> np.ndarray:
        """Pieces in the order of the epoch, int64 [N]."""
        if not self._shuffle:
            epoch = 0
        if (known := self._orders.get(epoch)) is None:
            known = self._new_order(epoch)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = known
        return known

    def _new_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.n_examples)
        rng = element_rng(self._seed, _PAIR_ORDER, epoch)
        order = rng.permutation(self.n_examples)
        if self._composer_group == 1:
            return order
        by_composer = order[np.argsort(self._composer[order], kind="stable")]
        composer = self._composer[by_composer]
        rank = np.arange(len(composer)) - np.searchsorted(composer, composer)
        # Unknown composers (-1) are not each other's hard negatives: groups of one.
        within = np.where(composer < 0, rank, rank // self._composer_group)
        changes = (np.diff(composer) != 0) | (np.diff(within) != 0)
        group = np.concatenate([[0], np.cumsum(changes)])
        place = rng.permutation(int(group[-1]) + 1)
        return by_composer[np.argsort(place[group], kind="stable")]
