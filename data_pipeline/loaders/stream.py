"""From "example i of epoch e" to a resumable, sharded, prefetched stream of batches."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np

from data_pipeline.errors import UserError

Batch = dict[str, np.ndarray]

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
        """Examples number `indices` of `epochs`, int64 [B] both; index -1 asks for a filler row."""


@dataclass(frozen=True)
class BatchStream:
    """A host's share of an infinite or finite sequence of global batches.

    Example i of the whole run is row i % global_batch of step i // global_batch; epochs follow
    each other without a gap, so a batch may hold the end of one and the beginning of the next,
    and every example is seen exactly once an epoch. Host h of H takes the h-th of H equal parts
    of each global batch: the global batch is the same for every H that divides `global_batch`
    (another H is an error).

    Attributes:
        examples: what the batches are made of.
        global_batch: rows of a batch over all hosts.
        epochs: None for an endless stream; else the last batch is filled up with filler rows.
        workers: processes that make batches; 0 makes them in a thread of this process.
    """

    examples: Examples
    global_batch: int
    shard_index: int = 0
    shard_count: int = 1
    epochs: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.global_batch % self.shard_count:
            raise UserError(
                f"global_batch={self.global_batch} must be a positive multiple of the number of "
                f"hosts ({self.shard_count})"
            )
        if not 0 <= self.shard_index < self.shard_count:
            raise UserError(f"host {self.shard_index} of {self.shard_count} does not exist")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"epochs={self.epochs} must be at least 1, or None for no end")

    @property
    def batch_size(self) -> int:
        """Rows of this host's part of a batch."""
        return self.global_batch // self.shard_count

    @property
    def n_examples(self) -> int:
        """Examples per epoch, over all hosts."""
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
        """This host's rows of batch `step`."""
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        first = step * self.global_batch + self.shard_index * self.batch_size
        number = np.arange(first, first + self.batch_size, dtype=np.int64)
        epochs, indices = np.divmod(number, self.n_examples)
        if self.epochs is not None:
            indices[epochs >= self.epochs] = -1
        return self.examples.batch(epochs, indices)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, `start_step` + 1, … made ahead of their use."""
        if start_step < 0:
            raise UserError(f"start_step={start_step} must not be negative")
        if start_step >= len(self):
            return
        grain = _import_grain()
        read_ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        batches = grain.MapDataset.source(self)[start_step:].to_iter_dataset(read_ahead)
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


def _mark_flags_as_parsed() -> None:
    """grain's worker processes read absl flags, which only `absl.app.run` parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _import_grain() -> ModuleType:
    """grain, without the jax that it would import for its tree functions if it found it."""
    if "jax" in sys.modules or "grain" in sys.modules:
        import grain

        return grain
    from absl import logging

    verbosity = logging.get_verbosity()
    sys.modules["jax"] = None  # type: ignore[assignment]  # grain then uses its own functions
    try:
        logging.set_verbosity(logging.ERROR)
        import grain
    finally:
        del sys.modules["jax"]
        logging.set_verbosity(verbosity)
    return grain
