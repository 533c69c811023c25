"""What a build keeps on disk while it runs, so that a kill at any moment loses no finished work.

    OUT/.build/settings.json   what the unfinished build was asked to do
    OUT/.build/listing.jsonl   the source's files, in order
    OUT/.build/tables/         label tables of an archive
    OUT/.build/unit-000012     results of one run of files, written once, complete
    OUT/.build/final/          shards being written

Every file appears complete or not at all: written beside, flushed to the disk, renamed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from data_pipeline.building.sources import Entry, list_source
from data_pipeline.errors import UserError, printable

UNIT_FILES = 256
"""Files in one work unit: the most work that a killed build repeats, per worker."""
UNIT_BYTES = 32 << 20
"""MIDI bytes in one work unit of several files: bounds a worker's memory."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes so that `path` holds all of `data` or what it held before, whatever happens."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(beside, path)


def publish(made: Path, path: Path) -> None:
    """Renames a file that is already flushed, and flushes the folder's entry."""
    os.replace(made, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        self.spool = self.folder / "spool"
        self.final = self.folder / "final"
        self.tables = self.folder / "tables"
        self._listing = self.folder / "listing.jsonl"
        self._settings = self.folder / "settings.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other builds out; the lock goes with the process."""
        out_dir = self.folder.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(out_dir, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UserError(
                f"{out_dir}: another build is writing here; wait for it or stop it"
            ) from error
        finally:
            os.close(handle)

    def settings(self) -> dict[str, Any] | None:
        """What the unfinished build was asked to do; None where nothing was begun."""
        return json.loads(self._settings.read_text()) if self._settings.is_file() else None

    def begin(self, settings: dict[str, Any], source: Path) -> None:
        """Lists the source, then notes the settings: from there on the build can be continued."""
        beside = self._listing.with_suffix(".part")
        with beside.open("w") as file:
            for entry in list_source(source, self.spool, self.tables):
                file.write(json.dumps([entry.path, entry.size, entry.offset]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        publish(beside, self._listing)
        write_atomically(self._settings, json.dumps(settings).encode())

    def entries(self) -> Iterator[Entry]:
        """The listed files, in order."""
        with self._listing.open() as file:
            for line in file:
                yield Entry(*json.loads(line))

    def units(self) -> Iterator[tuple[int, list[Entry]]]:
        """Work units: (number, files)."""
        yield from enumerate(batched_entries(self.entries()))

    def listing_digest(self) -> str:
        """sha256 of the files' paths and sizes: equal for a folder and an archive of it."""
        sha = hashlib.sha256()
        for entry in self.entries():
            sha.update(json.dumps([entry.path, entry.size]).encode())
        return sha.hexdigest()

    def unit_path(self, number: int) -> Path:
        """Where the results of a unit are kept."""
        return self.folder / f"unit-{number:06d}"

    def clear(self) -> None:
        """Removes what an unfinished build left, settings first: a kill here starts afresh."""
        self._settings.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> None:
        """Removes the journal of a finished build."""
        self.clear()
        self.folder.rmdir()


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


def digest(value: Any) -> str:
    """sha256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
