"""Work done by other processes in order; Ctrl-C is the parent's business alone.

Worker processes import the module of the function they are given, so that must not import jax.
"""

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from data_pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None


def map_in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    ahead: int,
    chunk: int = 8,
) -> Iterator[Result]:
    """Yields `function(item)` of each of `items`, in order.

    Args:
        function: picklable; sent once to each process, with all that it is bound to.
        workers: processes; 0 works in this one.
        ahead: items that may be waiting for the consumer; bounds the memory.
        chunk: items of one task: enough to make the hand-over cheap.

    Raises:
        UserError: a worker process was killed.
    """
    if not workers:
        yield from map(function, items)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process that runs jax can hang
    pool = ProcessPoolExecutor(workers, context, _remember, (function,))
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for at in range(0, len(items), chunk):
            with _deaf_to_interrupts():
                waiting.append(pool.submit(_do_chunk, items[at : at + chunk]))
            if len(waiting) * chunk >= ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); run the same command again to go "
            "on, with fewer --workers"
        ) from None
    finally:
        # What is begun is not waited for: whoever stops early, stops now.
        own = set(multiprocessing.active_children()) - others if waiting else set()
        for process in own:  # first: one that still starts would complain of a pool that is gone
            process.kill()
        pool.shutdown(wait=not waiting, cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes and threads started inside never see SIGINT, which a terminal sends to all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remember(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _do_chunk(items: Sequence[Any]) -> list[Any]:
    if _function is None:
        raise RuntimeError("the worker was not initialised")
    return [_function(item) for item in items]
