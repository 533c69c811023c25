"""How a growing context enters the cache: in chunks, while it is played, and again when it is full.

What is read in which chunks follows from the order of calls alone, never from how much of it was
done when the next call came: so a recording is read again to the last bit.
"""

from dataclasses import dataclass

import numpy as np

from aria_jax.generate.decoding import slide
from aria_jax.generate.live.engine import CHUNKS, Cache, Engine, Row

ROOM = 160
"""While a model plays a second cache is begun when so many slots are left …"""
SWAP = 96
"""… and takes over so many tokens later."""


@dataclass
class _Rebuild:
    """A second cache, of the context without its oldest bars.

    Attributes:
        ids: that it holds when it is full; done: of them read.
        behind: length of the old context that `ids` was made of.
    """

    cache: Cache
    ids: list[int]
    behind: int
    done: int = 0


class Reader:
    """What of a session's context is in the cache of its row, and what is to be read next."""

    def __init__(self, engine: Engine, row: Row) -> None:
        self.engine, self.row = engine, row
        self._plan: list[tuple[int, int, int]] = []  # (start, length, size of chunk)
        self._planned = 0  # ids that are read, or in the plan
        self._rebuild: _Rebuild | None = None

    @property
    def has_work(self) -> bool:
        """Whether something waits to be read."""
        return bool(self._plan)

    def follow(self, n_ids: int, chunk: int = CHUNKS[0]) -> None:
        """The context has grown to `n_ids`, and may go on: whole chunks are to be read."""
        while n_ids - self._planned >= chunk:
            self._read_later(chunk)

    def catch_up(self, n_ids: int) -> None:
        """Everything is to be read: it will be gone on from."""
        while (rest := n_ids - self._planned) > 0:
            self._read_later(min(rest, CHUNKS[-1]))

    def _read_later(self, n: int) -> None:
        size = next(size for size in CHUNKS if n <= size)
        self._plan.append((self._planned, n, size))
        self._planned += n

    def truncate(self, n_ids: int) -> None:
        """The context ends after `n_ids` now."""
        self._rebuild = None
        # A chunk keeps its size, as if it had been read before.
        self._plan = [
            (start, min(length, n_ids - start), size)
            for start, length, size in self._plan
            if start < n_ids
        ]
        self._planned = min(self._planned, n_ids)

    def generated(self, n_ids: int) -> None:
        """The engine wrote the cache up to there itself."""
        self._planned = n_ids

    def read(self, ids: list[int]) -> None:
        """Reads the next chunk."""
        start, length, size = self._plan.pop(0)
        chunk = np.asarray(ids[start : start + length])
        self.row.logits, self.row.cache = self.engine.read(self.row.cache, chunk, start, size)

    # --- a full context ---

    def shortened(self, ids: list[int]) -> list[int]:
        """The context without its oldest bars: half of what the model sees."""
        return slide(self.engine.tokenizer, np.asarray(ids), self.engine.slots // 2).tolist()

    def border(self, n_ids: int) -> int:
        """Tokens that may be generated before `rebuilt` must be asked."""
        at = self.engine.slots - ROOM if self._rebuild is None else self._rebuild.behind + SWAP
        return at - n_ids if at > n_ids else self.engine.slots

    def rebuilt(self, ids: list[int]) -> list[int] | None:
        """Goes on with the second cache, a chunk at a time; to be asked after every generation.

        Returns:
            the context that is gone on with once the second cache takes over, else None.
        """
        if self._rebuild is None:
            if len(ids) >= self.engine.slots - ROOM:
                short = self.shortened(ids)
                self._rebuild = _Rebuild(self.engine.new_cache(), short, len(ids))
            return None
        new, swap = self._rebuild, len(ids) >= self._rebuild.behind + SWAP
        while new.done < len(new.ids):
            chunk = np.asarray(new.ids[new.done : new.done + CHUNKS[-1]])
            _, new.cache = self.engine.read(new.cache, chunk, new.done, CHUNKS[-1])
            new.done += len(chunk)
            if not swap:
                return None
        if not swap:
            return None
        self.row.cache, self._rebuild, self._planned = new.cache, None, new.done
        kept = new.ids + ids[new.behind :]
        self.catch_up(len(kept))
        return kept
