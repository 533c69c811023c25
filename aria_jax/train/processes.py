"""The processes of one run: how they join, agree, stop together, and find that one is gone or
stalls.
"""

import faulthandler
import itertools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its store has no public name
from jax.experimental import multihost_utils

from aria_jax.train.goodput import STALLS
from data_pipeline import storage
from data_pipeline.errors import UserError

# What a launcher sets for each process; see launch/local.py and launch/cluster.py.
COORDINATOR, COUNT, INDEX = (
    "ARIA_JAX_COORDINATOR",
    "ARIA_JAX_PROCESS_COUNT",
    "ARIA_JAX_PROCESS_INDEX",
)
AUTO = "auto"
"""As coordinator: jax asks the cluster (Cloud TPU, GKE, SLURM, Open MPI) who the others are."""

LOST_AFTER_S = 60
"""A process that gives no sign of life for so long is gone, and the others end with one line."""
HEARTBEAT_TIMEOUT_S = 2 * LOST_AFTER_S
"""jax's own limit: it aborts the others with a trace of C++, so it comes after ours."""
SHUTDOWN_TIMEOUT_S = 60
"""How long a process that is done waits for the others to be done."""
_ALIVE, _LOST = "aria_jax/alive/", "aria_jax/lost/"
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


def process_0_says(answer: int) -> int:
    """The answer of process 0, which counts; all processes must ask."""
    if jax.process_count() == 1:
        return answer
    return int(multihost_utils.broadcast_one_to_all(np.array(answer)))


class Watchdog:
    """Says that this process has done no step for long, and where it is; a hook.

    It looks from a thread of its own and disturbs no step. What it finds it warns of, and writes
    to WORKDIR/stalls/process-INDEX.jsonl with the stacks of all threads, where `--status` finds it.
    Where the thread cannot look either, since compiled code does not let the interpreter go, a
    timer of the system runs out after twice the time, and faulthandler prints the stack of the main
    thread to stderr from within the signal. (Its own timer reads all threads while they run, which
    can crash a process that does not stall.)

    Args:
        minutes: without a step; None looks at nothing.
        clock: seconds since whenever.
    """

    def __init__(
        self,
        workdir: Path,
        minutes: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        index, count = jax.process_index(), jax.process_count()
        self._file = workdir / STALLS / f"process-{index}.jsonl"
        self._who = f"process {index} of {count} on {socket.gethostname()}"
        self._clock, self._watched = clock, threading.get_ident()
        self._step: int | None = None
        self._since = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if minutes is not None:
            self._limit_s = 60 * minutes
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def on_step(self, step: int, state: Any, metrics: Any) -> None:
        """A step was dispatched."""
        self._step, self._since = step, self._clock()

    def finish(self) -> None:
        """The last checkpoint may still stall."""
        self._since = self._clock()

    def close(self) -> None:
        """Looks no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        told: float | None = None
        tick_s = min(self._limit_s / 10, 5.0)
        faulthandler.register(signal.SIGALRM, file=2, all_threads=False)
        while True:
            signal.setitimer(signal.ITIMER_REAL, 2 * self._limit_s)
            if self._ended.wait(tick_s):
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.unregister(signal.SIGALRM)
                if told is not None:
                    self._write("goes on", f"{self._who} has come to its end")
                return
            since = self._since
            silent_s = self._clock() - since
            if told is None and silent_s >= self._limit_s:
                told = since
                self._tell(silent_s)
            elif told is not None and since != told:
                told = None
                self._write("goes on", f"{self._who} goes on with step {self._step}")

    def _tell(self, silent_s: float) -> None:
        stacks = {
            thread.name: traceback.extract_stack(frame)
            for thread in threading.enumerate()
            if (frame := sys._current_frames().get(thread.ident or 0)) is not None
            and thread is not self._thread
        }
        main = traceback.extract_stack(sys._current_frames()[self._watched])
        behind = "before its first" if self._step is None else f"behind step {self._step}"
        own = [f for f in main[:-1] if {"aria_jax", "data_pipeline"} & {*Path(f.filename).parts}]
        places = [f"{f.name} ({Path(f.filename).name}:{f.lineno})" for f in [*own[-3:], main[-1]]]
        message = (
            f"{self._who} stalls {behind}: no step for {silent_s / 60:.3g} minutes "
            f"(train.stall_minutes); it is in {', called by '.join(reversed(places))}"
        )
        threads = {name: "".join(stack.format()) for name, stack in stacks.items()}
        self._write("stall", message, step=self._step, silent_s=silent_s, threads=threads)
        warnings.warn(f"{message}; all threads: {storage.url(self._file)}", stacklevel=2)

    def _write(self, event: str, message: str, **more: Any) -> None:
        line = {"event": event, "time": time.time(), "message": message, **more}
        with suppress(OSError, UserError):  # a full disk, or a bucket that is gone, may be why
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            storage.upload(self._file)


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
        f"was killed, preempted or failed ({reason[:160]})"
    )


class Peers:
    """Ends the processes of a run with one line each once one of them is gone.

    Whoever waits in a barrier for a process that was killed hears nothing of it, and one that
    waits in a collective only where the transport tells (gloo does, TPUs do not); jax would abort
    them. So each says every second that it lives, in the store of jax's coordinator. Process 0
    counts who does not and tells all, and so does whoever learns of it in another way. If process
    0 itself is gone, its store is too, and jax aborts the others.

    Args:
        leave: called once, with one sentence, when another is gone. Does not return.
        after_s: seconds without a sign of life.
        every_s: seconds between two.
        client: of jax's coordination service; None asks jax, which has none for one that is alone.
        index: of this process; None asks jax.
    """

    def __init__(
        self,
        leave: Callable[[str], None],
        after_s: float = LOST_AFTER_S,
        every_s: float = 1.0,
        *,
        client: Any = None,
        index: int | None = None,
    ):
        self._leave, self._every_s = leave, every_s
        self._limit = math.ceil(after_s / every_s)
        self._client: Any = distributed.global_state.client if client is None else client
        self._index = jax.process_index() if index is None else index
        self._ended, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        if self._client is not None:
            self._thread.start()

    def lost(self, reason: str) -> None:
        """Tells the others, and leaves."""
        if not self._leaving.acquire(blocking=False):
            self._ended.wait()  # the other thread is about to leave
            return
        with suppress(jax.errors.JaxRuntimeError):  # the coordinator is what is gone
            self._client.key_value_set(f"{_LOST}{self._index}", reason)
        if self._index == 0:
            time.sleep(3 * self._every_s)  # the store goes with this process: let them read it
        self._leave(f"{reason}; start all of them again to go on from the last checkpoint")

    def close(self) -> None:
        """Says that this process ends as it should."""
        self._ended.set()
        if self._client is not None:
            self._thread.join()

    def _run(self) -> None:
        own, silent = f"{_ALIVE}{self._index}", dict[str, tuple[str, int]]()
        with suppress(jax.errors.JaxRuntimeError):
            for beat in itertools.count():
                if self._ended.wait(self._every_s):
                    self._client.key_value_delete(own)
                    return
                self._client.key_value_set(own, str(beat), allow_overwrite=True)
                told = self._client.key_value_dir_get(_LOST)
                if (reason := told[0][1] if told else self._silent(silent)) is not None:
                    self.lost(reason)
                    return

    def _silent(self, silent: dict[str, tuple[str, int]]) -> str | None:
        """Who is gone; `silent` holds everyone's last sign and for how many rounds it has stood.

        Rounds and not seconds: after a pause of this process all would seem to be gone.
        """
        if self._index:
            return None
        for who, beat in self._client.key_value_dir_get(_ALIVE):
            before, rounds = silent.get(who, (beat, 0))
            silent[who] = (beat, rounds + 1 if beat == before else 0)
            if silent[who][1] >= self._limit:
                return (
                    f"process {who.removeprefix(_ALIVE)} of {jax.process_count()} has given no "
                    f"sign of life for {self._limit * self._every_s:.0f} s: it was killed, "
                    "preempted or failed"
                )
        return None


@contextmanager
def leaving_together(leave: Callable[[str], None] | None = None, **options: Any) -> Iterator[None]:
    """While it is entered, whoever learns that another process is gone leaves with one line.

    Args:
        leave: instead of printing that line and ending this process.
        options: further arguments of `Peers`.
    """
    peers = Peers(_leave_at_once if leave is None else leave, **options)
    try:
        yield
    except Exception as error:
        if (reason := lost_contact(error)) is None:
            raise
        peers.lost(reason)
    finally:
        peers.close()


def _leave_at_once(reason: str) -> NoReturn:
    """Without the farewell that would wait for processes that are gone."""
    print(f"\naria-jax: error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
