"""Two slices of one performance: what contrastive learning calls a positive pair."""

from pathlib import Path

import numpy as np

from data_pipeline.augment import AugmentConfig
from data_pipeline.errors import UserError
from data_pipeline.loaders.pieces import Pieces, Slicer, check_slice_notes, random_slice
from data_pipeline.loaders.stream import Batch, BatchStream, element_rng

_ORDER, _SLICES, _VIEW = range(10, 13)


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
    ):
        self._slicer, self._seed, self._slice_notes = slicer, seed, slice_notes
        self._consecutive, self._composer_group = consecutive, composer_group
        self._shuffle = shuffle
        shards = slicer.pieces.shards
        self.n_examples = len(shards)
        self._composer = shards.label_codes("composer")[0]
        codes, values = shards.label_codes("composition")
        own = len(values) + np.arange(len(shards))  # a piece of unknown composition is its own
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
            rng = element_rng(self._seed, _SLICES, epoch, index)
            slices = self._draw(self._slicer.pieces.n_notes(piece), rng)
            for view, (start, stop) in enumerate(slices):
                rng = element_rng(self._seed, _VIEW + view, epoch, index)
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
        rng = element_rng(self._seed, _ORDER, epoch)
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
