"""The rows of a metadata file, whatever its layout and format: JSON, JSON Lines or CSV."""

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What published tables call the splits, in lower case, to what shards call them."""

ALIASES = {
    "canonical_composer": "composer",
    "canonical_title": "title",
    "music_period": "period",
    "work": "composition",
    "performer": "pianist",
    "emotion_quadrant": "emotion",
}
PATH_KEYS = (
    *("path", "midi_filename", "midi_performance", "midi_path", "file_path", "filename"),
    "file_name",
)
_DELIMITERS = ",;\t"
_MAX_DIGITS = 4000  # Python converts no longer number

Row = tuple[str, str, dict[str, Any]]
"""Key; what the key is: "path", another column, "number" (Aria-MIDI) or ""; values."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a metadata file.

    Raises:
        UserError: unreadable or malformed, with file and key.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else error.strerror
        raise UserError(f"{path}: cannot read the metadata ({reason})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the metadata as UTF-8") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _listed(path, _csv_rows(path, text))
    elif suffix == ".jsonl":
        # Not splitlines(): U+2028 and others may stand inside a string.
        lines = (line for line in text.split("\n") if line.strip())
        yield from _listed(path, (_parsed(path, line) for line in lines))
    else:
        yield from _json_rows(path, _parsed(path, text))


def same_name(path: str) -> str:
    """The form in which paths of tables and of files are compared.

    "/" between parts, composed characters (macOS unpacks "é" as "e" and an accent).
    """
    return unicodedata.normalize("NFC", path.replace("\\", "/").removeprefix("./"))


def _csv_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """Only CR and LF outside quotes end a row; the delimiter is the one that names a file.

    Spreadsheets write empty rows and empty fields at the end: those are left out.
    """
    header = text.replace("\r", "\n").split("\n", 1)[0]
    delimiter = next(
        (d for d in _DELIMITERS if any(key in _names(header, d) for key in PATH_KEYS)), ","
    )
    # Strict: a quote that is never closed would swallow all rows behind it.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [_column(name) for name in reader.fieldnames or ()]
        if repeated := {name for name in names if name and names.count(name) > 1}:
            raise UserError(f"{path}: column {min(repeated)!r} twice; keep one")
        reader.fieldnames = names
        for row in reader:
            if any(row.pop(None, ())):
                raise UserError(
                    f"{path}: line {reader.line_num}: more fields than the header names; "
                    "put quotes round a field that contains the delimiter"
                )
            if any(row.values()):
                yield row
    except csv.Error as error:
        raise UserError(f"{path}: after line {reader.line_num}: not valid CSV ({error})") from None


def _names(header: str, delimiter: str) -> list[str]:
    return [_column(name.strip().strip('"')) for name in header.split(delimiter)]


def _column(name: str) -> str:
    """A column's name; of one that names files in lower case, as those are looked for."""
    name = name.strip()
    return name.lower() if name.lower() in PATH_KEYS else name


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_reject_repeats, parse_int=_integer)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend or leave out --metadata") from None
    except RecursionError:
        raise UserError(f"{path}: not valid metadata: nested too deeply") from None


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < _MAX_DIGITS else digits


def _reject_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {short(key)} twice")
    return made


def _json_rows(path: Path, data: Any) -> Iterator[Row]:
    if isinstance(data, list):
        yield from _listed(path, data)
    elif not isinstance(data, dict):
        raise UserError(f"{path}: expected a list or an object of files, got {type(data).__name__}")
    elif column := next((key for key in PATH_KEYS if isinstance(data.get(key), dict)), None):
        yield from _listed(path, _from_columns(path, data, column))
    elif data and all(_is_category(value) for value in data.values()):
        yield from _from_splits(data)
    else:
        for key, value in data.items():
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}: {key!r}: expected an object of labels, got {short(value)}"
                )
            if _is_number(key) and isinstance(value.get("metadata"), dict):
                yield key, "number", value["metadata"]
            else:
                yield same_name(key), "", value


def _is_number(key: str) -> bool:
    return key.isdecimal() and len(key) < _MAX_DIGITS


def _listed(path: Path, rows: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number}: expected an object, got {short(row)}")
        column = next((key for key in PATH_KEYS if row.get(key)), None)
        if column is None:
            raise UserError(f"{path}: entry {number}: no file named ({', '.join(PATH_KEYS)})")
        if not isinstance(row[column], str):
            raise UserError(f"{path}: entry {number}: {column!r} is not text: {short(row[column])}")
        values = {key: value for key, value in row.items() if key != column}
        yield same_name(row[column]), column, values


def short(value: Any) -> str:
    """A value as an error message shows it."""
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 100 else text[:97] + "..."


def _from_columns(path: Path, data: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """MAESTRO v2/v3: {column: {row: value}}."""
    for name, values in data.items():
        if not isinstance(values, dict) or values.keys() != data[column].keys():
            raise UserError(f"{path}: column {name!r} has not the rows of {column!r}")
    return [{name: data[name][row] for name in data} for row in data[column]]


def _is_category(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(k.lower() in SPLIT_NAMES and isinstance(v, dict) for k, v in value.items())
    )


def _from_splits(data: dict[str, Any]) -> Iterator[Row]:
    """{category: {split: {path: label}}}; a file's split is one only if all categories agree."""
    splits_of: dict[str, set[str]] = {}
    for category, by_split in data.items():
        category = ALIASES.get(category, category)
        for split, labels in by_split.items():
            split = SPLIT_NAMES[split.lower()]
            for key, label in labels.items():
                key = same_name(key)
                splits_of.setdefault(key, set()).add(split)
                yield key, "path", {category: label, f"{category}_split": split}
    for key, splits in splits_of.items():
        if len(splits) == 1:
            yield key, "path", {"split": next(iter(splits))}
