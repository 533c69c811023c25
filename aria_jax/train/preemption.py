"""When to stop early: a signal to this process, or to any process of the run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether to save and leave after this step.

    Alone, a process catches SIGTERM (preemption) and SIGINT (Ctrl-C) itself. One of several may
    not leave before the others: jax's coordination service spreads the notice and answers True at
    the same step everywhere. It catches SIGTERM; the first SIGINT is passed on as one, the second
    ends the process at once.
    """
    several = jax.process_count() > 1
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: False
        return
    if several:
        with _interrupt_as_termination():
            yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: asked.set()) for number in numbers]
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _interrupt_as_termination() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)

    def pass_on(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
