"""Embeddings of many files, in parts that survive a kill and that any number of hosts share.

A finished OUT of the same model and settings is brought up to date: vectors of files that have not
changed are kept, whatever became of their labels, names and neighbours. How parts are kept and
shared out: see `parts`.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aria_jax.embed.parts import Parts
from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.embed.table import Embeddings, Rows, pool_slices
from data_pipeline import storage
from data_pipeline.artifact import Identity, new_folder
from data_pipeline.errors import UserError
from data_pipeline.workers import MAX_RAY_RETRIES, map_in_order, ray_cluster

if TYPE_CHECKING:
    from aria_jax.embed.encode import Encode

KIND = "embeddings"
VERSION = 1
"""Of what an export makes of its inputs; one more when the same inputs give other numbers."""
FILES_PER_PART = 256
"""Bounds the memory and what a kill can lose, and still gives full batches of like length."""
TOKENS_AT_ONCE = 1 << 18
"""Of files that are encoded together, between two looks at how far it is."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
"""Before looking again whether others are done: at first, and at last."""


@dataclass(frozen=True)
class ExportSummary:
    """What an export did.

    Attributes:
        n_files: files of the source.
        n_rows, n_rejected: in OUT; 0 as long as it is not complete.
        n_parts, n_parts_before: of the export, and those that were made before this run.
        complete: whether OUT is there; False of a helper, see `export`.
        n_embedded, n_kept: files embedded by this process, and those whose vectors were still good.
        changes: number of files "new", "changed", "renamed", "gone" and "kept" since OUT was made
            before; None where it was not, or where another process has brought it up to date.
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
    changes: dict[str, int] | None = None
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
    float16: bool = False,
    as_dataset: bool = False,
    workers: int = 0,
    host_index: int | None = None,
    host_count: int = 1,
    helper: bool = False,
    helped_by: Callable[[], object] | None = None,
    files_per_part: int = FILES_PER_PART,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Embeds every file of `source`, goes on where a killed run stopped, does nothing when done.

    Other processes may do the same at once, on this machine or on others that see `out`.

    Args:
        settings: all that the numbers depend on besides the files; "fingerprint" of the model
            must be among them.
        origin: where the files are, noted in OUT for whoever wants to show them.
        per_slice: one row per slice (path#0, path#1, …) instead of one per file.
        pool: what a file's row is of its slices, see `table.pool_slices`.
        float16: numbers of two bytes in OUT.
        as_dataset: OUT is a folder of Parquet files, one for each part.
        workers: processes that read and tokenise.
        host_index, host_count: where in the list this process begins.
        helper: leaves when all parts are done, and another process makes OUT of them.
        helped_by: called again and again until others have made all parts; this process makes none.
        overwrite: replaces embeddings by another model or with other settings.

    Raises:
        UserError: there are other embeddings, or the beginning of some; every file was rejected.
    """
    out, paths = storage.local(out), source.paths
    settings = {**settings, "per_slice": per_slice, "files_per_part": files_per_part}
    if pool != "mean":  # which every file without this setting is
        settings["pool_slices"] = pool
    settings |= {"numbers": "float16"} if float16 else {}
    settings |= {"layout": "data set"} if as_dataset else {}
    model = str(settings.pop("fingerprint"))
    identity = Identity(KIND, VERSION, {"model": model, **source.digests()}, settings)
    n_parts = -(-len(paths) // files_per_part)
    begin = None if host_index is None else n_parts * host_index // host_count
    parts = Parts(
        out, identity, storage.url(origin), n_parts,
        as_dataset=as_dataset, float16=float16, begin=begin,
    )  # fmt: skip
    with new_folder(out.parent):
        if not parts.open(overwrite):
            return ExportSummary(
                len(paths), *parts.count(), n_parts, n_parts, True, done_before=True
            )
        before, complete, changes = len(parts.done), not helper, None
        known = KnownVectors(parts.before)
        work = _Work(source, encode, known, parts, files_per_part, per_slice, pool, workers)
        try:
            work.run(progress, helped_by)
            if not helper:
                changes = _joined(parts)
        except FileNotFoundError:
            if not parts.gone():
                raise
            complete = parts.finished()  # by another process; in a bucket that is seen there only
        finally:
            parts.close()
        n_rows, n_rejected = parts.count() if complete else (0, 0)
        return ExportSummary(
            len(paths), n_rows, n_rejected, n_parts, before, complete, work.n_embedded, work.n_kept,
            changes,
        )  # fmt: skip


def _joined(parts: Parts) -> dict[str, int] | None:
    """Makes OUT, which one process does while the others wait until they find no parts."""
    waits = _waits()
    while not parts.claim_join():
        next(waits)
    return parts.join()


def _waits() -> Iterator[None]:
    """Lets time pass, at each turn more."""
    wait = _SHORTEST_WAIT_S
    while True:
        time.sleep(wait)
        wait = min(1.5 * wait, _LONGEST_WAIT_S)
        yield


class KnownVectors:
    """Rows of a finished export by the sha256 of the MIDI file they are of.

    Holds the digests and a few row groups in memory.

    Args:
        rows: None knows nothing.
    """

    def __init__(self, rows: Rows | None):
        self._spans: dict[str, tuple[int, int, int]] = {}
        if rows is None:
            return
        self._group = lru_cache(maxsize=4)(rows.vectors)
        for _, sha256, group, start, stop in rows.files():
            if sha256:
                self._spans.setdefault(sha256, (group, start, stop))

    def rows(self, sha256: str) -> np.ndarray | None:
        """float32 [rows of the file, E]; None where they are not known."""
        if sha256 not in self._spans:
            return None
        group, start, stop = self._spans[sha256]
        return self._group(group)[start:stop]


class _Work:
    """The parts that one process makes, and how many files that took."""

    def __init__(
        self,
        source: Source,
        encode: "Encode",
        known: KnownVectors,
        parts: Parts,
        files_per_part: int,
        per_slice: bool,
        pool: str,
        workers: int,
    ):
        self._source, self._encode, self._known, self._parts = source, encode, known, parts
        self._n_files, self._files_per_part = len(source.paths), files_per_part
        self._per_slice, self._pool, self._workers = per_slice, pool, workers
        self._claimed: deque[int] = deque()
        self._progress: Callable[[int, int], None] | None = None
        self.n_embedded = self.n_kept = 0

    def run(
        self,
        progress: Callable[[int, int], None] | None = None,
        helped_by: Callable[[], object] | None = None,
    ) -> None:
        """Makes parts until all are done, by this process or others; those come last that another
        process is at work on.
        """
        self._progress = progress
        waits = _waits()
        while self._n_left():
            if helped_by is None:
                self._make_free_parts()
            else:
                helped_by()
            if self._n_left():
                next(waits)

    def _n_left(self) -> int:
        n_parts = -(-self._n_files // self._files_per_part)
        left = n_parts - self._parts.look()
        self._tell()
        return left

    def _tell(self, n_of_part: int = 0) -> None:
        if self._progress is not None:
            done = sum(len(self._files(part)) for part in self._parts.done)
            self._progress(done + n_of_part, self._n_files)

    def _files(self, part: int) -> range:
        return range(
            part * self._files_per_part, min((part + 1) * self._files_per_part, self._n_files)
        )

    def _make_free_parts(self) -> None:
        """Claims parts while their files are read ahead, and makes them in this order."""
        pieces: list[Piece | Rejection] = []
        for piece in map_in_order(
            self._source.piece,
            self._claimed_files(),
            workers=self._workers,
            ahead=2 * self._files_per_part,
        ):
            pieces.append(piece)
            if len(pieces) == len(self._files(self._claimed[0])):
                self._make(self._claimed.popleft(), pieces)
                pieces = []

    def _claimed_files(self) -> Iterator[int]:
        while (part := self._parts.claim()) is not None:
            self._claimed.append(part)
            yield from self._files(part)

    def _make(self, part: int, pieces: Sequence[Piece | Rejection]) -> None:
        good = [piece for piece in pieces if isinstance(piece, Piece)]
        table = None
        if good:
            table, n_kept = _embed(
                good, self._encode, self._per_slice, self._pool, self._known, tell=self._tell
            )
            self.n_kept += n_kept
            self.n_embedded += len(good) - n_kept
        rejected = [piece for piece in pieces if isinstance(piece, Rejection)]
        self._parts.write(part, table, rejected)
        self._parts.look()
        self._tell()


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
    tell: Callable[[int], None] = lambda n_pieces: None,
) -> tuple[Embeddings, int]:
    """Rows of files, and of how many the vectors were known."""
    vectors = [known.rows(piece.sha256) for piece in pieces]
    new = [i for i, rows in enumerate(vectors) if rows is None]
    for group in _groups(pieces, new) if new else ():
        encoded = encode([ids for i in group for ids in pieces[i].slices])
        ends = np.cumsum([len(pieces[i].slices) for i in group])
        for i, own in zip(group, np.split(encoded, ends[:-1]), strict=True):
            vectors[i] = own if per_slice else pool_slices(own, pool)[None]
        tell(int(group[-1]) + 1)
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


def _groups(pieces: Sequence[Piece], chosen: Sequence[int]) -> list[np.ndarray]:
    """Those of the pieces that are chosen, in order, by about `TOKENS_AT_ONCE`."""
    ends = np.cumsum([sum(map(len, pieces[i].slices)) for i in chosen])
    return np.split(np.array(chosen), np.flatnonzero(np.diff(ends // TOKENS_AT_ONCE)) + 1)


@contextmanager
def ray_helpers(
    prepare: Callable[[], Callable[[int, int], object]],
) -> Iterator[Callable[[], None]]:
    """Starts a helper on each GPU of a Ray cluster, or else on each node; see `export`.

    One whose node dies is started again where there is room, and the others make its parts. All
    nodes must see source, model and output under the same names.

    Args:
        prepare: loads a model, once on each; what it returns is told number and count of helpers.

    Yields:
        What looks after them; it raises what one of them ended with.
    """
    with ray_cluster(os.cpu_count() or 1) as ray:
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        n = n_gpus or sum(node["Alive"] for node in ray.nodes())
        taken: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(**({"num_gpus": 1} if n_gpus else taken))(_Helper)
        at_work: dict[Any, tuple[int, Any]] = {}
        deaths: list[int] = []

        def start(number: int) -> None:
            helper = actor.remote(prepare)
            at_work[helper.help.remote(number, n)] = number, helper

        def look_after() -> None:
            ended, _ = ray.wait(list(at_work), timeout=0) if at_work else ([], [])
            for reference in ended:
                number, _ = at_work.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise UserError(str(error.cause)) from error
                    raise
                except ray.exceptions.RayError as error:
                    deaths.append(number)
                    if len(deaths) > MAX_RAY_RETRIES:
                        raise UserError(
                            f"{len(deaths)} processes of the Ray cluster died "
                            f"({type(error).__name__}); look at the cluster, then run the same "
                            "command again"
                        ) from error
                    start(number)

        for number in range(n):
            start(number)
        try:
            yield look_after
        finally:
            for _, helper in at_work.values():
                ray.kill(helper)


class _Helper:
    """A process of a Ray cluster that holds a model."""

    def __init__(self, prepare: Callable[[], Callable[[int, int], object]]):
        self._help = prepare()

    def help(self, number: int, count: int) -> None:
        self._help(number, count)
