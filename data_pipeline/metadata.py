"""One table of labels for a folder of MIDI files, whatever layout its metadata has.

Layouts that are recognised (JSON unless said otherwise):

    {"17": {"metadata": {...}}, ...}                 Aria-MIDI; file 000017_0.mid belongs to "17"
    {"midi_filename": {"0": ...}, ...}, also as CSV  MAESTRO v2, v3
    [{"path": ..., "composer": ..., ...}, ...]       ASAP, MAESTRO v1, one's own; also as CSV
    {"path": {"composer": ..., ...}, ...}            one's own
    {"composer": {"train": {"path": "bach"}}, ...}   benchmark splits

What the table does not know of a file is looked for in the names of the file and its folders,
then in the text events of the MIDI file (reference: aria-utils ariautils/midi.py meta_*).
"""

import csv
import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

COMPOSERS = (
    *("albeniz", "bach", "balakirev", "bartok", "beethoven", "brahms", "chopin", "clementi"),
    *("couperin", "czerny", "debussy", "dvorak", "faure", "franck", "gershwin", "glinka"),
    *("granados", "grieg", "handel", "haydn", "janacek", "joplin", "liszt", "medtner"),
    *("mendelssohn", "mozart", "mussorgsky", "prokofiev", "rachmaninoff", "rameau", "ravel"),
    *("satie", "scarlatti", "schubert", "schumann", "scriabin", "shostakovich", "tchaikovsky"),
    *("telemann", "wagner"),
)
"""Surnames looked for in free text."""

FORMS = ("sonata", "prelude", "nocturne", "etude", "waltz", "mazurka", "impromptu", "fugue")

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_PATH_KEYS = ("path", "midi_filename", "midi_performance", "midi_path", "file_path", "filename")
_ALIASES = {
    "canonical_composer": "composer",
    "canonical_title": "title",
    "music_period": "period",
    "work": "composition",
    "performer": "pianist",
    "emotion_quadrant": "emotion",
}
_KNOWN = (
    *("composer", "composition", "emotion", "form", "genre", "opus", "period", "pianist"),
    *("piece_number", "split", "title", "year"),
)
# Identifiers and names for people are kept as they are written; everything else is a class.
_VERBATIM = ("composition", "title")
_METADATA_NAMES = ("metadata.json", "maestro*.json", "maestro*.csv", "metadata.csv")


def normalise_class(text: str) -> str:
    """Lower case without accents and repeated spaces: "Étude " becomes "etude"."""
    plain = unicodedata.normalize("NFKD", text)
    return " ".join("".join(c for c in plain if not unicodedata.combining(c)).lower().split())


def normalise_composer(text: str) -> str:
    """The surname if exactly one known composer is named ("Frédéric Chopin"), else the text."""
    return _only_match([text], COMPOSERS) or normalise_class(text)


def labels_from_path(path: str) -> dict[str, str]:
    """Composer and form named in a file's or folder's name, each only if unambiguous.

    Wider than the reference (meta_composer_filename), which reads the file name only.
    """
    return labels_from_texts(path.split("/"))


def labels_from_texts(texts: Iterable[str]) -> dict[str, str]:
    """Composer and form named in free text, each only if unambiguous."""
    texts = list(texts)
    found = {"composer": _only_match(texts, COMPOSERS), "form": _only_match(texts, FORMS)}
    return {name: value for name, value in found.items() if value}


def _only_match(texts: Sequence[str], names: Sequence[str]) -> str | None:
    words = {word for text in texts for word in re.findall(r"[a-z]+", normalise_class(text))}
    found = words.intersection(names)
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class _Source:
    """One metadata file: rows by path, by number (Aria-MIDI), by file name where that is safe."""

    folder: str
    """Of the metadata file, relative to the MIDI folder; "" if it is that folder or elsewhere."""
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    numbered: dict[int, dict[str, str]] = field(default_factory=dict)
    by_stem: dict[str, dict[str, str]] = field(default_factory=dict)

    def find(self, path: str, root_name: str) -> dict[str, str] | None:
        if self.folder and not path.startswith(self.folder + "/"):
            return None
        inside = path[len(self.folder) + 1 :] if self.folder else path
        name = inside.rpartition("/")[2]
        for candidate in (path, inside, f"{root_name}/{path}"):
            if candidate in self.rows:
                return self.rows[candidate]
        stem = name.rpartition(".")[0]
        number = stem.split("_")[0]
        if number.isdecimal() and int(number) in self.numbered:
            return self.numbered[int(number)]
        return self.by_stem.get(stem)


@dataclass(frozen=True)
class LabelTable:
    """Labels of the files of one MIDI folder; picklable.

    Attributes:
        sources: the tables read.
        root_name: name of the MIDI folder, which the paths of a table may begin with.
    """

    sources: tuple[_Source, ...] = ()
    root_name: str = ""

    def __len__(self) -> int:
        return sum(len(source.rows) + len(source.numbered) for source in self.sources)

    def labels_for(self, relative_path: str, texts: Sequence[str] = ()) -> dict[str, str]:
        """What is known of a file: composer, composition, form, genre, period, title, split…

        Classes are lower case without accents; composition and title are as written. A
        composition that is not given follows from composer and opus or piece number, else from
        composer and title. The table wins over names of folders, those over `texts`.

        Args:
            relative_path: relative to the MIDI folder, "/" between parts.
            texts: text events of the file.
        """
        row: dict[str, str] = {}
        for source in self.sources:
            row = source.find(relative_path, self.root_name) or row
        return {**labels_from_texts(texts), **labels_from_path(relative_path), **row}


def is_table_name(name: str) -> bool:
    """Whether a file of this name beside MIDI files is taken for a label table."""
    return any(fnmatchcase(name, pattern) for pattern in _METADATA_NAMES)


def find_tables(
    midi_dir: str | Path, metadata_path: str | Path | None = None
) -> list[tuple[str, Path]]:
    """Label tables as (folder they speak for, "" for the whole, file).

    Args:
        midi_dir: folder of the MIDI files; of any other path only `metadata_path` is known.
        metadata_path: JSON or CSV file in any layout of this module. Without it, metadata.json,
            metadata.csv and maestro*.json/csv in `midi_dir` and in its direct folders are used.
    """
    root = Path(midi_dir)
    if metadata_path is not None:
        return [("", Path(metadata_path))]
    if not root.is_dir():
        return []
    folders = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    # MAESTRO ships the same table as JSON and as CSV: the first one found will do.
    files = ((f, [m for n in _METADATA_NAMES for m in sorted(f.glob(n))]) for f in folders)
    return [("" if f == root else f.name, matches[0]) for f, matches in files if matches]


def tables_digest(tables: Sequence[tuple[str, Path]]) -> str | None:
    """sha256 of what the tables say and of which folders; None without tables.

    Raises:
        UserError: a table that cannot be read.
    """
    sha = hashlib.sha256()
    for folder, path in tables:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read the metadata ({error.strerror})") from error
        sha.update(json.dumps([folder, hashlib.sha256(content).hexdigest()]).encode())
    return sha.hexdigest() if tables else None


def load_labels(midi_dir: str | Path, metadata_path: str | Path | None = None) -> LabelTable:
    """The label table of a folder of MIDI files: of all that `find_tables` finds.

    Raises:
        UserError: malformed or contradictory metadata, with file and key.
    """
    return read_labels(midi_dir, find_tables(midi_dir, metadata_path))


def read_labels(midi_dir: str | Path, tables: Sequence[tuple[str, Path]]) -> LabelTable:
    """The label table of a folder or archive, from the tables that `find_tables` found.

    Raises:
        UserError: malformed or contradictory metadata, with file and key.
    """
    sources = tuple(_read_source(path, folder) for folder, path in tables)
    return LabelTable(sources, root_name=Path(midi_dir).resolve().name)


def _read_source(path: Path, folder: str) -> _Source:
    source = _Source(folder)
    shared: dict[tuple, dict[str, str]] = {}  # a million files, far fewer distinct rows
    for key, key_name, values in _rows(path):
        labels = _labels(values, path, key, known_only=key_name not in ("path", ""))
        labels = shared.setdefault(tuple(labels.items()), labels)
        if key_name == "number":
            number = int(key)
            source.numbered[number] = _merged(source.numbered.get(number), labels, path, key)
        else:
            source.rows[key] = _merged(source.rows.get(key), labels, path, key)
    for key, labels in source.rows.items():
        if "/" not in key:
            source.by_stem[key.rpartition(".")[0] or key] = labels
    return source


def _merged(
    old: dict[str, str] | None, new: dict[str, str], path: Path, key: Any
) -> dict[str, str]:
    for name in (old or {}).keys() & new.keys():
        if old and old[name] != new[name]:
            raise UserError(
                f"{path}: {key!r} has two values of {name!r} ({old[name]!r} and {new[name]!r}); "
                "keep one"
            )
    return {**old, **new} if old else new


def _rows(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, what the key is, values) per entry; what is "path", another column, "number" or ""."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the metadata ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the metadata as UTF-8") from error
    if path.suffix.lower() == ".csv":
        yield from _listed(path, list(csv.DictReader(text.splitlines())))
        return
    try:
        data = json.loads(text, object_pairs_hook=_reject_repeats)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend or leave out --metadata") from None
    if isinstance(data, list):
        yield from _listed(path, data)
    elif not isinstance(data, dict):
        raise UserError(f"{path}: expected a list or an object of files, got {type(data).__name__}")
    elif column := next((key for key in _PATH_KEYS if isinstance(data.get(key), dict)), None):
        yield from _listed(path, _from_columns(path, data, column))
    elif data and all(_is_category(value) for value in data.values()):
        yield from _from_splits(data)
    else:
        for key, value in data.items():
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key!r}: expected an object of labels, got {value!r}")
            if key.isdecimal() and isinstance(value.get("metadata"), dict):
                yield key, "number", value["metadata"]
            else:
                yield _posix(key), "", value


def _reject_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return made


def _listed(path: Path, rows: list[Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number}: expected an object, got {row!r}")
        column = next((key for key in _PATH_KEYS if row.get(key)), None)
        if column is None:
            raise UserError(f"{path}: entry {number}: no file named ({', '.join(_PATH_KEYS)})")
        if not isinstance(row[column], str):
            raise UserError(f"{path}: entry {number}: {column!r} is not text: {row[column]!r}")
        values = {key: value for key, value in row.items() if key != column}
        yield _posix(row[column]), column, values


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


def _from_splits(data: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """{category: {split: {path: label}}}; a file's split is one only if all categories agree."""
    splits_of: dict[str, set[str]] = {}
    for category, by_split in data.items():
        category = _ALIASES.get(category, category)
        for split, labels in by_split.items():
            split = SPLIT_NAMES[split.lower()]
            for key, label in labels.items():
                splits_of.setdefault(_posix(key), set()).add(split)
                yield _posix(key), "path", {category: label, f"{category}_split": split}
    for key, splits in splits_of.items():
        if len(splits) == 1:
            yield key, "path", {"split": next(iter(splits))}


def _labels(values: dict[str, Any], path: Path, key: Any, *, known_only: bool) -> dict[str, str]:
    """Normalised labels; empty values and measurements (floats) are no labels."""
    labels: dict[str, str] = {}
    for raw_name, value in values.items():
        name = _ALIASES.get(str(raw_name).strip().lower(), str(raw_name).strip().lower())
        if known_only and name not in _KNOWN:
            continue
        if value is None or value == "" or isinstance(value, float):
            continue
        if not isinstance(value, str | int):
            raise UserError(f"{path}: {key!r}: {raw_name!r} must be text or a number: {value!r}")
        text = _normalised(name, str(value).strip(), path, key)
        labels = _merged(labels, {sys.intern(name): sys.intern(text)}, path, key)
    composer, title = labels.get("composer"), labels.get("title")
    number = [f"{n} {labels[n]}" for n in ("opus", "piece_number") if n in labels]
    if "composition" not in labels and composer and (number or title):
        labels["composition"] = f"{composer}: {' '.join(number) or normalise_class(title or '')}"
    if "form" not in labels and title and (form := _only_match([title], FORMS)):
        labels["form"] = form
    return labels


def _normalised(name: str, text: str, path: Path, key: Any) -> str:
    if name == "composer":
        return normalise_composer(text)
    if name == "split":
        if text.lower() not in SPLIT_NAMES:
            raise UserError(f"{path}: {key!r}: split {text!r} is none of train, val, test")
        return SPLIT_NAMES[text.lower()]
    return text if name in _VERBATIM else normalise_class(text)


def _posix(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")
