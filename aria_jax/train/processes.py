"""The processes of one run: how they join, stop together, and find that one is gone."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from data_pipeline.errors import UserError

# What a launcher sets for each process; see launch/local.py and launch/cluster.py.
COORDINATOR, COUNT, INDEX = (
    "ARIA_JAX_COORDINATOR",
    "ARIA_JAX_PROCESS_COUNT",
    "ARIA_JAX_PROCESS_INDEX",
)
AUTO = "auto"
"""As coordinator: jax asks the cluster (Cloud TPU, GKE, SLURM, Open MPI) who the others are."""

HEARTBEAT_TIMEOUT_S = 60
"""A process that is silent for so long is dead, and the others end with an error."""
SHUTDOWN_TIMEOUT_S = 60
"""How long a process that is done waits for the others to be done."""
_STATUS = re.compile(
    r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)


def join_processes(shutdown_timeout_s: int = SHUTDOWN_TIMEOUT_S) -> int:
    """Connects this process to the others where the environment names a coordinator.

    Args:
        shutdown_timeout_s: how long it waits at its end for the others to be done.

    Returns:
        The index of this process among them; 0 where it is alone.

    Raises:
        UserError: only some of the three variables are set, or not to numbers.
    """
    if os.environ.get(COORDINATOR) == AUTO:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=shutdown_timeout_s,
        )
        return jax.process_index()
    values = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    if not any(values.values()):
        return 0
    if not all(values.values()):
        missing = ", ".join(name for name, value in values.items() if not value)
        raise UserError(f"a run of several processes needs {missing} too")
    try:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except ValueError:
        raise UserError(f"{COUNT} and {INDEX} must be numbers") from None
    jax.distributed.initialize(
        os.environ[COORDINATOR],
        count,
        index,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=shutdown_timeout_s,
    )
    return index


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether to save and leave after this step.

    Alone, a process catches SIGTERM (preemption) and SIGINT (Ctrl-C) itself. One of several may
    not leave before the others: jax's coordination service spreads the notice and gives True at
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


def lost_contact(error: BaseException) -> str | None:
    """One sentence where `error` is how this process learns that another is gone; else None.

    Collectives and barriers then fail with a status of the transport (gloo, NCCL, gRPC), which
    jax raises as JaxRuntimeError or ValueError.
    """
    reason = str(error).strip().partition("\n")[0]
    transport = isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
    if jax.process_count() == 1 or not transport or not _STATUS.match(reason):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost contact with another, which "
        f"was killed, preempted or failed ({reason[:160]}); "
        "start all of them again to go on from the last checkpoint"
    )


def leave_at_once(status: int) -> NoReturn:
    """Ends this process without the farewell that would wait for processes that are gone."""
    os._exit(status)
