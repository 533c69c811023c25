"""Files cut into slices by other processes while this one computes; order is kept.

Worker processes import this module, so it must not import jax.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from aria_jax.embed.pieces import Piece, Rejection, Source
from data_pipeline.errors import UserError

CHUNK = 8
"""Files of one task: enough to make the hand-over cheap."""

_source: Source | None = None


def cut_in_order(
    source: Source, files: Sequence[int], *, workers: int, ahead: int
) -> Iterator[Piece | Rejection]:
    """Yields `source.cut(i)` of each of `files`, in order.

    Args:
        workers: processes; 0 cuts in this one.
        ahead: files that may be waiting for the consumer; bounds the memory.

    Raises:
        UserError: a worker process was killed.
    """
    if not workers:
        yield from map(source.cut, files)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that runs jax can hang
    chunks = iter([files[at : at + CHUNK] for at in range(0, len(files), CHUNK)])
    with ProcessPoolExecutor(workers, context, _remember, (source,)) as pool:
        waiting: deque = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_cut_chunk, chunk))
                if len(waiting) * CHUNK >= ahead:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); run the same command again to go "
                "on, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _remember(source: Source) -> None:
    global _source
    _source = source


def _cut_chunk(files: Sequence[int]) -> list[Piece | Rejection]:
    if _source is None:
        raise RuntimeError("the worker was not initialised")
    return [_source.cut(i) for i in files]
