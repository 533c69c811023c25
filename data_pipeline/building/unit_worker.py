"""The process that opens files nobody vouches for; started with a socket's number.

It may be killed at any file, by its own limits or by its parent; it writes nothing to the disk.
It is told its settings once, then units of files; it answers ("file", i) before file i, so that
its parent knows which one killed it, and ("unit", results) at the end.
"""

import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.building.journal import pack_unit, rejection
from data_pipeline.building.sources import Entry, read_entry

if TYPE_CHECKING:
    from data_pipeline.building.pieces import PieceMaker


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    Attributes:
        cpu_s: processor seconds (not wall clock: a busy machine rejects no good file).
        wall_s: seconds, for a file that blocks without computing.
        memory_bytes: address space on top of the idle worker's.
        file_bytes: size of the file.
    """

    cpu_s: float = 20.0
    wall_s: float = 300.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 32 << 20


@dataclass(frozen=True)
class Job:
    """A work unit as a worker is given it.

    Attributes:
        number: of the unit.
        root: folder, archive or spool that the files are read from.
        entries: the files.
        labels: of each file, as far as they do not depend on its content.
    """

    number: int
    root: Path
    entries: list[Entry]
    labels: list[dict[str, str]]


def process(
    job: Job,
    maker: "PieceMaker",
    limits: Limits,
    quarantined: dict[int, dict[str, Any]],
    before: Any,
) -> bytes:
    """Results of a unit; calls `before(i)` before file i and skips the quarantined ones."""
    summaries, ids = [], []
    for i, (entry, labels) in enumerate(zip(job.entries, job.labels, strict=True)):
        before(i)
        if i in quarantined:
            summary, piece = quarantined[i], b""
        else:
            summary, piece = _process_file(job.root, entry, labels, maker, limits)
        summaries.append(summary)
        ids.append(piece)
    return pack_unit(summaries, ids)


def _process_file(
    root: Path, entry: Entry, labels: dict[str, str], maker: "PieceMaker", limits: Limits
) -> tuple[dict[str, Any], bytes]:
    if entry.size > limits.file_bytes:
        return rejection(entry.path, "read", "too-large", entry.size), b""
    try:
        data = read_entry(root, entry)
    except OSError as error:
        return rejection(entry.path, "read", "unreadable", error.strerror), b""
    return maker.make(entry.path, data, labels)


def _limit_memory(extra_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(argv: list[str]) -> None:
    """Serves the parent at the other end of the inherited socket until it hangs up."""
    # Here and not above: the parent process imports this module, and has no use for a parser.
    from data_pipeline.building.pieces import PieceMaker

    connection = Connection(int(argv[1]))
    settings, limits = connection.recv()
    maker = PieceMaker(settings)
    maker.warm_up()  # before the limits: compiling takes longer and more than a file may
    if sys.platform == "linux":
        _limit_memory(limits.memory_bytes)
    connection.send(("ready", None))

    def before(i: int) -> None:
        connection.send(("file", i))
        # SIGPROF's default action ends the process, even inside compiled code.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)

    while True:
        try:
            job, quarantined = connection.recv()
        except EOFError:
            return
        result = process(job, maker, limits, quarantined, before)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(("unit", result))


if __name__ == "__main__":
    main(sys.argv)
