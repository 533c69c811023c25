"""One use of the command line, right or wrong, and what a newcomer must find afterwards."""

import importlib.util
import io
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from aria_jax.cli.main import main

SILENCE_S = 2.0
"""Longest time without a word, as `Silence` measures it."""


class Silence:
    """The longest time without a word that is the program's own doing.

    Of the time between two words only that counts which the program could use: not what its
    threads waited, ready to run, for a processor, nor what the host of a virtual machine took. On
    a machine that is idle otherwise that is plain time; on a busy one it does not grow with what
    others do. Where the system does not tell (it is Linux that does), all time counts.

    Args:
        pid: of the program.
        threads: the ids of its threads that speak, or let others.
    """

    def __init__(self, pid: int, threads: Callable[[], Iterable[int]]):
        self._pid, self._threads = pid, threads
        self._last, self._waited = time.monotonic(), self._waits()
        self.longest = 0.0

    def word(self) -> None:
        """The program has said something, or has ended."""
        now, waited = time.monotonic(), self._waits()
        busy = sum(max(waited[who] - self._waited.get(who, 0.0), 0.0) for who in waited)
        self.longest = max(self.longest, now - self._last - busy)
        self._last, self._waited = now, waited

    def _waits(self) -> dict[int, float]:
        """Seconds that each thread has waited for a processor; 0: what the host took of any."""
        found = {}
        for thread in self._threads():
            with suppress(OSError):
                text = Path(f"/proc/{self._pid}/task/{thread}/schedstat").read_text()
                found[thread] = int(text.split()[1]) / 1e9
        with suppress(OSError):
            of_all = Path("/proc/stat").read_text().partition("\n")[0].split()
            found[0] = int(of_all[8]) / os.sysconf("SC_CLK_TCK")
        return found


def own_threads() -> Iterator[int]:
    """The main thread of this process and the one that shows progress."""
    for thread in threading.enumerate():
        if thread.native_id and (thread is threading.main_thread() or thread.name == "progress"):
            yield thread.native_id


def first_threads(pid: int) -> list[int]:
    """Of another process: its main thread and the two that a verb starts before all others."""
    with suppress(OSError):
        return sorted(int(task) for task in os.listdir(f"/proc/{pid}/task"))[:3]
    return []


@dataclass(frozen=True)
class Use:
    """A row of the table.

    Attributes:
        command: what is typed after `aria-jax`; {names} are the places of conftest.py. It runs in
            an empty folder of its own.
        says: key words of what is printed, in any order.
        status: exit status; 2 is one line and nothing on the disk.
        made: what is in the folder afterwards, as far as it is named here.
        before: files that are there already, with their text; a name that ends in / is a folder,
            a text that begins with -> a link to a place, {piece}[:60] the first bytes of a place.
        after: commands that ran there before, as `command`; each must succeed.
        needs: a package without which the row is skipped, with that reason.
    """

    command: str
    says: tuple[str, ...] | str = ()
    status: int = 0
    made: tuple[str, ...] | str = ()
    before: tuple[tuple[str, str], ...] = ()
    after: tuple[str, ...] = ()
    needs: str = ""

    def __str__(self) -> str:
        first = "".join(f"{command}; " for command in self.after)
        return f"{first}{self.command} -> {self.status}"

    @property
    def verb(self) -> str:
        """The first word, e.g. "data"."""
        return self.command.partition(" ")[0]


def wrong(command: str, says: tuple[str, ...] | str, **changes) -> Use:
    """A mistake of the user: one line, status 2, nothing on the disk."""
    return Use(command, says, status=2, **changes)


class _Told(io.StringIO):
    """Text, and when it came."""

    def __init__(self, silence: Silence | None):
        super().__init__()
        self._silence = silence

    def write(self, text: str) -> int:
        if self._silence is not None:
            self._silence.word()
        return super().write(text)


def check(use: Use, places: Mapping[str, Path], here: Path) -> None:
    """Runs a use in the empty folder `here` and holds it against its row."""
    if use.needs and importlib.util.find_spec(use.needs) is None:
        pytest.skip(f"needs {use.needs}")
    for name, text in use.before:
        _prepare(here, name, text, places)
    for command in use.after:
        status, told = _run(command, places, here, None)
        assert status == 0, told
    before = _files(here)
    silence = Silence(os.getpid(), own_threads)
    status, told = _run(use.command, places, here, silence)
    silence.word()
    assert status == use.status, told
    for words in _tuple(use.says):
        assert words in told, f"{words!r} is not in:\n{told}"
    assert "Traceback" not in told
    assert silence.longest < SILENCE_S, f"silent for {silence.longest:.1f} s:\n{told}"
    after = _files(here)
    for name in _tuple(use.made):
        assert any(file == name or file.startswith(name + "/") for file in after), sorted(after)
    if use.status == 2:
        errors = [line for line in told.splitlines() if line.startswith("aria-jax: error: ")]
        assert len(errors) == 1, told
        assert after == before or use.made, "a failed command leaves nothing behind"


def _run(
    command: str, places: Mapping[str, Path], here: Path, silence: Silence | None
) -> tuple[int, str]:
    """Exit status of a command, and what it said."""
    arguments = [part.format(**places) for part in shlex.split(command)]
    out, err, came_from = _Told(silence), _Told(silence), Path.cwd()
    os.chdir(here)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = main(arguments)
            except SystemExit as leaving:  # --help
                status = leaving.code or 0
    finally:
        os.chdir(came_from)
    return status, out.getvalue() + err.getvalue()


def _prepare(here: Path, name: str, text: str, places: Mapping[str, Path]) -> None:
    path = here / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
    elif text.startswith("->"):
        path.symlink_to(text.removeprefix("->").strip().format(**places))
    elif part := re.fullmatch(r"{(\w+)}\[:(\d+)\]", text):
        path.write_bytes(places[part[1]].read_bytes()[: int(part[2])])
    else:
        path.write_text(text)


def _tuple(words: tuple[str, ...] | str) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else words


def _files(folder: Path) -> dict[str, float]:
    """Every file and folder below, with the time of its last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime if path.is_file() else 0.0
        for path in folder.rglob("*")
    }
