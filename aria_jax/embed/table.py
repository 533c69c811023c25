"""Embeddings on disk: one Parquet row per file, readable by anything that reads Parquet.

    emb.parquet                     one file, a row group a part of the export
    emb/part-00003-1a2b3c4d.parquet or a data set: a file a part
    emb/_metadata                   names the parts that count; written last

Other models' embeddings are read too: Parquet with a column "embedding" of lists and any other
columns, or NPZ with an array "embedding" [N, E] and any arrays of N. Columns of text are labels.
"""

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import storage
from data_pipeline.artifact import Identity, atomic, write_atomically
from data_pipeline.errors import UserError, check_file
from data_pipeline.shards import READING_BEFORE

if TYPE_CHECKING:
    from pyarrow import Schema, Table
    from pyarrow.parquet import ParquetFile

_COLUMNS = ("path", "sha256", "embedding", "n_slices", "n_notes", "duration_ms", "labels")
_SETTINGS = b"export_settings"
_IDENTITY = b"identity"
_ORIGIN = b"origin"
_FINGERPRINT = b"model_fingerprint"
SUMMARY = "_metadata"
"""Parquet's own name for the schema and the row groups of all parts of a data set."""
BLOCK_ROWS = 65_536
"""Rows read at a time: 128 MiB at 512 numbers each."""
_SLICE = re.compile(r"#\d+$")


@dataclass(frozen=True)
class Embeddings:
    """Rows of an embeddings file.

    Attributes:
        path, sha256: of each file; row numbers and "" where another program left them out.
        embedding: float32 [N, E].
        n_slices, n_notes, duration_ms: int64 [N]; 0 where unknown.
        labels: what is known of each file, e.g. {"composer": "bach", "split": "val"}.
        fingerprint: of the model that made them; "" where unknown.
    """

    path: Sequence[str]
    sha256: Sequence[str]
    embedding: np.ndarray
    n_slices: np.ndarray
    n_notes: np.ndarray
    duration_ms: np.ndarray
    labels: Sequence[dict[str, str]]
    fingerprint: str

    def column(self, label: str) -> list[str | None]:
        """One label of every file, None where it is unknown."""
        return [row.get(label) for row in self.labels]

    def files(self) -> list[str]:
        """The file of each row: rows of slices are called path#0, path#1, …"""
        return [_SLICE.sub("", path) for path in self.path]

    def label_names(self) -> list[str]:
        """Labels that at least one file has."""
        return sorted({name for row in self.labels for name in row})


SLICE_POOLS = ("mean", "mean+std")
"""How slices become one vector of their file."""


def check_slice_pool(how: str) -> str:
    """Gives back one of `SLICE_POOLS`; UserError for anything else."""
    if how not in SLICE_POOLS:
        raise UserError(f"slices are pooled by {' or '.join(SLICE_POOLS)}, not by {how!r}")
    return how


def pool_slices(slices_SxE: np.ndarray, how: str = "mean") -> np.ndarray:
    """One vector of the slices of a file, float [E], or [2E] with "mean+std".

    "mean" is the reference's. "mean+std" adds the standard deviation over slices (0 for a single
    one): how much a piece changes, which its mean cannot tell.
    """
    mean_E = slices_SxE.mean(axis=0)
    if check_slice_pool(how) == "mean":
        return mean_E
    return np.concatenate([mean_E, slices_SxE.std(axis=0)])


def write_embeddings(table: Embeddings, out: str | Path, *, float16: bool = False) -> None:
    """Writes the file whole or not at all.

    Args:
        float16: numbers of two bytes, of three digits; half the file.

    Raises:
        UserError: a number is too large for float16.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = table.embedding.shape[1]
    kind = np.float16 if float16 else np.float32
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(table.embedding, kind)
    if not np.array_equal(np.isfinite(numbers), np.isfinite(table.embedding)):
        raise UserError(f"{out}: numbers beyond 65,504 are none of float16; write float32")
    flat = pa.array(numbers.reshape(-1))
    columns = {
        "path": pa.array(table.path, pa.string()),
        "sha256": pa.array(table.sha256, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
        "n_slices": pa.array(table.n_slices, pa.int32()),
        "n_notes": pa.array(table.n_notes, pa.int32()),
        "duration_ms": pa.array(table.duration_ms, pa.int64()),
        "labels": pa.array(
            [list(r.items()) for r in table.labels], pa.map_(pa.string(), pa.string())
        ),
    }
    content = pa.table(columns).replace_schema_metadata({_FINGERPRINT: table.fingerprint})
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as partial, open(partial, "wb") as stream:
        pq.write_table(content, stream)


def open_parquet(path: str | Path) -> "ParquetFile":
    """Opens a Parquet file, mapped into memory; pyarrow itself opens only names that are UTF-8.

    Raises:
        ArrowInvalid: it is not one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    return pq.ParquetFile(pa.BufferReader(pa.py_buffer(content)))


def _summary(parts: Sequence[Path], schema: "Schema") -> bytes:
    """Parquet without rows that has the row groups of other files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty, made = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.ParquetWriter(empty, schema).close()
    summary = pq.read_metadata(pa.BufferReader(empty.getvalue()))
    for part in parts:
        (groups := open_parquet(part).metadata).set_file_path(part.name)
        summary.append_row_groups(groups)
    summary.write_metadata_file(made)
    return made.getvalue().to_pybytes()


class Rows:
    """The rows of a Parquet file, or of a data set's parts one after the other; a few are open.

    Attributes:
        schema: with the metadata of the whole.
        sizes: rows of each group.

    Raises:
        ArrowInvalid: it is not Parquet.
    """

    def __init__(self, path: Path):
        whole = open_parquet(path / SUMMARY if path.is_dir() else path)
        self.schema = whole.schema_arrow
        groups = [whole.metadata.row_group(g) for g in range(whole.num_row_groups)]
        self.sizes = [group.num_rows for group in groups]
        names = [group.column(0).file_path for group in groups]  # "" of the file itself
        self._at = [(path / name, i) for name, own in groupby(names) for i, _ in enumerate(own)]
        self._opened: Callable[[Path], ParquetFile] = lambda _: whole
        if path.is_dir():
            self._opened = lru_cache(64)(open_parquet)

    def group(self, number: int, columns: Sequence[str] | None = None) -> "Table":
        """The columns of a row group."""
        file, own = self._at[number]
        return self._opened(file).read_row_group(own, columns=columns)

    def files(self) -> Iterator[tuple[str, str, int, int, int]]:
        """Of each file its path, sha256, row group, and its rows in it: from, to."""
        for number in range(len(self.sizes)):
            names = self.group(number, ["path", "sha256"]).to_pydict()
            rows, start = zip(names["path"], names["sha256"], strict=True), 0
            for (path, sha256), own in groupby((_SLICE.sub("", path), sha) for path, sha in rows):
                stop = start + len(list(own))
                yield path, sha256, number, start, stop
                start = stop

    def vectors(self, first: int, last: int | None = None) -> np.ndarray:
        """float32 [rows, E] of one row group, or of several of a file.

        Raises:
            UserError: they are not lists of one length.
        """
        file, own = self._at[first]
        groups = range(own, own + (first if last is None else last) - first + 1)
        column = self._opened(file).read_row_groups(groups, columns=["embedding"])["embedding"]
        return _as_matrix(column.combine_chunks(), file).astype(np.float32, copy=False)

    def blocks(self) -> Iterator[np.ndarray]:
        """All vectors, float32 [n, E] at a time, n at most `BLOCK_ROWS` but for large groups."""
        start, n_groups = 0, len(self.sizes)
        for stop in range(1, n_groups + 1):
            if (
                stop == n_groups
                or self._at[stop][0] != self._at[start][0]
                or sum(self.sizes[start : stop + 1]) > BLOCK_ROWS
            ):
                yield self.vectors(start, stop - 1)
                start = stop


def join_embeddings(parts: Sequence[Path], out: Path, identity: Identity, origin: str) -> None:
    """One of several files. Holds one of them in memory at a time.

    Args:
        parts: in order; where they lie in `out` it is a data set, and their summary is written.
            Else `out` becomes one file of all, a row group each.
    """
    import pyarrow.parquet as pq

    metadata = {
        _FINGERPRINT: identity.inputs["model"],
        _SETTINGS: json.dumps({**identity.settings, "fingerprint": identity.inputs["model"]}),
        _IDENTITY: json.dumps(identity.to_json()),
        _ORIGIN: os.fsencode(origin),
    }
    schema = open_parquet(parts[0]).schema_arrow.with_metadata(metadata)
    if parts[0].parent == out:
        write_atomically(out / SUMMARY, _summary(parts, schema))
        return
    with (
        atomic(out, beside=parts[0].parent) as partial,
        open(partial, "wb") as stream,
        pq.ParquetWriter(stream, schema) as writer,
    ):
        for part in parts:
            writer.write_table(open_parquet(part).read().replace_schema_metadata(metadata))


def read_identity(path: Path) -> Identity | None:
    """What a finished export is made of; None if there is none, or one that does not say."""
    return Identity.from_json(json.loads(_metadata(path).get(_IDENTITY, b"null")))


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a finished export was made with.

    Raises:
        UserError: no such file, or none of `aria-jax embed`.
    """
    kept = _metadata(find_embeddings(path)).get(_SETTINGS)
    settings = {} if kept is None else {"reading": READING_BEFORE, **json.loads(kept)}
    if "slice_notes" not in settings:
        raise UserError(f"{path}: not made by `aria-jax embed`")
    return settings


def read_origin(path: Path) -> str:
    """Where the files of an export were; "" if it does not say."""
    return os.fsdecode(_metadata(path).get(_ORIGIN, b""))


def _metadata(path: Path) -> dict[bytes, bytes]:
    import pyarrow as pa

    path = path / SUMMARY if path.is_dir() else path
    if not path.is_file():
        return {}
    try:
        return open_parquet(path).schema_arrow.metadata or {}
    except pa.ArrowInvalid:
        return {}


def find_embeddings(path: str | Path) -> Path:
    """Where embeddings lie on this disk, brought there from a bucket: a file, or a data set.

    Raises:
        UserError: neither is there.
    """
    if isinstance(path, str | Path) and ((place := storage.local(path)) / SUMMARY).is_file():
        return place
    return check_file(path, "an embeddings file of `aria-jax embed`")


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads an embeddings file or data set, of `aria-jax embed` or another program's.

    Raises:
        UserError: no such file, neither Parquet nor NPZ, or no embeddings in it.
    """
    path = find_embeddings(path)
    columns, fingerprint = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    if "embedding" not in columns:
        raise UserError(
            f'{path}: no "embedding" among {", ".join(columns) or "its columns"}; '
            "expected a column of lists (Parquet) or an array [N, E] (NPZ)"
        )
    embedding = np.asarray(columns["embedding"], np.float32)
    n = len(embedding)
    if embedding.ndim != 2 or not n or not np.isfinite(embedding).all():
        raise UserError(f"{path}: embeddings must be finite numbers, [N, E], not {embedding.shape}")
    maps = columns.get("labels", [()] * n)
    flat = {
        name: values
        for name, values in columns.items()
        if name not in _COLUMNS and len(values) == n and isinstance(values[0], str | None)
    }
    labels = [
        {**{k: v[i] for k, v in flat.items() if v[i] is not None}, **dict(maps[i] or ())}
        for i in range(n)
    ]
    return Embeddings(
        path=list(columns.get("path", map(str, range(n)))),
        sha256=list(columns.get("sha256", [""] * n)),
        embedding=embedding,
        **{
            name: np.asarray(columns.get(name, np.zeros(n, np.int64)))
            for name in ("n_slices", "n_notes", "duration_ms")
        },
        labels=labels,
        fingerprint=fingerprint,
    )


def with_metadata(table: Embeddings, metadata: str | Path) -> Embeddings:
    """`table` with the labels that a metadata file has for its paths.

    Raises:
        UserError: unusable metadata, or none of the files is in it.
    """
    from data_pipeline.metadata import load_labels

    labels = load_labels(Path(metadata).parent, metadata)
    found = [labels.labels_for(file) for file in table.files()]
    if not any(found):
        raise UserError(f"{metadata}: says nothing about the files of these embeddings, such as "
                        f"{table.path[0]}")  # fmt: skip
    merged = [{**own, **new} for own, new in zip(table.labels, found, strict=True)]
    return replace(table, labels=merged)


def _read_parquet(path: Path) -> tuple[dict[str, Any], str]:
    import pyarrow as pa

    try:
        rows = Rows(path)
        groups = [rows.group(number) for number in range(len(rows.sizes))]
        content = pa.concat_tables(groups or [rows.schema.empty_table()])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None
    columns: dict[str, Any] = {}
    for name in content.column_names:
        column = content[name].combine_chunks()
        if name == "embedding" and column.null_count == 0 and len(column):
            columns[name] = _as_matrix(column, path)
        elif name in ("n_slices", "n_notes", "duration_ms"):
            columns[name] = column.to_numpy(zero_copy_only=False)
        else:
            columns[name] = column.to_pylist()
    metadata = rows.schema.metadata or {}
    return columns, metadata.get(_FINGERPRINT, b"").decode()


def _as_matrix(column: Any, path: Path) -> np.ndarray:
    try:
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    except (AttributeError, ValueError):
        raise UserError(f"{path}: the embeddings are not lists of one length") from None


def _read_npz(path: Path) -> tuple[dict[str, Any], str]:
    import zipfile

    try:
        with np.load(path) as content:
            columns = {name: content[name] for name in content.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an NPZ file of plain arrays ({error})") from None
    text = {name: v.tolist() for name, v in columns.items() if v.ndim == 1 and v.dtype.kind in "US"}
    return {**columns, **text}, ""
