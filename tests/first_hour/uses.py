"""One use of the command line, right or wrong, and what a newcomer must find afterwards."""

import io
import itertools
import os
import shlex
import time
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from aria_jax.cli.main import main

SILENCE_S = 10.0
"""Longest time without a word. The command line speaks every two seconds; the rest is for machines
that are busy with other tests, where a thread may wait for its turn."""


@dataclass(frozen=True)
class Use:
    """A row of the table.

    Attributes:
        command: what is typed after `aria-jax`; {names} are the places of conftest.py. It runs in
            an empty folder of its own.
        says: key words of what is printed, in any order.
        status: exit status; 2 is one line and nothing on the disk.
        made: what is in the folder afterwards, as far as it is named here.
        before: files that are there already, with their text.
    """

    command: str
    says: tuple[str, ...] | str = ()
    status: int = 0
    made: tuple[str, ...] | str = ()
    before: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.command} -> {self.status}"


def wrong(command: str, says: tuple[str, ...] | str, **changes) -> Use:
    """A mistake of the user: one line, status 2, nothing on the disk."""
    return Use(command, says, status=2, **changes)


class _Told(io.StringIO):
    """Text, and when it came."""

    def __init__(self, times: list[float]):
        super().__init__()
        self._times = times

    def write(self, text: str) -> int:
        self._times.append(time.monotonic())
        return super().write(text)


def check(use: Use, places: Mapping[str, Path], here: Path) -> None:
    """Runs a use in the empty folder `here` and holds it against its row."""
    for name, text in use.before:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    before = _files(here)
    arguments = [part.format(**places) for part in shlex.split(use.command)]
    times = [time.monotonic()]
    out, err, came_from = _Told(times), _Told(times), Path.cwd()
    os.chdir(here)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = main(arguments)
            except SystemExit as leaving:  # --help
                status = leaving.code or 0
    finally:
        os.chdir(came_from)
    times.append(time.monotonic())
    told = out.getvalue() + err.getvalue()
    assert status == use.status, told
    for words in _tuple(use.says):
        assert words in told, f"{words!r} is not in:\n{told}"
    assert "Traceback" not in told
    silent = max(b - a for a, b in itertools.pairwise(times))
    assert silent < SILENCE_S, f"silent for {silent:.1f} s"
    after = _files(here)
    for name in _tuple(use.made):
        assert any(file == name or file.startswith(name + "/") for file in after), sorted(after)
    if use.status == 2:
        errors = [line for line in told.splitlines() if line.startswith("aria-jax: error: ")]
        assert len(errors) == 1, told
        assert after == before or use.made, "a failed command leaves nothing behind"


def _tuple(words: tuple[str, ...] | str) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else words


def _files(folder: Path) -> dict[str, float]:
    """Every file and folder below, with the time of its last change."""
    found: Iterable[Path] = folder.rglob("*")
    return {
        str(path.relative_to(folder)): path.stat().st_mtime if path.is_file() else 0.0
        for path in found
    }
