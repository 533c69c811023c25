"""Batches of token shards, as Grain delivers them to a training loop: from "example i of epoch
e" to a resumable, prefetched stream of batches, or of rows of them.

Every loader is a `BatchStream`: batch number `step` is a function of (seed, step) and nothing
else, so resuming is starting at another step, and any rows of it can be had alone: no loader knows
how many hosts, devices or worker processes there are. The loaders: `windows.lm_windows`,
`slice_batches.contrastive_pairs` and `slice_batches.labelled_slices`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.errors import UserError

Batch = dict[str, np.ndarray]

RowRange = tuple[int, int]
"""Rows start … stop - 1 of a batch."""

_ENDLESS = 1 << 40
_PREFETCHED_BATCHES = 2


def element_rng(seed: int, *position: int) -> np.random.Generator:
    """The generator of one element: depends on the seed and the position (epoch, index…) only."""
    return np.random.default_rng((seed, *position))


class Examples(Protocol):
    """Random access to the examples of every epoch; must be picklable."""

    n_examples: int
    """Examples per epoch, the same in every epoch."""

    def batch(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        """Examples `indices` of `epochs`, int64 [B] both; index -1 asks for a padding row."""


@dataclass(frozen=True)
class BatchStream:
    """An infinite or finite sequence of batches, of which any row can be asked for.

    Example i of the whole run is row i % global_batch of step i // global_batch; epochs follow
    each other without a gap, so a batch may hold the end of one and the beginning of the next,
    and every example is seen exactly once an epoch. Rows do not depend on each other: whoever
    needs some rows of a batch asks for those (`aria_jax.sharding.put_rows`).

    Attributes:
        examples: what the batches are made of.
        global_batch: rows of a batch.
        epochs: None for an endless stream; else the last batch is filled up with padding rows.
        workers: processes that make batches; 0 makes them in a thread of this process.
    """

    examples: Examples
    global_batch: int
    epochs: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UserError(f"global_batch={self.global_batch} must be at least 1")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"epochs={self.epochs} must be at least 1, or None for no end")

    @property
    def n_examples(self) -> int:
        """Examples per epoch."""
        return self.examples.n_examples

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every example is seen at least once."""
        return -(-self.n_examples // self.global_batch)

    @property
    def n_steps(self) -> int | None:
        """Number of batches; None if there is no end."""
        if self.epochs is None:
            return None
        return -(-self.n_examples * self.epochs // self.global_batch)

    def __len__(self) -> int:
        return _ENDLESS if self.n_steps is None else self.n_steps

    def __getitem__(self, step: int) -> Batch:
        """All rows of batch `step`."""
        return self.rows(step)

    def rows(self, step: int, *ranges: RowRange) -> Batch:
        """The rows in `ranges` of batch `step`, one range after the other; without any, all rows.

        Raises:
            IndexError: there is no such batch, or no such row in it.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        ranges = ranges or ((0, self.global_batch),)
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.global_batch:
                raise IndexError(f"rows {start}:{stop} of {self.global_batch}")
        row = np.concatenate([np.arange(*each, dtype=np.int64) for each in ranges])
        epochs, indices = np.divmod(step * self.global_batch + row, self.n_examples)
        if self.epochs is not None:
            indices[epochs >= self.epochs] = -1
        return self.examples.batch(epochs, indices)

    def iterate(self, start_step: int = 0, *ranges: RowRange) -> Iterator[Batch]:
        """`rows(step, *ranges)` of steps `start_step`, `start_step` + 1, … made before their use.

        Raises:
            UserError: `start_step` is negative.
        """
        if start_step < 0:
            raise UserError(f"start_step={start_step} must not be negative")
        if start_step >= len(self):
            return
        import grain  # which imports jax, if it is there

        read_ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        source = grain.MapDataset.source(_Rows(self, ranges))
        batches = source[start_step:].to_iter_dataset(read_ahead)
        if self.workers:
            _mark_flags_as_parsed()
            batches = batches.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=self.workers, per_worker_buffer_size=_PREFETCHED_BATCHES
                )
            )
        iterator = iter(batches)
        try:
            yield from iterator
        finally:
            if self.workers:
                iterator.close()


@dataclass(frozen=True)
class _Rows:
    """The same rows of every batch, as a Grain source."""

    stream: BatchStream
    ranges: tuple[RowRange, ...]

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, step: int) -> Batch:
        return self.stream.rows(step, *self.ranges)


def _mark_flags_as_parsed() -> None:
    """grain's worker processes read absl flags, which only `absl.app.run` parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
