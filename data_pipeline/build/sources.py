"""Where MIDI files come from: a folder, an archive, Parquet, or a single file.

    folder                        searched recursively, linked folders too
    .zip, .tar                    read in place
    .tar.gz, .tar.bz2, .tar.xz    unpacked into one file for as long as the build takes
    .parquet, or a folder of it   rows with MIDI bytes, or what `build.series` reads; unpacked
                                  likewise
    .mid, .midi, .kar, .rmi       one file; with .gz after it also in all of the above

A table's MIDI column is one of bytes, or of {bytes, path} (Hugging Face). The other columns of
text, whole numbers and booleans are labels; without a column "split" the name of the file may say
it (test-00000-of-00001.parquet). The bytes are decoded once, into the spool.

Every source is listed in the same order (by the bytes of the path), so that a folder and what was
made of it give the same corpus.
"""

import errno
import hashlib
import json
import lzma
import re
import sqlite3
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.artifact import file_digest, synced
from data_pipeline.build.archives import (
    FILE_BYTES,
    BrokenArchiveError,
    add_tar,
    add_zip,
    gunzipped,
    is_zip,
    member_path,
    unzip,
)
from data_pipeline.build.listing import SUFFIXES, DiskTree, Entry, MemberTree, is_midi_name, walk
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.metadata_layouts import PATH_KEYS, SPLIT_NAMES

_BROKEN = (
    *(BrokenArchiveError, InvalidMidi, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError),
)


def no_midi_files(source: Path) -> UserError:
    """What to say of a source without any."""
    if (source / "manifest.json").is_file():
        return UserError(f"{source}: token shards are here, MIDI files are wanted")
    return UserError(f"{source}: no MIDI files ({', '.join(SUFFIXES)}) here or in its folders")


def list_source(source: Path, spool: Path, tables: Path) -> Iterator[Entry]:
    """Yields the MIDI files of a source sorted by path, also those that cannot be read.

    Args:
        source: see the module.
        spool: file that takes the MIDI bytes of a source without random access; untouched
            otherwise. Its folder also takes the index of an archive.
        tables: folder that takes the label tables of an archive, which are found beside its MIDI
            files or in the folder that holds all of them, and the labels of Parquet; not made
            otherwise.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    if source.is_dir():
        first = None
        for entry in walk_folder(source):
            first = first or entry
            yield entry
        if first is None and (files := parquet_files(source)):
            yield from _list_members(source, files, spool, tables)
    elif source.is_file() and is_midi_name(source.name):
        yield Entry(source.name, source.stat().st_size)
    elif source.is_file():
        yield from _list_members(source, [source], spool, tables)
    else:
        raise UserError(
            f"{source}: no such folder or archive; give the folder of your MIDI files, or a .tar, "
            ".zip or .parquet of them"
        )


def has_inner_tables(source: Path) -> bool:
    """Whether label tables are found by listing the source, and not beside its files."""
    if source.is_dir():
        return next(walk_folder(source), None) is None and bool(parquet_files(source))
    return source.is_file() and not is_midi_name(source.name)


def readable_root(source: Path, spool: Path) -> Path:
    """What `read_entry` reads from, once `list_source` was exhausted: folder, archive or spool."""
    if spool.is_file():
        return spool
    return source.parent if source.is_file() and is_midi_name(source.name) else source


def read_entry(root: Path, entry: Entry, max_bytes: int = FILE_BYTES) -> bytes:
    """The bytes of a MIDI file, unpacked.

    Args:
        root: see `readable_root`.
        max_bytes: that it may have.

    Raises:
        OSError: it cannot be read.
        InvalidMidi: what was listed as a fault, too large, or damaged in its archive.
    """
    if entry.fault:
        raise InvalidMidi(entry.fault, f"{entry.path}: {entry.fault} ({entry.detail})")
    if entry.offset < 0:
        with (root / entry.path).open("rb") as file:
            data = file.read(max_bytes + 1)
    else:
        with root.open("rb") as file:
            if entry.packed >= 0:
                data = unzip(file, entry, max_bytes)
            else:
                file.seek(entry.offset)
                data = file.read(min(entry.size, max_bytes + 1))
    if len(data) > max_bytes:
        raise InvalidMidi("too-large", f"{entry.path}: over {max_bytes:,} bytes")
    return gunzipped(data, entry.path, max_bytes)


def entry_digest(root: Path, entry: Entry) -> str | None:
    """sha256 of a file of a source, as it is in the folder; None where it cannot be read."""
    if entry.fault:
        return None
    try:
        if entry.offset < 0:
            return file_digest(root / entry.path)
        sha, left = hashlib.sha256(), entry.size
        with root.open("rb") as file:
            if entry.packed >= 0:
                return hashlib.sha256(unzip(file, entry, FILE_BYTES)).hexdigest()
            file.seek(entry.offset)
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                sha.update(block)
                left -= len(block)
        return sha.hexdigest()
    except (OSError, InvalidMidi):
        return None


def walk_folder(folder: Path) -> Iterator[Entry]:
    """Yields the MIDI files of a folder, sorted by path. Raises UserError."""
    try:
        yield from walk(DiskTree(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder ({error.strerror})") from error


def parquet_files(folder: Path) -> list[Path]:
    """Those in a folder and below, in order."""
    return sorted(path for path in folder.rglob("*.parquet") if path.is_file())


def _list_members(source: Path, files: list[Path], spool: Path, tables: Path) -> Iterator[Entry]:
    """Lists the archive, or the Parquet files, that `source` is or holds."""
    from data_pipeline.build.series import SCHEME, table_scheme

    any_name = all(table_scheme(file) == SCHEME for file in files)
    tree = MemberTree(spool.with_name("members"), any_name=any_name)
    try:
        if source.is_dir() or is_parquet(source):
            root = source if source.is_dir() else source.parent
            add_parquet(files, root, tree, spool, tables)
        elif is_zip(source):
            add_zip(source, tree, tables)
        else:
            add_tar(source, tree, spool, tables)
        tree.resolve_links()
        yield from walk(tree)
    except _BROKEN as error:
        if isinstance(error, UserError) and not isinstance(error, InvalidMidi):
            raise
        raise UserError(
            f"{source}: not a readable archive ({error}); give a folder, .tar, .tar.gz, .zip or "
            ".parquet"
        ) from error
    except sqlite3.OperationalError as error:
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), spool.parent) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error
    finally:
        tree.close()


LABELS = "metadata.jsonl"
_BATCH_ROWS = 32
_PATH_COLUMNS = (*PATH_KEYS, "file", "__key__")
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_./])({'|'.join(SPLIT_NAMES)})(?=[-_./]|$)")


def is_parquet(source: Path) -> bool:
    """Whether a file begins as Parquet does."""
    with source.open("rb") as file:
        return file.read(4) == b"PAR1"


def add_parquet(
    files: Sequence[Path], root: Path, tree: MemberTree, spool: Path, tables: Path
) -> None:
    """Adds a file for each row, called by its path or else by its number; makes the spool, and the
    table of the rows' labels.

    Args:
        root: folder that the names of several files are relative to.

    Raises:
        UserError: not Parquet, or without a column of MIDI bytes.
    """
    from data_pipeline.build.series import SCHEME, read_pairs, read_rows, table_scheme

    tables.mkdir(parents=True, exist_ok=True)
    with synced(spool) as out, synced(tables / LABELS, "w", encoding="ascii") as labels:
        for file in files:
            stem = file.relative_to(root).with_suffix("").as_posix()
            scheme = table_scheme(file)
            rows = read_rows(file) if scheme == SCHEME else read_pairs(file)
            rows = rows if scheme else _rows(file, stem)
            suffix, named = (".mid", _midi_path) if scheme != SCHEME else (".series", _plain_path)
            for number, (name, data, values, fault, detail) in enumerate(rows):
                numbered = f"{number:06d}{suffix}"
                numbered = numbered if len(files) == 1 else f"{stem}/{numbered}"
                path = named(name) if name else numbered
                if tree.has(path):  # names of one split may be those of another
                    path = numbered if tree.has(f"{stem}/{path}") else f"{stem}/{path}"
                if data is None:
                    detail = detail or f"row {number} of {file.name}"
                    tree.add(Entry(path, 0, fault=fault, detail=detail))
                elif len(data) > FILE_BYTES:
                    tree.add(Entry(path, len(data)))
                else:
                    tree.add(Entry(path, len(data), out.tell()))
                    out.write(data)
                labels.write(json.dumps({"path": path, **values}) + "\n")


class Row(NamedTuple):
    """What becomes a file of a source.

    Attributes:
        name: its path; "" where none is given.
        data: its bytes; None where it cannot be used.
        labels: as far as they are known.
        fault, detail: why there are no bytes.
    """

    name: str
    data: bytes | None
    labels: dict[str, Any]
    fault: str = "no-bytes"
    detail: str = ""


def _rows(file: Path, stem: str) -> Iterator[Row]:
    """Of a table with MIDI bytes."""
    import pyarrow as pa

    try:
        with file.open("rb") as stream:  # pyarrow opens no name that is not UTF-8
            yield from _rows_of(stream, file, stem)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a readable Parquet file ({text})") from error


def _rows_of(stream: BinaryIO, file: Path, stem: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream)
    schema = table.schema_arrow
    midi = _midi_column(file, schema)
    path = next((n for n in _PATH_COLUMNS if n in schema.names and _is_text(schema, n)), None)
    classes = _class_names(schema)
    columns = [n for n in schema.names if n not in (midi, path) and _is_label(schema, n)]
    said = _SPLIT_IN_NAME.findall(stem.lower())
    split = {"split": said[-1]} if said and "split" not in columns else {}
    wanted = [midi, *columns, *([path] if path else [])]
    for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
        for row in batch.to_pylist():
            data, name = row[midi], row[path] if path else None
            if isinstance(data, dict):
                name = name or data.get("path")
                data = data["bytes"]
            values = {n: _class_name(row[n], classes.get(n)) for n in columns}
            yield Row(name or "", data, {**values, **split})


def _midi_column(file: Path, schema: Any) -> str:
    """The one column of bytes, or of several the one that is called after MIDI."""
    import pyarrow.types as kinds

    def is_bytes(kind: Any) -> bool:
        if kinds.is_struct(kind) and (at := kind.get_field_index("bytes")) >= 0:
            return is_bytes(kind.field(at).type)
        return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)

    found = [field.name for field in schema if is_bytes(field.type)]
    named = [name for name in found if "mid" in name.lower()]
    if len(found) != 1 and len(named) != 1:
        wrong = "no column" if not found else f"several columns ({', '.join(found)})"
        raise UserError(
            f"{file}: {wrong} of MIDI bytes among {', '.join(schema.names)}; expected one of bytes "
            'or of {bytes, path}, called "midi" if there are others'
        )
    return named[0] if len(named) == 1 else found[0]


def _is_text(schema: Any, name: str) -> bool:
    import pyarrow.types as kinds

    kind = schema.field(name).type
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _is_label(schema: Any, name: str) -> bool:
    import pyarrow.types as kinds

    kind = schema.field(name).type
    return _is_text(schema, name) or kinds.is_integer(kind) or kinds.is_boolean(kind)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Of columns that hold the number of a class: Hugging Face's ClassLabel."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: f["names"] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _class_name(value: Any, names: Sequence[str] | None) -> Any:
    if not names or type(value) is not int:
        return value
    return names[value] if 0 <= value < len(names) else None


def _plain_path(name: str) -> str:
    return member_path(name.replace("\\", "/")) or "unnamed"


def _midi_path(name: str) -> str:
    path = member_path(name.replace("\\", "/"))
    return path if is_midi_name(path.rpartition("/")[2]) else path + ".mid"
