"""What the command line shows: named stages, progress and results, for a person or for a script.

While a verb runs (`working`), a thread says on stderr what it is doing: on a terminal one line that
is redrawn, a bar once work is counted; where stderr is piped, a line every few seconds. A stage
that is over at once is never shown. Rates are of this run's own work, the time left follows the
present speed.
"""

import argparse
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
from contextlib import contextmanager
from typing import Any, NoReturn

from data_pipeline.errors import UserError, printable

Progress = Callable[[int, int], None]
"""Libraries report `progress(done, total)`; they never print."""

SHOWN_AFTER_S = 1.0
"""On a terminal a stage is shown once it has lasted so long."""
LINE_EVERY_S = (1.8, 5.0)
"""Of piped output: at first, and of a job that lasts."""
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
    def begun(self) -> bool:
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
    def rate(self) -> float | None:
        """Units a second from the first report to the last; None before the second."""
        if self._began is None or self._done <= self._base:
            return None
        elapsed = self._recent[-1][0] - self._began
        return (self._done - self._base) / elapsed if elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the present speed; None as long as that is unknown."""
        if not self._recent:
            return None
        (began, before), (now, done) = self._recent[0], self._recent[-1]
        return (self._total - done) * (now - began) / (done - before) if done > before else None

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


class _Screen:
    """The one place that writes what a verb is doing; may be told from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._verb = self._stage = ""
        self._since = self._began = self._written = 0.0
        self._counter: Counter | None = None
        self._last = ""
        self._drawn = False

    def begin(self, verb: str) -> None:
        with self._lock:
            self._verb, self._counter, self._last = verb, None, ""
            self._began = self._written = time.monotonic()
            self.stage("starting")

    def stage(self, name: str) -> None:
        with self._lock:
            self._stage, self._since = name, time.monotonic()

    def count(self, counter: Counter | None) -> None:
        """Shows a counter from its first report on, until the next call."""
        with self._lock:
            if self._counter is not None and self._counter.begun:
                text = self._text(self._counter)
                if self._drawn or text != self._last:
                    self._write(text)
            self._counter = counter
            self._since = time.monotonic()

    def tick(self) -> None:
        with self._lock:
            now = time.monotonic()
            counted = self._counter is not None and self._counter.begun
            if sys.stderr.isatty():
                if counted or now - self._since >= SHOWN_AFTER_S:
                    columns = shutil.get_terminal_size().columns
                    sys.stderr.write("\r" + self._now_text()[: columns - 1] + "\x1b[K")
                    sys.stderr.flush()
                    self._drawn = True
            elif now - self._written >= self._every(now):
                self._write(self._now_text())

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        with self._lock:
            self._write(text)

    def clear(self) -> None:
        """Takes away the line that is redrawn."""
        with self._lock:
            if self._drawn:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                self._drawn = False

    def _every(self, now: float) -> float:
        least, most = LINE_EVERY_S
        return min(most, max(least, (now - self._began) / 60))

    def _now_text(self) -> str:
        if self._counter is not None and self._counter.begun:
            return self._text(self._counter)
        return f"{self._verb}: {self._stage} ({time.monotonic() - self._since:.0f} s)"

    def _text(self, counter: Counter) -> str:
        return counter.text(bar_width=20 if sys.stderr.isatty() else 0)

    def _write(self, line: str) -> None:
        self.clear()
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()
        self._last, self._written = line, time.monotonic()


_screen = _Screen()
_active: "Interrupts | None" = None


class Interrupts:
    """Ctrl-C is answered at once, even while the main thread waits in compiled code.

    The first one raises KeyboardInterrupt in the main thread (or does what a handler of the verb
    says) as soon as that comes back to Python; the second ends the process and its workers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.answer = "stopping; Ctrl-C again to stop now"
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        self._before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Gives the signal back; the thread ends with its pipe."""
        signal.set_wakeup_fd(self._before)
        sys.unraisablehook = self._hook
        os.close(self._writable)

    def _lost(self, lost: Any) -> None:
        """A KeyboardInterrupt in a callback that cannot raise (jax has one of the garbage
        collector) is raised again, a moment later.
        """
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, _interrupt_main_thread).start()
        else:
            self._hook(lost)

    def _listen(self) -> None:
        while number := os.read(self._readable, 1):
            if number[0] == signal.SIGINT:
                self.count += 1
                if self.count > 1:
                    _end_at_once()
                _screen.note(f"\naria-jax: {self.answer}")
        os.close(self._readable)


def _interrupt_main_thread() -> None:
    """Raises KeyboardInterrupt there, without a signal, which would count as a second Ctrl-C."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    if _active is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def end_interrupted(told: str) -> NoReturn:
    """Ends a process that Ctrl-C stopped, without the seconds in which libraries take leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over already
    print(told, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    _end_at_once()


def _end_at_once() -> NoReturn:
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    os._exit(130)


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
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
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
    """Names what is done from now on, e.g. "loading the model"; shown where it takes long."""
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
    _screen.clear()
    print(json.dumps(_printable(result)) if as_json else printable(text))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


_KNOWN_SUFFIXES = {
    ".csv", ".gz", ".html", ".jpg", ".json", ".jsonl", ".kar", ".mid", ".midi", ".mp3", ".npy",
    ".npz", ".parquet", ".pdf", ".png", ".safetensors", ".svg", ".tar", ".tgz", ".tsv", ".txt",
    ".wav", ".yaml", ".yml", ".zip",
}  # fmt: skip


def check_suffix(path: str, content: str, *suffixes: str) -> None:
    """Raises `UserError` where a file to write is named as if it held something else."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _KNOWN_SUFFIXES and suffix not in suffixes:
        raise UserError(f"{path}: this will be {content}, not {suffix}; name it …{suffixes[0]}")


def numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers of a comma-separated argument, in ascending order."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text}: expected positive numbers such as 1,5,10")
    return sorted({int(part) for part in parts})


def add_compat(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --compat, which says how MIDI files are read."""
    from data_pipeline.midi import COMPAT, STANDARD

    parser.add_argument(
        "--compat",
        choices=(*COMPAT, STANDARD),
        help=f"read MIDI files as aria-utils does, faults included, or by the standard ({default})",
    )


def chosen_reading(compat: str | None, model_reading: str, model: object) -> str:
    """How to read files for a model: as --compat says, else as its corpus was read."""
    reading = compat or model_reading
    warn_of_reading(reading, model_reading, model)
    return reading


def warn_of_reading(reading: str, model_reading: str, model: object) -> None:
    """Says on stderr that files are not read as those of a model's corpus were."""
    if reading != model_reading:
        print(
            f"aria-jax: warning: reading MIDI files by {reading}; those of {model} were read by "
            f"{model_reading}",
            file=sys.stderr,
        )
