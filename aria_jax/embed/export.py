"""Embeddings of many files, in parts that survive a kill.

    OUT.parts/settings.json        what the parts were made with; another export is refused
    OUT.parts/part-00003.parquet   rows of files 3 * 256 … 4 * 256 - 1
    OUT.parts/part-00003.jsonl     its rejected files; written last, marks it done
    OUT                            one Parquet file, a row group a part, once all are there

Parts do not depend on the number of hosts: host h of H makes parts h, h + H, …, and whoever
finishes the last one joins them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from aria_jax.embed.encode import Encode
from aria_jax.embed.pieces import Piece, Rejection, Source
from aria_jax.embed.table import Embeddings, join_embeddings, read_settings, write_embeddings
from data_pipeline.errors import UserError
from data_pipeline.pool import map_in_order

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
    """

    n_files: int
    n_rows: int
    n_rejected: int
    n_parts: int
    n_parts_before: int
    complete: bool


def export(
    source: Source,
    encode: Encode,
    out: str | Path,
    *,
    settings: dict[str, str | int | bool],
    origin: str | Path = "",
    per_slice: bool = False,
    workers: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    files_per_part: int = FILES_PER_PART,
    progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Embeds every file of `source`, goes on where a killed run stopped, does nothing when done.

    Args:
        settings: all that the numbers depend on; "fingerprint" must be among them.
        origin: where the files are, noted in OUT for whoever wants to show them.
        per_slice: one row per slice (path#0, path#1, …) instead of one per file, their mean.
        workers: processes that read and tokenise.

    Raises:
        UserError: OUT.parts holds another export, or every file was rejected.
    """
    out = Path(out)
    paths = source.paths
    settings = {
        **settings,
        "per_slice": per_slice,
        "files_per_part": files_per_part,
        "files": hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16],
    }
    n_parts = -(-len(paths) // files_per_part)
    parts = _Parts(out, settings, str(origin), n_parts)
    if read_settings(out) == settings:
        n_rows, n_rejected = parts.count()
        return ExportSummary(len(paths), n_rows, n_rejected, n_parts, n_parts, True)
    parts.open()
    mine = [p for p in range(host_index, n_parts, host_count)]
    missing = [p for p in mine if not parts.has(p)]
    ranges = [range(p * files_per_part, min((p + 1) * files_per_part, len(paths))) for p in missing]
    files = [i for part in ranges for i in part]
    cut = map_in_order(source.cut, files, workers=workers, ahead=2 * files_per_part)
    total = sum(min(files_per_part, len(paths) - p * files_per_part) for p in mine)
    done = total - len(files)
    for part, own in zip(missing, ranges, strict=True):
        pieces = list(islice(cut, len(own)))
        good = [piece for piece in pieces if isinstance(piece, Piece)]
        table = embed_pieces(good, encode, per_slice=per_slice) if good else None
        parts.write(part, table, [piece for piece in pieces if isinstance(piece, Rejection)])
        done += len(own)
        if progress is not None:
            progress(done, total)
    complete = parts.join()
    n_rows, n_rejected = parts.count() if complete else (0, 0)
    before = len(mine) - len(missing)
    return ExportSummary(len(paths), n_rows, n_rejected, n_parts, before, complete)


def embed_pieces(
    pieces: Sequence[Piece], encode: Encode, *, per_slice: bool = False, fingerprint: str = ""
) -> Embeddings:
    """One row per file, the plain mean of its slices; or one row per slice."""
    encoded = encode([ids for piece in pieces for ids in piece.slices])
    ends = np.cumsum([len(piece.slices) for piece in pieces])
    rows: list[tuple[Piece, str, np.ndarray, int]] = []
    for piece, own in zip(pieces, np.split(encoded, ends[:-1]), strict=True):
        if per_slice:
            rows += [(piece, f"{piece.path}#{i}", row, 1) for i, row in enumerate(own)]
        else:
            rows.append((piece, piece.path, own.mean(0), len(own)))
    return Embeddings(
        path=[path for _, path, _, _ in rows],
        sha256=[piece.sha256 for piece, _, _, _ in rows],
        embedding=np.stack([vector for _, _, vector, _ in rows]).astype(np.float32),
        n_slices=np.array([n for _, _, _, n in rows]),
        n_notes=np.array([piece.n_notes for piece, _, _, _ in rows]),
        duration_ms=np.array([piece.duration_ms for piece, _, _, _ in rows]),
        labels=[piece.labels for piece, _, _, _ in rows],
        fingerprint=fingerprint,
    )


class _Parts:
    """The parts of one export on disk."""

    def __init__(self, out: Path, settings: dict, origin: str, n_parts: int):
        self._out, self._settings, self._n_parts = out, settings, n_parts
        self._origin = origin
        self._folder = out.with_name(out.name + ".parts")
        self._joining = out.with_name(out.name + ".joining")
        self._rejected = out.with_name(out.name + ".rejected.jsonl")

    def open(self) -> None:
        """Makes the folder, or takes up the one a run before has left."""
        if self._out.is_dir():
            raise UserError(f"{self._out} is a folder; name a file for the embeddings")
        if self._joining.is_dir() and not self._folder.exists():
            self._joining.rename(self._folder)  # killed while it joined
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = self._folder / "settings.json"
        if kept.is_file() and json.loads(kept.read_text()) != self._settings:
            raise UserError(
                f"{self._folder} holds the beginning of another export (other model, files or "
                "settings); delete that folder, or name another output"
            )
        _write(kept, json.dumps(self._settings))

    def has(self, part: int) -> bool:
        return self._path(part, "jsonl").is_file()

    def write(self, part: int, table: Embeddings | None, rejected: Sequence[Rejection]) -> None:
        """Writes a part; its list of rejected files comes last and marks it done."""
        if table is not None:
            write_embeddings(table, self._path(part, "parquet"))
        rows = [
            {"path": r.path, "stage": "embed", "reason": r.reason, "value": r.message}
            for r in rejected
        ]
        _write(self._path(part, "jsonl"), "".join(json.dumps(row) + "\n" for row in rows))

    def join(self) -> bool:
        """Makes OUT if all parts are there; False while other hosts are at work."""
        if not all(map(self.has, range(self._n_parts))):
            return False
        rejected = "".join(self._path(p, "jsonl").read_text() for p in range(self._n_parts))
        tables = [self._path(p, "parquet") for p in range(self._n_parts)]
        names = [path.name for path in tables if path.is_file()]
        if rejected:
            _write(self._rejected, rejected)
        else:
            self._rejected.unlink(missing_ok=True)
        if not names:
            shutil.rmtree(self._folder)
            raise UserError(f"nothing to embed: every file was rejected, see {self._rejected}")
        try:
            self._folder.rename(self._joining)
        except FileNotFoundError:
            return True  # another host was faster
        paths = [self._joining / name for name in names]
        join_embeddings(paths, self._out, self._settings, self._origin)
        shutil.rmtree(self._joining)
        return True

    def count(self) -> tuple[int, int]:
        """Rows and rejected files of a finished export."""
        import pyarrow.parquet as pq

        n_rejected = 0
        if self._rejected.is_file():
            n_rejected = len(self._rejected.read_text().splitlines())
        return pq.ParquetFile(self._out).metadata.num_rows, n_rejected

    def _path(self, part: int, suffix: str) -> Path:
        return self._folder / f"part-{part:05d}.{suffix}"


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
