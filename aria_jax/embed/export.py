"""Embeddings of many files, in parts that survive a kill.

    OUT.parts/identity.json        what the parts are made of; another export is refused
    OUT.parts/part-00003.parquet   rows of files 3 * 256 … 4 * 256 - 1
    OUT.parts/part-00003.jsonl     its rejected files; written last, marks it done
    OUT.parts/part-00003.claim     locked by the process that is at work on it
    OUT                            one Parquet file, a row group a part, once all are there

Parts do not depend on the number of hosts: host h of H makes parts h, h + H, …, and whoever
finishes the last one joins them. Hosts that do not know of each other share parts by their claims.
Where the disk knows no locks, and in a bucket, two may do the same work, with the same result.

A finished OUT of the same model and settings is brought up to date: vectors of files that have not
changed are kept, whatever became of their labels, names and neighbours.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.embed.table import (
    Embeddings,
    KnownVectors,
    join_embeddings,
    open_parquet,
    pool_slices,
    read_identity,
    write_embeddings,
)
from data_pipeline import storage
from data_pipeline.artifact import Identity, There, look, new_folder, write_atomically
from data_pipeline.errors import UserError
from data_pipeline.workers import map_in_order

if TYPE_CHECKING:
    from aria_jax.embed.encode import Encode

KIND = "embeddings"
VERSION = 1
"""Of what an export makes of its inputs; one more when the same inputs give other numbers."""
FILES_PER_PART = 256
"""Bounds the memory and what a kill can lose, and still gives full batches of like length."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export did.

    Attributes:
        n_files: files of the source.
        n_rows, n_rejected: in OUT; 0 as long as it is not complete.
        n_parts, n_parts_before: of the export, and those that a run before had already made.
        complete: whether OUT is there; other hosts are still at work otherwise.
        n_embedded, n_kept: files embedded by this run, and those whose vectors were still good.
        done_before: OUT was made of the same files and labels with the same model and settings.
    """

    n_files: int
    n_rows: int
    n_rejected: int
    n_parts: int
    n_parts_before: int
    complete: bool
    n_embedded: int = 0
    n_kept: int = 0
    done_before: bool = False


def export(
    source: Source,
    encode: "Encode",
    out: str | Path,
    *,
    settings: dict[str, str | int | bool],
    origin: str | Path = "",
    per_slice: bool = False,
    pool: str = "mean",
    workers: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    files_per_part: int = FILES_PER_PART,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Embeds every file of `source`, goes on where a killed run stopped, does nothing when done.

    Args:
        settings: all that the numbers depend on besides the files; "fingerprint" of the model
            must be among them.
        origin: where the files are, noted in OUT for whoever wants to show them.
        per_slice: one row per slice (path#0, path#1, …) instead of one per file.
        pool: what a file's row is of its slices, see `table.pool_slices`.
        workers: processes that read and tokenise.
        overwrite: replaces embeddings by another model or with other settings.

    Raises:
        UserError: there are other embeddings, or the beginning of some; every file was rejected.
    """
    out, paths = storage.local(out), source.paths
    settings = {**settings, "per_slice": per_slice, "files_per_part": files_per_part}
    if pool != "mean":  # which every file without this setting is
        settings["pool_slices"] = pool
    model = str(settings.pop("fingerprint"))
    identity = Identity(KIND, VERSION, {"model": model, **source.digests()}, settings)
    n_parts = -(-len(paths) // files_per_part)
    parts = _Parts(out, identity, storage.url(origin), n_parts)
    with new_folder(out.parent):
        known = parts.open(overwrite)
        if known is None:
            return ExportSummary(len(paths), *parts.count(), n_parts, n_parts, True, 0, 0, True)
        mine = list(range(host_index, n_parts, host_count))
        work = _Work(source, encode, known, parts, files_per_part, per_slice, pool, workers)
        missing = [p for p in mine if not parts.has(p)]
        before = len(mine) - len(missing)
        try:
            work.run(mine, missing, progress)
            complete = parts.join()
        except FileNotFoundError:
            complete = parts.finished()  # another process has joined and removed the parts
            if not complete:
                raise
        n_rows, n_rejected = parts.count() if complete else (0, 0)
        return ExportSummary(
            len(paths), n_rows, n_rejected, n_parts, before, complete, work.n_embedded, work.n_kept
        )


class _Work:
    """The parts that one process makes, and how many files that took."""

    def __init__(
        self,
        source: Source,
        encode: "Encode",
        known: KnownVectors,
        parts: "_Parts",
        files_per_part: int,
        per_slice: bool,
        pool: str,
        workers: int,
    ):
        self._source, self._encode, self._known, self._parts = source, encode, known, parts
        self._n_files, self._files_per_part = len(source.paths), files_per_part
        self._per_slice, self._pool, self._workers = per_slice, pool, workers
        self.n_embedded = self.n_kept = 0

    def files(self, part: int) -> range:
        return range(
            part * self._files_per_part, min((part + 1) * self._files_per_part, self._n_files)
        )

    def run(
        self, mine: Sequence[int], missing: Sequence[int], progress: Callable | None = None
    ) -> None:
        """Makes the missing parts; those that others are at work on are waited for at the end."""
        total = sum(len(self.files(part)) for part in mine)
        done = total - sum(len(self.files(part)) for part in missing)
        files = [i for part in missing for i in self.files(part)]
        ahead = 2 * self._files_per_part
        sliced = map_in_order(self._source.piece, files, workers=self._workers, ahead=ahead)
        claimed_elsewhere = []
        if progress is not None:
            progress(done, total)
        for part in missing:
            pieces = list(islice(sliced, len(self.files(part))))
            with self._parts.claimed(part, wait=False) as got:
                if not got:
                    claimed_elsewhere.append(part)
                    continue
                if not self._parts.has(part):
                    self._make(part, pieces)
            done += len(pieces)
            if progress is not None:
                progress(done, total)
        for part in claimed_elsewhere:
            with self._parts.claimed(part, wait=True):
                if not self._parts.has(part):  # whoever claimed it was killed
                    self._make(part, [self._source.piece(i) for i in self.files(part)])

    def _make(self, part: int, pieces: Sequence[Piece | Rejection]) -> None:
        good = [piece for piece in pieces if isinstance(piece, Piece)]
        table = None
        if good:
            table, n_kept = _embed(good, self._encode, self._per_slice, self._pool, self._known)
            self.n_kept += n_kept
            self.n_embedded += len(good) - n_kept
        rejected = [piece for piece in pieces if isinstance(piece, Rejection)]
        self._parts.write(part, table, rejected)


def embed_pieces(
    pieces: Sequence[Piece],
    encode: "Encode",
    *,
    per_slice: bool = False,
    pool: str = "mean",
    fingerprint: str = "",
) -> Embeddings:
    """One row per file, `table.pool_slices` of its slices; or one row per slice."""
    return _embed(pieces, encode, per_slice, pool, KnownVectors(None), fingerprint)[0]


def _embed(
    pieces: Sequence[Piece],
    encode: "Encode",
    per_slice: bool,
    pool: str,
    known: KnownVectors,
    fingerprint: str = "",
) -> tuple[Embeddings, int]:
    """Rows of files, and of how many the vectors were known."""
    vectors = [known.rows(piece.sha256) for piece in pieces]
    new = [i for i, rows in enumerate(vectors) if rows is None]
    if new:
        encoded = encode([ids for i in new for ids in pieces[i].slices])
        ends = np.cumsum([len(pieces[i].slices) for i in new])
        for i, own in zip(new, np.split(encoded, ends[:-1]), strict=True):
            vectors[i] = own if per_slice else pool_slices(own, pool)[None]
    rows: list[tuple[Piece, str, np.ndarray, int]] = []
    for piece, own in zip(pieces, map(np.asarray, vectors), strict=True):
        if per_slice:
            rows += [(piece, f"{piece.path}#{n}", row, 1) for n, row in enumerate(own)]
        else:
            rows.append((piece, piece.path, own[0], len(piece.slices)))
    table = Embeddings(
        path=[path for _, path, _, _ in rows],
        sha256=[piece.sha256 for piece, _, _, _ in rows],
        embedding=np.stack([vector for _, _, vector, _ in rows]).astype(np.float32),
        n_slices=np.array([n for _, _, _, n in rows]),
        n_notes=np.array([piece.n_notes for piece, _, _, _ in rows]),
        duration_ms=np.array([piece.duration_ms for piece, _, _, _ in rows]),
        labels=[piece.labels for piece, _, _, _ in rows],
        fingerprint=fingerprint,
    )
    return table, len(pieces) - len(new)


class _Parts:
    """The parts of one export on disk; used by several processes at once."""

    def __init__(self, out: Path, identity: Identity, origin: str, n_parts: int):
        self._out, self._identity, self._origin, self._n_parts = out, identity, origin, n_parts
        self._folder = out.with_name(out.name + ".parts")
        self._rejected = out.with_name(out.name + ".rejected.jsonl")

    def finished(self) -> bool:
        """Whether OUT is there."""
        return read_identity(self._out) == self._identity

    def open(self, overwrite: bool) -> KnownVectors | None:
        """Makes the folder, or takes up the one a run before has left; None where OUT is finished.

        Returns:
            What is known already of the files' vectors.
        """
        if self._out.is_dir():
            raise UserError(f"{self._out} is a folder; name a file for the embeddings")
        with _locked(self._out.parent):
            storage.fetch(self._folder)
            storage.fetch(self._rejected)
            finished, unfinished = read_identity(self._out), self._unfinished()
            if finished == self._identity:
                # Killed between joining and tidying up, of which the identity may be gone already.
                if unfinished in (None, self._identity):
                    self._drop()
                self._send()
                return None
            if finished is None and self._out.exists() and not overwrite:
                raise UserError(
                    f"{self._out}: there is a file that does not say what it was made of; choose "
                    "another output, or --overwrite to replace it"
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
            write_atomically(self._folder / "identity.json", json.dumps(self._identity.to_json()))
            storage.upload(self._folder / "identity.json")
            return KnownVectors(self._out if update else None)

    def _unfinished(self) -> Identity | None:
        try:
            return Identity.from_json(json.loads((self._folder / "identity.json").read_text()))
        except FileNotFoundError:
            return None

    def _same_work(self, other: Identity) -> bool:
        """Whether vectors of unchanged files are still good: the same model and settings."""
        return (other.kind, other.version, other.settings) == (
            self._identity.kind, self._identity.version, self._identity.settings
        ) and not {
            name
            for name in other.inputs.keys() | self._identity.inputs.keys()
            if other.inputs.get(name) != self._identity.inputs.get(name)
        } - {"files", "labels"}  # fmt: skip

    @contextmanager
    def claimed(self, part: int, wait: bool) -> Iterator[bool]:
        """Whether this process is the one at work on a part; the claim goes with the process."""
        handle = os.open(self._path(part, "claim"), os.O_RDWR | os.O_CREAT)
        got = True
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                got = False
            except OSError:
                pass  # a disk without locks
            yield got
        finally:
            os.close(handle)

    def has(self, part: int) -> bool:
        return self._path(part, "jsonl").is_file()

    def write(self, part: int, table: Embeddings | None, rejected: Sequence[Rejection]) -> None:
        """Writes a part; its list of rejected files comes last and marks it done."""
        if table is not None:
            write_embeddings(table, self._path(part, "parquet"))
            storage.upload(self._path(part, "parquet"))
        rows = [
            {"path": r.path, "stage": "embed", "reason": r.reason, "value": r.message}
            for r in rejected
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self._path(part, "jsonl"), text)
        storage.upload(self._path(part, "jsonl"))

    def join(self) -> bool:
        """Makes OUT if all parts are there; False while other hosts are at work."""
        with _locked(self._out.parent):
            storage.fetch(self._folder)  # of other hosts too
            storage.fetch(self._out)
            if self.finished():
                return True  # another process was faster
            if not all(map(self.has, range(self._n_parts))):
                return False
            rejected = "".join(self._path(p, "jsonl").read_text() for p in range(self._n_parts))
            tables = [self._path(p, "parquet") for p in range(self._n_parts)]
            tables = [path for path in tables if path.is_file()]
            if rejected:
                write_atomically(self._rejected, rejected, beside=self._folder)
            else:
                storage.remove(self._rejected)
            if tables:
                join_embeddings(tables, self._out, self._identity, self._origin)
            self._send()
            self._drop()
            if not tables:
                raise UserError(f"nothing to embed: every file was rejected, see {self._rejected}")
            return True

    def _send(self) -> None:
        storage.upload(self._rejected)
        storage.upload(self._out)

    def _drop(self) -> None:
        if storage.is_remote(self._folder):
            storage.remove(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def count(self) -> tuple[int, int]:
        """Rows and rejected files of a finished export."""
        n_rejected = 0
        if self._rejected.is_file():
            n_rejected = len(self._rejected.read_text().splitlines())
        return open_parquet(self._out).metadata.num_rows, n_rejected

    def _path(self, part: int, suffix: str) -> Path:
        return self._folder / f"part-{part:05d}.{suffix}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process. Nothing where the disk has none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
