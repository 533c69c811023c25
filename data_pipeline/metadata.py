"""One table of labels for a folder of MIDI files, whatever layout its metadata has.

Layouts that are recognised (JSON unless said otherwise; CSV with comma, semicolon or tab):

    {"17": {"metadata": {...}}, ...}                 Aria-MIDI; file 000017_0.mid belongs to "17"
    {"midi_filename": {"0": ...}, ...}, also as CSV  MAESTRO v2, v3
    [{"path": ..., "composer": ..., ...}, ...]       ASAP, MAESTRO v1, one's own; also as CSV and
                                                     JSON Lines
    {"path": {"composer": ..., ...}, ...}            one's own
    {"composer": {"train": {"path": "bach"}}, ...}   benchmark splits

What the table does not know of a file is looked for in the names of the file and its folders,
then in the text events of the MIDI file (reference: aria-utils ariautils/midi.py meta_*).
"""

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError, printable
from data_pipeline.metadata_layouts import ALIASES, SPLIT_NAMES, read_rows, same_name, short

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

_KNOWN = (
    *("composer", "composition", "emotion", "form", "genre", "opus", "period", "pianist"),
    *("piece_number", "split", "title", "year"),
)
# Identifiers and names for people are kept as they are written; everything else is a class.
_VERBATIM = ("composition", "title")
_TABLE_NAMES = (
    *("metadata.json", "maestro*.json", "maestro*.csv", "metadata.csv", "metadata.jsonl"),
)


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


IN_TEXTS = {"composer": COMPOSERS, "form": FORMS}
"""Labels that are looked for in free text too, and their values."""


def labels_from_texts(texts: Iterable[str]) -> dict[str, str]:
    """Composer and form named in free text, each only if unambiguous."""
    texts = list(texts)
    found = {name: _only_match(texts, values) for name, values in IN_TEXTS.items()}
    return {name: value for name, value in found.items() if value}


def _only_match(texts: Sequence[str], names: Sequence[str]) -> str | None:
    words = {word for text in texts for word in re.findall(r"[a-z]+", normalise_class(text))}
    found = words.intersection(names)
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class _Source:
    """One metadata file: rows by path, by number (Aria-MIDI), by file name where that is safe.

    Attributes:
        name: of the metadata file, for people.
        folder: it speaks for, relative to the MIDI folder; "" for the whole.
    """

    name: str
    folder: str
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    numbered: dict[int, dict[str, str]] = field(default_factory=dict)
    by_stem: dict[str, dict[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows) + len(self.numbered)

    def examples(self) -> list[str]:
        """Three names that it has rows for."""
        return [printable(str(key)) for key in islice(chain(self.rows, self.numbered), 3)]

    def find(self, path: str, root_name: str) -> dict[str, str] | None:
        """The row of a file; x.mid.gz may also be called x.mid."""
        if path.lower().endswith(".gz") and (row := self._find(path, root_name)) is not None:
            return row
        return self._find(path[:-3] if path.lower().endswith(".gz") else path, root_name)

    def _find(self, path: str, root_name: str) -> dict[str, str] | None:
        if self.folder and not path.startswith(self.folder + "/"):
            return None
        inside = path[len(self.folder) + 1 :] if self.folder else path
        name = inside.rpartition("/")[2]
        for candidate in (path, inside, f"{root_name}/{path}"):
            if candidate in self.rows:
                return self.rows[candidate]
        stem = name.rpartition(".")[0]
        number = stem.split("_")[0]
        if self.numbered and number.isdecimal() and int(number) in self.numbered:
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
        return sum(map(len, self.sources))

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
        path = same_name(relative_path)
        for source in self.sources:
            row = source.find(path, self.root_name) or row
        return {**labels_from_texts(texts), **labels_from_path(relative_path), **row}

    def warnings(self, paths: Iterable[str]) -> list[str]:
        """Says of each table that names none of the files, with three of its names and of ours."""
        silent = [source for source in self.sources if len(source)]
        shown: list[str] = []
        for path in paths:
            if not silent:
                return []
            if len(shown) < 3:
                shown.append(printable(path))
            path = same_name(path)
            silent = [s for s in silent if s.find(path, self.root_name) is None]
        return [
            f"metadata {source.name}: not one of its {len(source):,} rows names a file here; "
            f"it has {', '.join(source.examples())}; the files are {', '.join(shown)}"
            for source in silent
        ]


def is_table_name(name: str) -> bool:
    """Whether a file of this name beside MIDI files is taken for a label table."""
    return any(fnmatchcase(name, pattern) for pattern in _TABLE_NAMES)


def find_tables(
    midi_dir: str | Path, metadata_path: str | Path | None = None
) -> list[tuple[str, Path]]:
    """Label tables as (folder they speak for, "" for the whole, file).

    Args:
        midi_dir: folder of the MIDI files; of any other path only `metadata_path` is known.
        metadata_path: file in any layout of this module. Without it, metadata.json/csv/jsonl and
            maestro*.json/csv in `midi_dir` and in its direct folders are used.

    Raises:
        UserError: `midi_dir` cannot be read.
    """
    root = Path(midi_dir)
    if metadata_path is not None:
        return [("", storage.local(metadata_path))]
    if not root.is_dir():
        return []
    if storage.is_remote(root):  # of files that were named one by one, none has come yet
        for name, one in storage.listing(root).items():
            if name.count("/") < 2 and any(fnmatchcase(Path(name).name, t) for t in _TABLE_NAMES):
                storage.fetch(root / name, {"": one})
    try:
        folders = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    except OSError as error:
        raise UserError(f"{root}: cannot read this folder ({error.strerror})") from error
    # MAESTRO ships the same table as JSON and as CSV: the first one found will do.
    files = ((f, [m for n in _TABLE_NAMES for m in sorted(f.glob(n))]) for f in folders)
    return [("" if f == root else f.name, matches[0]) for f, matches in files if matches]


def load_labels(midi_dir: str | Path, metadata_path: str | Path | None = None) -> LabelTable:
    """The label table of a folder of MIDI files: of all that `find_tables` finds.

    Raises:
        UserError: malformed or contradictory metadata, with file and key.
    """
    return read_labels(midi_dir, find_tables(midi_dir, metadata_path))


def read_labels(
    midi_dir: str | Path, tables: Sequence[tuple[str, Path]], split_column: str | None = None
) -> LabelTable:
    """The label table of a folder or archive, from the tables that `find_tables` found.

    Args:
        split_column: the column that is taken for the label "split"; None: the one of that name.

    Raises:
        UserError: malformed or contradictory metadata, with file and key; no such column.
    """
    column = split_column and split_column.strip().lower()
    sources = tuple(_read_source(path, folder, column) for folder, path in tables)
    if column and not any(
        "split" in row for s in sources for row in (*s.rows.values(), *s.numbered.values())
    ):
        names = ", ".join(str(path) for _, path in tables) or "there is no metadata"
        raise UserError(f"--split-column {split_column}: no file has such a label ({names})")
    return LabelTable(sources, root_name=same_name(Path(midi_dir).resolve().name))


def _read_source(path: Path, folder: str, split_column: str | None) -> _Source:
    source = _Source(str(Path(folder, path.name)) if folder else str(path), same_name(folder))
    shared: dict[tuple, dict[str, str]] = {}  # a million files, far fewer distinct rows
    for key, key_name, values in read_rows(path):
        labels = _labels(values, path, key, key_name not in ("path", ""), split_column)
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


def _labels(
    values: dict[str, Any], path: Path, key: Any, known_only: bool, split_column: str | None
) -> dict[str, str]:
    """Normalised labels; empty values, measurements (floats) and nested values are none."""
    labels: dict[str, str] = {}
    for raw_name, value in values.items():
        name = printable(str(raw_name)).strip().lower()
        name = ALIASES.get(name, name)
        if split_column and split_column != "split" and name in ("split", split_column):
            if name == "split":
                continue
            name = "split"
        if known_only and name not in _KNOWN:
            continue
        if value is None or value == "" or isinstance(value, float):
            continue
        if not isinstance(value, str | int):
            if name not in _KNOWN:
                continue
            raise UserError(
                f"{path}: {key!r}: {raw_name!r} must be text or a number: {short(value)}"
            )
        if text := _normalised(name, printable(str(value)).strip(), path, key):
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
    if name == "split" and text:
        if text.lower() not in SPLIT_NAMES:
            raise UserError(f"{path}: {key!r}: split {text!r} is none of train, val, test")
        return SPLIT_NAMES[text.lower()]
    return text if name in _VERBATIM else normalise_class(text)
