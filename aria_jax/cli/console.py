"""What the command line shows: named stages, progress and results, for a person or for a script.

While a verb runs (`working`), a thread says on stderr what it is doing, so that it is never silent
for two seconds: on a terminal in one line that is redrawn, a bar once work is counted; where stderr
is piped, in a line at a time. A stage that is over at once is never shown. Rates are of this run's
own work, the time left follows the present speed.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.errors import printable

Progress = Callable[[int, int], None]
"""Libraries report `progress(done, total)`; they never print."""

SHOWN_AFTER_S = 1.0
"""On a terminal a stage is shown once so much time has passed without a word."""
LINE_EVERY_S = 1.0
"""Of piped output. Two seconds are the promise: a library may hold the interpreter for the rest."""
PRESENT_S = 20.0
"""Over which the present speed is measured."""
_TICK_S = 0.2


class Counter:
    """Work that is counted: how far it is, how fast, and how long it will take.

    Args:
        description: what is done; unit: of what, in the singular.
        clock: in seconds.
    """

    def __init__(self, description: str, unit: str, clock: Callable[[], float] = time.monotonic):
        self._description, self._unit, self._clock = description, unit, clock
        self._done = self._total = self._base = 0
        self._began: float | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self._note = ""

    @property
    def started(self) -> bool:
        """Whether anything was reported."""
        return self._began is not None

    def report(self, done: int, total: int, note: str = "") -> None:
        """Takes up the present state; what the first report calls done is not counted as speed.

        Nor is what came before the total was known: another total begins the count anew.
        """
        now = self._clock()
        if self._began is None or total != self._total:
            self._began, self._base = now, done
            self._recent.clear()
        self._done, self._total, self._note = done, total, note or self._note
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[1][0] > PRESENT_S:
            self._recent.popleft()

    @property
    def begun(self) -> bool:
        """Whether the first unit is done, by this run or by an earlier one."""
        return self._done > 0

    @property
    def rate(self) -> float | None:
        """Units a second from the first report to the last; None before the second."""
        if self._began is None or self._done <= self._base:
            return None
        elapsed = self._recent[-1][0] - self._began
        return (self._done - self._base) / elapsed if elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the present speed; None as long as that is unknown. Runs down between reports.

        Where the next unit is overdue, the time without it counts as its own.
        """
        if not self._recent:
            return None
        (began, before), (now, done) = self._recent[0], self._recent[-1]
        if done <= before:
            return None
        n, left, waited = done - before, self._total - done, self._clock() - now
        if waited * n <= now - began:
            return max(left * (now - began) / n - waited, 0.0)
        return (left - 1) * (now - began + waited) / (n + 1)

    def text(self, bar_width: int = 0) -> str:
        """One line: share, number, rate, time left, note; with a bar where there is room."""
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        filled = round(share * bar_width)
        bar = f" |{'#' * filled}{' ' * (bar_width - filled)}|" if bar_width else ""
        plural = "" if self._total == 1 else "s"
        parts = [f"{self._done:,}/{self._total:,} {self._unit}{plural}"]
        if (rate := self.rate) is not None:
            slow = rate < 1
            parts.append(
                f"{1 / rate:.3g} s/{self._unit}" if slow else f"{rate:,.1f} {self._unit}s/s"
            )
        if (left := self.seconds_left) is not None and self._done < self._total:
            parts.append(f"{_clock_text(left)} left")
        if self._note:
            parts.append(self._note)
        return f"{self._description}: {share:.0%}{bar} {', '.join(parts)}"


def _clock_text(seconds: float) -> str:
    """1:05, or 2:01:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Screen:
    """The one place that writes what a verb is doing; may be told from any thread.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock, self._clock = threading.RLock(), clock
        self._verb = self._stage = ""
        self._since = self._written = 0.0
        self._counter: Counter | None = None
        self._last = ""
        self._drawn = False

    def begin(self, verb: str) -> None:
        """What follows is this verb's."""
        with self._lock:
            self._verb, self._counter, self._last = verb, None, ""
            self._written = self._clock()
            self.stage("starting")

    def stage(self, name: str) -> None:
        """What is done from now on."""
        with self._lock:
            self._stage, self._since = name, self._clock()

    def count(self, counter: Counter | None) -> None:
        """Shows a counter from its first report on, until the next call."""
        with self._lock:
            if self._counter is not None and self._counter.started:
                text = self._text(self._counter)
                if self._drawn or text != self._last:
                    self._write(text)
            self._counter = counter
            self._since = self._clock()

    def tick(self) -> None:
        """Says what is done, if it is time; to be called every _TICK_S."""
        with self._lock:
            silent = self._clock() - self._written
            counted = self._counter is not None and self._counter.started
            if not counted and not self._stage:
                return
            if sys.stderr.isatty():
                if counted or self._drawn or silent >= SHOWN_AFTER_S:
                    columns = shutil.get_terminal_size().columns
                    sys.stderr.write("\r" + self._now_text()[: columns - 1] + "\x1b[K")
                    sys.stderr.flush()
                    self._drawn = True
            elif silent >= LINE_EVERY_S:
                self._write(self._now_text())

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        with self._lock:
            self._write(text)

    def say(self, text: str) -> None:
        """Prints a line on stdout."""
        with self._lock:
            self.clear()
            print(printable(text))

    def clear(self) -> None:
        """Takes away the line that is redrawn."""
        with self._lock:
            if self._drawn:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                self._drawn, self._written = False, self._clock()

    def _now_text(self) -> str:
        waited = f"{self._clock() - self._since:.0f} s"
        if self._counter is None or not self._counter.started:
            return f"{self._verb}: {self._stage} ({waited})"
        # The first unit takes longest: it compiles, or processes start.
        first = "" if self._counter.begun else f" ({self._stage}, {waited})"
        return self._text(self._counter) + first

    def _text(self, counter: Counter) -> str:
        return counter.text(bar_width=20 if sys.stderr.isatty() else 0)

    def _write(self, line: str) -> None:
        self.clear()
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()
        self._last, self._written = line, self._clock()


_screen = Screen()
_active: "Interrupts | None" = None


class Interrupts:
    """Ctrl-C is answered at once, even while the main thread waits in compiled code.

    The first one raises KeyboardInterrupt in the main thread (or does what a handler of the verb
    says) as soon as that comes back to Python; the second ends the process and its workers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.answer = "stopping; Ctrl-C again to stop now"
        self.told = threading.Event()
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        self._before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Gives the signal back; the thread ends with its pipe."""
        signal.set_wakeup_fd(self._before)
        if not self.count:  # else the process ends, and so does what others do in it
            sys.unraisablehook = self._hook
        os.close(self._writable)

    def _lost(self, lost: Any) -> None:
        """A KeyboardInterrupt in a callback that cannot raise (jax has one of the garbage
        collector) is raised again, a moment later. What else fails after Ctrl-C is what it broke
        off: reads of a checkpoint that end when nobody waits for them.
        """
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, _interrupt_main_thread).start()
        elif not self.count:
            self._hook(lost)

    def _listen(self) -> None:
        while number := os.read(self._readable, 1):
            if number[0] == signal.SIGINT:
                self.count += 1
                if self.count > 1:
                    _end_at_once()
                _screen.note(f"\naria-jax: {self.answer}")
                self.told.set()
        os.close(self._readable)


def _interrupt_main_thread() -> None:
    """Raises KeyboardInterrupt there, without a signal, which would count as a second Ctrl-C."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    if _active is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def end_interrupted(told: str) -> NoReturn:
    """Ends a process that Ctrl-C stopped, without the seconds in which libraries take leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over already
    print(told, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _end_at_once()


def _end_at_once() -> NoReturn:
    from multiprocessing import active_children

    for child in active_children():
        child.kill()
    # One being started is in no list yet; twice, as a thread that ends leaves its own to another.
    # The tracker of semaphores tidies up behind this process, and ends with it.
    for pid in [*_children(), *_children()]:
        with suppress(OSError):
            if b"multiprocessing.resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    os._exit(130)


def _children() -> Iterator[int]:
    for of_thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            yield from map(int, of_thread.read_text().split())


@contextmanager
def working(verb: str) -> Iterator[None]:
    """Shows what the verb is doing, and answers Ctrl-C; does nothing inside another."""
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()

    def tick() -> None:
        while not done.wait(_TICK_S):
            _screen.tick()

    _active = Interrupts()
    _screen.begin(verb)
    ticker = threading.Thread(target=tick, name="progress", daemon=True)
    ticker.start()
    try:
        yield
    except KeyboardInterrupt:
        _active.told.wait(0.5)  # on a busy machine the main thread may be here before the answer
        raise
    finally:
        done.set()
        ticker.join()
        _screen.clear()
        _active.close()
        _active = None


def hush_libraries() -> None:
    """Sends what compiled libraries print on stdout (gloo does) to nowhere; Python's stays."""
    if sys.stdout.fileno() == 1:
        sys.stdout.flush()
        sys.stdout = os.fdopen(os.dup(1), "w")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def stage(name: str) -> None:
    """Names what is done from now on, e.g. "loading the model"; shown where it takes long.

    Nothing is shown of the stage "": a server that waits for requests.
    """
    _screen.stage(name)


def note(text: str) -> None:
    """Prints a line on stderr that does not disturb the progress."""
    _screen.note(text)


def answer_interrupt(answer: str) -> None:
    """What Ctrl-C is answered with from now on."""
    if _active is not None:
        _active.answer = answer


def interrupted() -> bool:
    """Whether Ctrl-C was pressed."""
    return _active is not None and _active.count > 0


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[..., None]]:
    """Yields a `Progress` callback; the bar begins with its first news.

    The callback also takes `note=`, a few words to stand behind the bar.
    """
    counter = Counter(description, unit)
    _screen.count(counter)
    try:
        yield counter.report
    finally:
        _screen.count(None)


def print_result(
    result: dict[str, Any], as_json: bool, text: str, warnings: Sequence[str] = ()
) -> None:
    """Prints `result` as one JSON line where a script asked for it, else `text`.

    Names that are not UTF-8 are shown as `printable`; warnings go to stderr.
    """
    for warning in warnings:
        note(f"aria-jax: warning: {warning}")
    say(json.dumps(_printable(result)) if as_json else text)


def say(text: str) -> None:
    """Prints a line on stdout, where no progress stands before it."""
    _screen.say(text)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value
