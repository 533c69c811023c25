"""The parts of one export, and who makes which.

    OUT.parts/identity.json           what the parts are made of; another export is refused
    OUT.parts/part-00003.parquet      rows of files 3 * 256 … 4 * 256 - 1; of a data set this is
                                      OUT/part-00003-1a2b3c4d.parquet, after the identity
    OUT.parts/part-00003.jsonl        its rejected files; written last, marks it done
    OUT.parts/part-00003.by-HOST-PID  that process is at work on it
    OUT                               one Parquet file once all are there, or a data set's folder

Hosts share an export by looking at what is there, on a disk or in a bucket: each claims one missing
part after the other. A claim promises nothing, and needs no clock that hosts share. Of a process of
this machine its lock tells whether it lives; a claim of another machine is good for as long as the
slowest part took here, three times over. Then whoever has nothing else to do makes the part too:
it comes out the same, and a host that is slow or dead holds nobody up.
"""

import fcntl
import json
import os
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from aria_jax.embed.pieces import Rejection
from aria_jax.embed.table import (
    SUMMARY,
    Embeddings,
    Rows,
    join_embeddings,
    read_identity,
    write_embeddings,
)
from data_pipeline import storage
from data_pipeline.artifact import Identity, There, locked, look, write_atomically
from data_pipeline.errors import UserError

PATIENCE_S = 60.0
"""A claim of another machine is good for so long at least."""
_IDENTITY = "identity.json"
_JOIN = "join"
_BY = ".by-"


def count_changes(before: Rows, after: Iterable[Rows]) -> dict[str, int]:
    """How many files are "new", "changed", "renamed", "gone" and "kept", by path and sha256."""
    old = {path: sha256 for path, sha256, *_ in before.files()}
    counts = dict.fromkeys(("new", "changed", "renamed", "gone", "kept"), 0)
    unknown = []
    for path, sha256, *_ in (file for rows in after for file in rows.files()):
        if (was := old.pop(path, None)) is None:
            unknown.append(sha256)
        else:
            counts["kept" if was == sha256 else "changed"] += 1
    left = Counter(old.values())
    for sha256 in unknown:
        renamed = left[sha256] > 0
        left[sha256] -= renamed
        counts["renamed" if renamed else "new"] += 1
    counts["gone"] = left.total()
    return counts


class Claims:
    """Which parts this process is at work on, and which others say that they are.

    Args:
        folder: where claims and the marks of finished parts lie.
        clock: in seconds; only differences count.
        machine: name of this one.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        machine: str = os.uname().nodename,
    ):
        self._folder, self._clock, self._machine = folder, clock, machine
        self._held: dict[str, tuple[int, float]] = {}
        self._seen: dict[str, float] = {}
        self._slowest = 0.0

    def names(self) -> set[str]:
        """What lies in the folder. Raises FileNotFoundError once the export is finished."""
        if storage.is_remote(self._folder):
            found = set(storage.listing(self._folder))
        else:
            found = set(os.listdir(self._folder))
        if _IDENTITY not in found:
            raise FileNotFoundError(self._folder)
        return found

    def take(self, wanted: Iterable[str]) -> str | None:
        """Claims the first part that nobody has done or is at work on, or else one that another
        has claimed too long ago; None where there is neither.
        """
        with locked(self._folder):
            names = self.names()
            owners = defaultdict(list)
            for name in names:
                part, mark, owner = name.partition(_BY)
                if mark:
                    owners[part].append(owner)
            overdue = None
            for part in wanted:
                if f"{part}.jsonl" in names or part in self._held:
                    continue
                seen = (self._age(part, owner) for owner in owners[part])
                ages = [age for age in seen if age is not None]
                if not ages:
                    return self._hold(part)
                if overdue is None and min(ages) > max(PATIENCE_S, 3 * self._slowest):
                    overdue = part
            return None if overdue is None else self._hold(overdue)

    def _age(self, part: str, owner: str) -> float | None:
        """Seconds that a claim was seen; 0 of a process that lives here, None of one that did."""
        name = f"{part}{_BY}{owner}"
        if owner.rpartition("-")[0] == self._machine:
            with suppress(FileNotFoundError):  # of a container with another disk
                handle = os.open(self._folder / name, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return None
                except BlockingIOError:
                    return 0.0
                except OSError:  # a disk without locks
                    pass
                finally:
                    os.close(handle)
        return self._clock() - self._seen.setdefault(name, self._clock())

    def _hold(self, part: str) -> str:
        path = self._path(part)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, b"claimed\n")
        self._held[part] = handle, self._clock()
        storage.upload(path)
        return part

    def release(self, part: str, *, done: bool = True) -> None:
        """Takes a claim back; of a part that is done, what it took is remembered."""
        handle, since = self._held.pop(part)
        if done:
            self._slowest = max(self._slowest, self._clock() - since)
        try:
            storage.remove(self._path(part))
        finally:
            os.close(handle)

    def release_all(self) -> None:
        """Takes all claims back: others need not wait."""
        for part in list(self._held):
            self.release(part, done=False)

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}{_BY}{self._machine}-{os.getpid()}"


class Parts:
    """The parts of one export; used by several processes and hosts at once.

    Args:
        out: file, or with `as_dataset` folder.
        begin: number of the part that this process looks at first; None for one that hosts which
            do not know of each other hardly share.

    Attributes:
        done: numbers of the parts that were done when last looked.
        before: a finished export by the same model, whose vectors are good for the same files.
    """

    def __init__(
        self,
        out: Path,
        identity: Identity,
        origin: str,
        n_parts: int,
        *,
        as_dataset: bool = False,
        float16: bool = False,
        begin: int | None = None,
    ):
        self._out, self._identity, self._origin = out, identity, origin
        self._as_dataset, self._float16 = as_dataset, float16
        self._folder = out.with_name(out.name + ".parts")
        self._dropped = out.with_name(out.name + ".parts.dropped")
        self._rejected = out.with_name(out.name + ".rejected.jsonl")
        if begin is None:
            begin = secrets.randbelow(n_parts) if storage.is_remote(out) else 0
        numbers = [*range(begin, n_parts), *range(begin)]
        self._numbers = {f"part-{number:05d}": number for number in numbers}
        self._claims = Claims(self._folder)
        self.before: Rows | None = None
        self.done: set[int] = set()

    def finished(self) -> bool:
        """Whether OUT is there."""
        return read_identity(self._out) == self._identity

    def gone(self) -> bool:
        """Whether another process has finished the export and removed the parts."""
        try:
            return not self._claims.names()
        except FileNotFoundError:
            return True

    def open(self, overwrite: bool) -> bool:
        """Makes the folder, or takes up the one a run before has left; False where OUT is finished.

        Raises:
            UserError: something else is there, and `overwrite` was not said.
        """
        if not self._as_dataset and self._out.is_dir():
            raise UserError(f"{self._out} is a folder; name a file for the embeddings")
        if self._as_dataset and self._out.is_file():
            raise UserError(f"{self._out} is a file; name a folder for the parts")
        with locked(self._out.parent):
            for path in (self._folder / _IDENTITY, self._rejected):
                storage.fetch(path)
            finished, unfinished = read_identity(self._out), self._unfinished()
            if finished == self._identity:
                # Killed between joining and tidying up, of which the identity may be gone already.
                if unfinished in (None, self._identity):
                    self._drop()
                self._send()
                return False
            unknown = finished is None and self._holds_others(unfinished)
            if unknown and not overwrite:
                raise UserError(
                    f"{self._out}: there is {'a folder' if self._as_dataset else 'a file'} that "
                    "does not say what it was made of; choose another output, or --overwrite to "
                    "replace it"
                )
            update = finished is not None and self._same_work(finished)
            there = look(
                self._out,
                self._identity,
                finished=None if update else finished,
                unfinished=unfinished,
                overwrite=overwrite,
                details=lambda _: {"files": "other files", "labels": "other labels"},
            )
            if there is There.FRESH:
                self._drop()
            self._folder.mkdir(exist_ok=True)
            if self._as_dataset:
                self._out.mkdir(exist_ok=True)
            write_atomically(self._folder / _IDENTITY, json.dumps(self._identity.to_json()))
            storage.upload(self._folder / _IDENTITY)
            self.look()
            self.before = Rows(self._out) if update else None
            return True

    def _unfinished(self) -> Identity | None:
        try:
            return Identity.from_json(json.loads((self._folder / _IDENTITY).read_text()))
        except FileNotFoundError:
            return None

    def _holds_others(self, unfinished: Identity | None) -> bool:
        """Whether OUT, which does not say what it is, holds anything but parts of this export."""
        if not self._as_dataset:
            return self._out.exists()
        return unfinished != self._identity and self._out.is_dir() and any(self._out.iterdir())

    def _same_work(self, other: Identity) -> bool:
        """Whether vectors of unchanged files are still good: the same model and settings."""
        return (other.kind, other.version, other.settings) == (
            self._identity.kind, self._identity.version, self._identity.settings
        ) and not {
            name
            for name in other.inputs.keys() | self._identity.inputs.keys()
            if other.inputs.get(name) != self._identity.inputs.get(name)
        } - {"files", "labels"}  # fmt: skip

    def look(self) -> int:
        """How many parts are done by now, whoever made them.

        Raises:
            FileNotFoundError: another process has finished the export.
        """
        names = self._claims.names()
        self.done = {n for part, n in self._numbers.items() if f"{part}.jsonl" in names}
        return len(self.done)

    def claim(self) -> int | None:
        """Number of a part to make next; None where others are at work on all that are left."""
        part = self._claims.take(p for p, n in self._numbers.items() if n not in self.done)
        return None if part is None else self._numbers[part]

    def claim_join(self) -> bool:
        """Whether this process is the one to `join`."""
        return self._claims.take([_JOIN]) is not None

    def close(self) -> None:
        """Takes back what was claimed and not done."""
        with suppress(FileNotFoundError):
            self._claims.release_all()

    def write(self, part: int, table: Embeddings | None, rejected: Sequence[Rejection]) -> None:
        """Writes a claimed part; its list of rejected files comes last and marks it done."""
        self._claims.names()  # the export may be finished, by others that made this part too
        if table is not None:
            write_embeddings(table, self._rows_path(part), float16=self._float16)
            storage.upload(self._rows_path(part))
        rows = [
            {"path": r.path, "stage": "embed", "reason": r.reason, "value": r.message}
            for r in rejected
        ]
        mark = self._folder / f"part-{part:05d}.jsonl"
        write_atomically(mark, "".join(json.dumps(row) + "\n" for row in rows))
        storage.upload(mark)
        self._claims.release(f"part-{part:05d}")

    def join(self) -> dict[str, int] | None:
        """Makes OUT of the parts, which are all done; see `claim_join`.

        Returns:
            What has changed since OUT was made before; None where it was not there.
        """
        with locked(self._out.parent):
            storage.fetch(self._folder)  # of other hosts too
            if self._as_dataset:
                storage.fetch(self._out)
            numbers = sorted(self._numbers.values())
            marks = [self._folder / f"part-{number:05d}.jsonl" for number in numbers]
            rejected = "".join(mark.read_text() for mark in marks)
            tables = [path for path in map(self._rows_path, numbers) if path.is_file()]
            if rejected:
                write_atomically(self._rejected, rejected, beside=self._folder)
            else:
                storage.remove(self._rejected)
            changes = None
            if tables:
                if self.before is not None:
                    changes = count_changes(self.before, map(Rows, tables))
                join_embeddings(tables, self._out, self._identity, self._origin)
            self._send()
            if self._as_dataset and tables:
                for path in set(self._out.glob("part-*.parquet")) - set(tables):
                    storage.remove(path)
            self._drop()
            if not tables:
                raise UserError(f"nothing to embed: every file was rejected, see {self._rejected}")
            return changes

    def _send(self) -> None:
        storage.upload(self._rejected)
        storage.upload(self._out, last=SUMMARY)

    def _drop(self) -> None:
        """Removes the folder at once: nobody may write into what is being removed."""
        if storage.is_remote(self._folder):
            storage.remove(self._folder / _IDENTITY)
            storage.remove(self._folder)
        shutil.rmtree(self._dropped, ignore_errors=True)
        with suppress(FileNotFoundError):
            self._folder.rename(self._dropped)
        shutil.rmtree(self._dropped, ignore_errors=True)

    def count(self) -> tuple[int, int]:
        """Rows and rejected files of a finished export."""
        n_rejected = 0
        if self._rejected.is_file():
            n_rejected = len(self._rejected.read_text().splitlines())
        return sum(Rows(self._out).sizes), n_rejected

    def _rows_path(self, part: int) -> Path:
        if self._as_dataset:
            return self._out / f"part-{part:05d}-{self._identity.digest[:8]}.parquet"
        return self._folder / f"part-{part:05d}.parquet"
