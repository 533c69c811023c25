"""What a build keeps on disk while it runs, so that a kill at any moment loses no finished work.

    OUT/.build/identity.json   what the unfinished build is made of
    OUT/.build/source/         the source as this start found it: listing.jsonl with the sha256 of
                               every file, the label tables and, unpacked, the bytes of an archive
    OUT/.build/asked/          the same, before it is known whether the build goes on
                               (source/exclude-0/ …: likewise of what is kept out)
    OUT/.build/unit-000012     results of one run of files, written once, complete
    OUT/.build/exclude-000012  likewise of files that are only compared with
    OUT/.build/final/          shards being written

Every file appears complete or not at all.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgpack

from data_pipeline.artifact import Identity, hashed, synced, write_atomically
from data_pipeline.build.listing import Entry
from data_pipeline.build.sources import entry_digest, list_source, no_midi_files, readable_root
from data_pipeline.errors import UserError, printable

UNIT_FILES = 256
"""Files in one work unit: the most work that a killed build repeats, per worker."""
UNIT_BYTES = 32 << 20
"""MIDI bytes in one work unit of several files: bounds a worker's memory."""


@contextmanager
def disk_errors_explained(out_dir: Path) -> Iterator[None]:
    """Turns a full disk or a folder without write permission into a `UserError`."""
    full = f"{out_dir}: the disk is full; free some space and run the same command again to go on"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(full) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{out_dir}: cannot write here ({error.strerror})") from error
        raise
    except (RuntimeError, ValueError) as error:  # ArrayRecord's writer reports errors as text
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            raise UserError(full) from error
        raise


class Journal:
    """The unfinished build in OUT/.build; used by one process at a time."""

    def __init__(self, out_dir: Path):
        self.folder = out_dir / ".build"
        self.final = self.folder / "final"
        self._identity = self.folder / "identity.json"
        self._source = self.folder / "source"
        self._asked = self.folder / "asked"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other builds out; the lock goes with the process.

        What was only asked, and a folder with nothing in it, do not stay.
        """
        out_dir = self.folder.parent
        self.folder.mkdir(exist_ok=True)
        handle = os.open(out_dir, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(
                f"{out_dir}: another build is writing here; wait for it or stop it"
            ) from error
        try:
            yield
        finally:
            shutil.rmtree(self._asked, ignore_errors=True)
            with suppress(OSError):
                self.folder.rmdir()
            os.close(handle)

    def list_asked(
        self, source: Path, progress: Callable[[int], None], exclude: Sequence[Path] = ()
    ) -> tuple["Listing", list["Listing"]]:
        """Lists the sources as they are now, with the sha256 of each file; see `accept`.

        Args:
            progress: called with the number of files so far.
            exclude: sources that are only compared with.
        """
        shutil.rmtree(self._asked, ignore_errors=True)
        self._asked.mkdir()
        excluded = [
            self._list(Listing(self._asked / f"exclude-{i}"), other, progress)
            for i, other in enumerate(exclude)
        ]
        return self._list(Listing(self._asked), source, progress), excluded

    def _list(self, listing: "Listing", source: Path, progress: Callable[[int], None]) -> "Listing":
        listing.path.parent.mkdir(exist_ok=True)
        entries = list_source(source, listing.spool, listing.tables)
        first = next(entries, None)  # from here on the bytes of an archive are there to be read
        if first is None:
            raise no_midi_files(source)
        root = readable_root(source, listing.spool)
        with synced(listing.path, "w") as file:
            rows = hashed(chain([first], entries), partial(entry_digest, root))
            for number, (entry, sha256) in enumerate(rows, start=1):
                file.write(json.dumps([sha256, *entry.row]) + "\n")
                if number % UNIT_FILES == 0:
                    progress(number)
        return listing

    @property
    def listing(self) -> "Listing":
        """The source of the unfinished build."""
        return Listing(self._source)

    def digests(self) -> Iterator[tuple[str, str | None]]:
        """(path, sha256) of what the unfinished build is made of; nothing where a kill left none."""
        return self.listing.digests() if self.listing.path.is_file() else iter(())

    def identity(self) -> Identity | None:
        """What the unfinished build is made of; None where there is none."""
        if not self._identity.is_file():
            return None
        return Identity.from_json(json.loads(self._identity.read_text()))

    def begin(self, identity: Identity) -> None:
        """Removes what another build left; a kill before the end starts afresh."""
        self._identity.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path == self._asked:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.accept()
        write_atomically(self._identity, json.dumps(identity.to_json()))

    def accept(self) -> None:
        """Goes on with the source that was asked for: the same files, perhaps elsewhere."""
        shutil.rmtree(self._source, ignore_errors=True)
        self._asked.rename(self._source)

    @property
    def excluded(self) -> list["Listing"]:
        """The sources that the unfinished build is compared with."""
        folders = sorted(self._source.glob("exclude-*"), key=lambda p: int(p.name.split("-")[1]))
        return [Listing(folder) for folder in folders]

    def units(self) -> Iterator[tuple[int, list[Entry]]]:
        """Work units: (number, files)."""
        yield from enumerate(batched_entries(self.listing.entries()))

    def excluded_units(self) -> Iterator[tuple[int, int, list[Entry]]]:
        """Work units of all excluded sources: (number, position of the source, files)."""
        number = 0
        for source, listing in enumerate(self.excluded):
            for entries in batched_entries(listing.entries()):
                yield number, source, entries
                number += 1

    def unit_path(self, number: int, kind: str = "unit") -> Path:
        """Where the results of a unit are kept; `kind` "exclude" for one of `excluded_units`."""
        return self.folder / f"{kind}-{number:06d}"

    def remove(self) -> None:
        """Removes the journal of a finished build, its identity first."""
        self._identity.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


class Listing:
    """The files of a source, sorted by path, in a folder that holds all that listing it took."""

    def __init__(self, folder: Path):
        self.path = folder / "listing.jsonl"
        self.spool = folder / "spool"
        self.tables = folder / "tables"

    def entries(self) -> Iterator[Entry]:
        """The files, in order."""
        for _, *row in self._lines():
            yield Entry(*row)

    def digests(self) -> Iterator[tuple[str, str | None]]:
        """(path, sha256 or None where the file cannot be read) of each file, in order."""
        for sha256, path, *_ in self._lines():
            yield path, sha256

    def _lines(self) -> Iterator[list[Any]]:
        with self.path.open() as file:
            yield from map(json.loads, file)


def batched_entries(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Work units: at most UNIT_FILES files and, unless it is one file, UNIT_BYTES bytes."""
    unit: list[Entry] = []
    size = 0
    for entry in entries:
        if unit and (len(unit) == UNIT_FILES or size + entry.size > UNIT_BYTES):
            yield unit
            unit, size = [], 0
        unit.append(entry)
        size += entry.size
    if unit:
        yield unit


def pack_unit(summaries: list[dict[str, Any]], ids: list[bytes]) -> bytes:
    """Results of a unit: first what the merge has to know of each file, then the ids.

    Each accepted summary's n_tokens tells where its ids lie.
    """
    return b"".join([msgpack.packb(summaries), *ids])


def read_summaries(path: Path) -> list[dict[str, Any]]:
    """Reads the first part of a unit's results."""
    return _open_unit(path)[0]


def read_unit(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (summary, ids as little-endian uint16 bytes; empty for a rejected file)."""
    summaries, position = _open_unit(path)
    with path.open("rb") as file:
        file.seek(position)
        for summary in summaries:
            yield summary, file.read(2 * summary.get("n_tokens", 0))


def _open_unit(path: Path) -> tuple[list[dict[str, Any]], int]:
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, strict_map_key=False)
        return unpacker.unpack(), unpacker.tell()


def rejection(path: str, stage: str, reason: str, value: Any = None) -> dict[str, Any]:
    """A line of rejected.jsonl; `path` may hold bytes that are not UTF-8."""
    return {"path": printable(path), "stage": stage, "reason": reason, "value": value}
