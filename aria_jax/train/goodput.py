"""A run as it is seen and asked from outside: how its time was spent, over all its restarts, in
WORKDIR/goodput.jsonl; which process stalls, in WORKDIR/stalls; a request for a trace.

Each start of the run appends to the record, so that it survives kills. Times are seconds; the words
are those of ml-goodput-measurement: goodput is the share of the wall time, from the first start on,
in which steps were computed that were not computed again; badput is the rest, by its reason.

    {"event": "start", "time", "step", "hosts", "devices"}     begins behind `step`
    {"event": "steps", "time", "first", "last", "seconds", …}  steps first … last, done at `time`
    {"event": "end", "time", "step"}                           left in order; a kill leaves none

Of the `seconds` of some steps, "compile_s", "data_s" (waiting for a batch), "evaluation_s" and
"checkpoint_s" (until the arrays may change again) are parts; "step_s" holds what each step took
without those.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.artifact import write_atomically
from data_pipeline.errors import UserError

FILE = "goodput.jsonl"
STALLS = "stalls"
"""Folder of a workdir: one file a process, a line for each stall and each end of one."""
REQUEST = "profile-next"
"""File of a workdir: of how many of the next steps a trace is wanted."""
LOOK_EVERY_S = 10.0
"""How often a run looks for such a request."""
PARTS = ("compile_s", "data_s", "evaluation_s", "checkpoint_s")
PERCENTILES = (50, 90, 99)


class GoodputRecorder:
    """Keeps the record of one start of a run; a hook's neighbour, told of each step.

    Args:
        file: None records nothing (all processes but the first).
        step: steps that the run has behind it.
        every: steps between two lines; a line is also written once a minute.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        file: Path | None,
        step: int,
        *,
        every: int,
        hosts: int,
        devices: int,
        clock: Callable[[], float] = time.time,
    ):
        self._file, self._every, self._clock = file, every, clock
        self._step = self._written = step
        self._compiled = False
        self._write({"event": "start", "step": step, "hosts": hosts, "devices": devices})
        self._begin()

    def _begin(self) -> None:
        self._began = self._last = self._clock()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._elsewhere = 0.0
        self._steps: list[float] = []

    @contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Counts what happens within as a part that is no step, of `PARTS`."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._spent[part] += seconds
        self._elsewhere += seconds

    @contextmanager
    def dispatching(self) -> Iterator[None]:
        """The first time a step is called it is compiled; later calls only start it."""
        if self._compiled:
            yield
            return
        with self.spent_on("compile_s"):
            yield
        self._compiled = True

    def on_step(self, step: int) -> None:
        """Told that all of a step is done but what the device does beside the next."""
        now = self._clock()
        self._steps.append(max(now - self._last - self._elsewhere, 0.0))
        self._last, self._elsewhere, self._step = now, 0.0, step
        if step % self._every == 0 or now - self._began >= 60:
            self._flush()

    def end(self) -> None:
        """Writes what is left; the run leaves in order."""
        self._flush()
        self._write({"event": "end", "step": self._step})

    def _flush(self) -> None:
        if not self._steps:
            return
        low = {f"p{p}": float(np.percentile(self._steps, p)) for p in PERCENTILES}
        self._write(
            {
                "event": "steps",
                "first": self._written + 1,
                "last": self._step,
                "seconds": self._last - self._began,
                **self._spent,
                "step_s": {**low, "max": max(self._steps)},
            }
        )
        self._written = self._step
        began = self._last
        self._begin()
        self._began = self._last = began

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**event, "time": self._clock()}) + "\n")


@dataclass(frozen=True)
class Status:
    """What the record of a run says.

    Attributes:
        step: the last that was done.
        running: it has neither ended in order nor been silent for long.
        silent_s: since the last line of the record.
        starts: how often it was started.
        lost_steps: of each restart, the steps done before that were done again.
        wall_s: from the first start to the last line.
        goodput: share of `wall_s` in which steps were computed that count, 0 to 1.
        badput_s: the rest of `wall_s` by its reason; "startup" is from a start to its first step,
            "recovery" between a start's last line and the next start, "redone" steps done again.
        step_s: of the steps of the last line: p50, p90, p99, max; None before the first.
        stalls: one sentence about each process that stalls since the last start.
    """

    step: int
    running: bool
    silent_s: float
    starts: int
    lost_steps: list[int]
    wall_s: float
    goodput: float
    badput_s: dict[str, float]
    step_s: dict[str, float] | None
    stalls: list[str]


SILENT_S = 600.0
"""A run that has written nothing for so long is not taken to be running."""


def read_status(workdir: Path, now: float | None = None) -> Status:
    """What became of the run in a workdir so far.

    Raises:
        UserError: there is no record.
    """
    events = _events(workdir / FILE)
    if not events:
        what = f"no record of a run here ({FILE})" if workdir.is_dir() else "no such folder"
        raise UserError(f"{workdir}: {what}; name the --workdir of `aria-jax train`")
    badput = dict.fromkeys(("startup", "compile", "data", "evaluation", "checkpoint"), 0.0)
    badput |= {"recovery": 0.0, "redone": 0.0}
    productive, lost, done = 0.0, list[int](), events[0]["step"]
    spans: list[list[float]] = []  # first, last, seconds of steps that count so far
    for before, event in zip([events[0], *events], events, strict=False):
        if event["event"] == "start" and event is not events[0]:
            badput["recovery"] += event["time"] - before["time"]
            lost.append(max(done - event["step"], 0))
            badput["redone"] += _cut(spans, event["step"])
            done = event["step"]
        elif event["event"] == "steps":
            if before["event"] == "start":
                badput["startup"] += max(event["time"] - before["time"] - event["seconds"], 0.0)
            for part in PARTS:
                badput[part.removesuffix("_s")] += event[part]
            spent = event["seconds"] - sum(event[part] for part in PARTS)
            spans.append([event["first"], event["last"], max(spent, 0.0)])
            done = event["last"]
    productive = sum(seconds for *_, seconds in spans)
    wall = events[-1]["time"] - events[0]["time"]
    silent = max((time.time() if now is None else now) - events[-1]["time"], 0.0)
    windows = [event for event in events if event["event"] == "steps"]
    return Status(
        step=done,
        running=events[-1]["event"] != "end" and silent < SILENT_S,
        silent_s=silent,
        starts=sum(event["event"] == "start" for event in events),
        lost_steps=lost,
        wall_s=wall,
        goodput=productive / wall if wall else 0.0,
        badput_s={**badput, "other": max(wall - productive - sum(badput.values()), 0.0)},
        step_s=windows[-1]["step_s"] if windows else None,
        stalls=_stalls(workdir, max(e["time"] for e in events if e["event"] == "start")),
    )


def _stalls(workdir: Path, since: float) -> list[str]:
    """What was said last of each process that stalled after that time and did not go on."""
    found = []
    for file in sorted((workdir / STALLS).glob("*.jsonl")):
        last = (_events(file) or [{}])[-1]
        if last.get("event") == "stall" and last["time"] >= since:
            found.append(last["message"])
    return found


def _cut(spans: list[list[float]], step: int) -> float:
    """Takes the steps behind `step` out, which are done again; the seconds they took."""
    redone = 0.0
    while spans and spans[-1][1] > step:
        first, last, seconds = spans.pop()
        if first <= step:
            share = (step - first + 1) / (last - first + 1)
            spans.append([first, step, seconds * share])
            seconds *= 1 - share
        redone += seconds
    return redone


def _events(file: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that a kill cut off is none."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def status_text(workdir: str, status: Status) -> str:
    """The status for a person."""
    state = "running" if status.running else "not running"
    lines = [
        f"{workdir}: step {status.step:,}, {state}, last heard of {_span(status.silent_s)} ago",
        f"goodput {status.goodput:.1%} of {_span(status.wall_s)}; started "
        f"{_times(status.starts)}, steps done again: {_counts(status.lost_steps)}",
    ]
    lost = [(seconds, name) for name, seconds in status.badput_s.items() if seconds >= 0.005]
    lines += [
        f"  {name:<12}{seconds / status.wall_s:>7.1%}  {_span(seconds)}"
        for seconds, name in sorted(lost, reverse=True)
    ]
    if status.step_s is not None:
        shown = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in status.step_s.items())
        lines.append(f"a step, of late: {shown}")
    return "\n".join([*lines, *status.stalls])


def request_profile(workdir: Path, steps: int) -> str:
    """Asks the run of a workdir, which is under way, for a trace of so many of its next steps.

    Returns:
        What was asked, and where the answer will be.

    Raises:
        UserError: no step is asked for, or no run is under way there.
    """
    if steps < 1:
        raise UserError(f"--profile-next {steps}: expected a number of steps, at least 1")
    status = read_status(workdir)
    if not status.running:
        raise UserError(
            f"{workdir}: no run is under way there (last heard of {_span(status.silent_s)} ago); "
            "profile_steps=FIRST-LAST traces steps of one that is about to start"
        )
    write_atomically(workdir / REQUEST, f"{steps}\n")
    storage.upload(workdir / REQUEST)
    return (
        f"{storage.url(workdir)}: asked for a trace of the next {steps} steps; the run looks every "
        f"{LOOK_EVERY_S:.0f} s, and writes it to {storage.url(workdir / 'profile')}"
    )


class ProfileRequests:
    """Looks for a request in a workdir, from a thread of its own, and takes it away.

    Args:
        look: False finds none (all processes but the first).
    """

    def __init__(self, workdir: Path, *, look: bool = True):
        self._file, self._steps = workdir / REQUEST, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        if look:
            self._thread.start()

    def take(self) -> int:
        """How many steps were asked for since the last call; asks nobody."""
        steps, self._steps = self._steps, 0
        return steps

    def close(self) -> None:
        """Looks no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            # What a bucket does not tell now it tells later; what is no number asks for nothing.
            with suppress(UserError, OSError, ValueError):
                storage.fetch(self._file)
                if self._file.is_file():
                    text = self._file.read_text()
                    storage.remove(self._file)
                    self._steps = max(int(text), 0)
            if self._ended.wait(LOOK_EVERY_S):
                return


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _counts(lost: Sequence[int]) -> str:
    return ", ".join(map(str, lost)) or "none"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
