"""Parquet files with a column of MIDI bytes, as hubs ship data sets: a tree of rows.

The column is one of bytes, or of {bytes, path} (Hugging Face). The other columns of text, whole
numbers and booleans are labels; without a column "split" the name of the file may say it
(test-00000-of-00001.parquet). The bytes are decoded once, into the spool.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.building.archives import FILE_BYTES, member_path
from data_pipeline.building.listing import Entry, MemberTree, is_midi_name
from data_pipeline.errors import UserError
from data_pipeline.metadata_layouts import PATH_KEYS, SPLIT_NAMES

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
    tables.mkdir(parents=True, exist_ok=True)
    with spool.open("wb") as out, (tables / LABELS).open("w", encoding="ascii") as labels:
        for file in files:
            stem = file.relative_to(root).with_suffix("").as_posix()
            for row, (name, data, values) in enumerate(_rows(file, stem)):
                numbered = f"{row:06d}.mid" if len(files) == 1 else f"{stem}/{row:06d}.mid"
                path = _midi_path(name) if name else numbered
                if tree.has(path):  # names of one split may be those of another
                    path = numbered if tree.has(f"{stem}/{path}") else f"{stem}/{path}"
                if data is None:
                    tree.add(Entry(path, 0, fault="no-bytes", detail=f"row {row} of {file.name}"))
                elif len(data) > FILE_BYTES:
                    tree.add(Entry(path, len(data)))
                else:
                    tree.add(Entry(path, len(data), out.tell()))
                    out.write(data)
                labels.write(json.dumps({"path": path, **values}) + "\n")
        for made in (out, labels):
            made.flush()
            os.fsync(made.fileno())


def _rows(file: Path, stem: str) -> Iterator[tuple[str, bytes | None, dict[str, Any]]]:
    """Path ("" without), MIDI bytes and labels of each row."""
    import pyarrow as pa

    try:
        with file.open("rb") as stream:  # pyarrow opens no name that is not UTF-8
            yield from _rows_of(stream, file, stem)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a readable Parquet file ({text})") from error


def _rows_of(
    stream: BinaryIO, file: Path, stem: str
) -> Iterator[tuple[str, bytes | None, dict[str, Any]]]:
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
            yield name or "", data, {**values, **split}


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


def _midi_path(name: str) -> str:
    path = member_path(name.replace("\\", "/"))
    return path if is_midi_name(path.rpartition("/")[2]) else path + ".mid"
