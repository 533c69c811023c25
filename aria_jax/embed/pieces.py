"""What is embedded: files as lists of token slices, from MIDI files or from token shards.

Worker processes import this module, so it must not import jax.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from aria_jax.config import SLICE_NOTES, SLICE_TOKENS
from data_pipeline import storage
from data_pipeline.artifact import hashed, json_digest, rows_digest
from data_pipeline.build.listing import SUFFIXES, Entry, is_midi_name
from data_pipeline.build.series import check_source
from data_pipeline.build.sources import (
    entry_digest,
    has_inner_tables,
    list_source,
    no_midi_files,
    read_entry,
    readable_root,
    walk_folder,
)  # fmt: skip
from data_pipeline.errors import InvalidMidi, UserError, printable
from data_pipeline.metadata import LabelTable, find_tables, read_labels
from data_pipeline.midi import STANDARD, Performance, compat_of
from data_pipeline.shards import MANIFEST, TokenShards, load_manifest, reading_of
from data_pipeline.slices import Pieces, encode_slices, truncated
from data_pipeline.tokenizers import Tokenizer


@dataclass(frozen=True)
class Piece:
    """One file.

    Attributes:
        slices: token ids of consecutive slices, each uint16, ending with `<E>`.
        labels: those of the metadata; from shards also "split".
    """

    path: str
    sha256: str
    slices: list[np.ndarray]
    n_notes: int
    duration_ms: int
    labels: dict[str, str]


@dataclass(frozen=True)
class Rejection:
    """A file that cannot be embedded, and why."""

    path: str
    reason: str
    message: str


@dataclass(frozen=True)
class Slicing:
    """How files are sliced.

    Attributes:
        tokenizer: preset.
        slice_notes: notes of a slice.
        max_tokens: where slices are truncated.
        reading: how MIDI files are read, as `data_pipeline.midi.reading_name`.
    """

    tokenizer: str = "aria"
    slice_notes: int = SLICE_NOTES
    max_tokens: int = SLICE_TOKENS
    reading: str = STANDARD


class Source(Protocol):
    """A set of files in a fixed order; picklable."""

    @property
    def paths(self) -> Sequence[str]:
        """Name of each file."""

    @property
    def reading(self) -> str:
        """How its MIDI files are read, or were when its shards were built."""

    @property
    def warnings(self) -> Sequence[str]:
        """What had better be known of its labels."""

    def piece(self, i: int) -> Piece | Rejection:
        """Reads and slices file number i."""

    def sliced(self, slicing: Slicing) -> "Source":
        """The same files, sliced otherwise."""

    def only(self, paths: Collection[str]) -> "Source":
        """Those of the files that are called so; all of them where pieces have other names."""

    def digests(self) -> dict[str, str | None]:
        """Of the bytes of "files", of the "labels" of tables; of shards also of "cleaning"."""


def open_source(
    sources: str | Path | Sequence[str | Path],
    slicing: Slicing,
    *,
    spool: Path,
    metadata: str | Path | None = None,
) -> Source:
    """All that `data build` takes, token shards, or a list of MIDI files.

    Args:
        sources: a folder, archive, Parquet or shards, or MIDI files and folders of them, whose
            names are then relative to the folder that holds them all.
        spool: file that takes what a compressed archive unpacks to; must outlive the source.
            Beside it, SPOOL.tables takes the metadata files of an archive.
        metadata: labels of MIDI files (default: metadata files beside them).

    Raises:
        UserError: no MIDI files or shards there, or shards of another tokenizer.
    """
    source = common_folder(sources)
    sources = [storage.place(one) for one in _as_list(sources)]
    tokenizer = Tokenizer.preset(slicing.tokenizer)
    if not _is_one(sources):
        entries = _listed(sources, source)
        table = read_labels(source, find_tables(source, metadata))
        return _MidiFiles(source, slicing, entries, table)
    if (source / MANIFEST).is_file():
        splits = load_manifest(source)["splits"]
        sizes = {split: len(TokenShards(source, split, tokenizer)) for split in splits}
        sizes = {split: size for split, size in sizes.items() if size}
        return _Shards(source, slicing, tuple(sizes), tuple(sizes.values()))
    check_source(slicing.tokenizer, source)
    tables = spool.with_name(spool.name + ".tables")
    if not (entries := list(list_source(source, spool, tables))):
        raise no_midi_files(source)
    inner = has_inner_tables(source)
    table = read_labels(source, find_tables(tables if inner else source, metadata))
    return _MidiFiles(readable_root(source, spool), slicing, entries, table)


def common_folder(sources: str | Path | Sequence[str | Path]) -> Path:
    """A source that is one, or the folder that holds all files and folders of a list.

    Raises:
        UserError: one of them is not there.
    """
    paths = [storage.local(path) for path in _as_list(sources)]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if _is_one(paths):
        return paths[0]
    return Path(os.path.commonpath([(p if p.is_dir() else p.parent).absolute() for p in paths]))


def _as_list(sources: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [sources] if isinstance(sources, str | Path) else sources


def _is_one(sources: Sequence[str | Path]) -> bool:
    """Whether this is a folder, an archive or shards, not a list of files."""
    return len(sources) == 1 and not is_midi_name(Path(sources[0]).name)


def _listed(sources: Sequence[str | Path], root: Path) -> list[Entry]:
    """The MIDI files among `sources` and in the folders among them, each once."""
    files: dict[str, Entry] = {}
    for source in map(Path, sources):
        path = str(source.absolute().relative_to(root))
        if source.is_dir():
            if (source / MANIFEST).is_file():
                raise UserError(f"{source} holds token shards; name it alone")
            before = "" if path == "." else f"{path}/"
            inside = [Entry(before + e.path, *e.row[1:]) for e in walk_folder(source)]
            if not inside:
                raise no_midi_files(source)
            files |= {entry.path: entry for entry in inside}
        elif is_midi_name(source.name):
            files[path] = Entry(path, source.stat().st_size)
        else:
            raise UserError(f"{source}: expected a MIDI file ({', '.join(SUFFIXES)}) or a folder")
    return list(files.values())


def open_sources(
    sources: Sequence[str | Path], slicing: Slicing, *, folder: Path, metadata: str | Path | None
) -> Source:
    """Several sources as one. Of one whose label table is for all of its files, a data set, the
    name comes before their paths.

    Args:
        sources: folders, archives or Parquet, each as `open_source` takes it.
        folder: for what compressed archives unpack to; must outlive the source.
        metadata: labels, of a single source.

    Raises:
        UserError: as `open_source`; several sources with one table, or two files of one name.
    """
    opened = [
        open_source(source, slicing, spool=folder / f"spool{number}", metadata=metadata)
        for number, source in enumerate(sources)
    ]
    if len(opened) == 1:
        return opened[0]
    if metadata is not None:
        raise UserError("one table of labels is for one source; let each have its own beside it")
    prefixes: list[str] = []
    seen: set[str] = set()
    for source, one in zip(sources, opened, strict=True):
        whole = isinstance(one, _MidiFiles) and any(not t.folder for t in one.labels.sources)
        prefixes.append(f"{Path(source).name.split('.')[0]}/" if whole else "")
        names = {prefixes[-1] + path for path in one.paths}
        if both := seen & names:
            raise UserError(f"{source}: another source has a file {min(both)} too; rename a folder")
        seen |= names
    return _Several(tuple(opened), tuple(prefixes))


@dataclass(frozen=True)
class _Several:
    """Sources one after the other, and what comes before the names of the files of each."""

    sources: tuple[Source, ...]
    prefixes: tuple[str, ...]

    @cached_property
    def paths(self) -> Sequence[str]:
        named = zip(self.prefixes, self.sources, strict=True)
        return [prefix + path for prefix, source in named for path in source.paths]

    @property
    def reading(self) -> str:
        readings = sorted({source.reading for source in self.sources})
        if len(readings) > 1:
            raise UserError(f"the sources were read differently: {' and '.join(readings)}")
        return readings[0]

    @property
    def warnings(self) -> Sequence[str]:
        return [warning for source in self.sources for warning in source.warnings]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(source.paths) for source in self.sources])

    def piece(self, i: int) -> Piece | Rejection:
        number = int(np.searchsorted(self._ends, i, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        found = self.sources[number].piece(i - before)
        return replace(found, path=self.prefixes[number] + found.path)

    def sliced(self, slicing: Slicing) -> Source:
        return _Several(tuple(one.sliced(slicing) for one in self.sources), self.prefixes)

    def only(self, paths: Collection[str]) -> Source:
        def inside(prefix: str) -> set[str]:
            return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}

        named = zip(self.prefixes, self.sources, strict=True)
        return _Several(tuple(one.only(inside(p)) for p, one in named), self.prefixes)

    def digests(self) -> dict[str, str | None]:
        of_each = [source.digests() for source in self.sources]
        names = sorted({name for digests in of_each for name in digests})
        return {n: json_digest([self.prefixes, [d.get(n) for d in of_each]]) for n in names}


@dataclass(frozen=True)
class _MidiFiles:
    root: Path
    slicing: Slicing
    entries: Sequence[Entry]
    labels: LabelTable

    @property
    def paths(self) -> Sequence[str]:
        return [printable(entry.path) for entry in self.entries]

    @property
    def warnings(self) -> Sequence[str]:
        return self.labels.warnings(entry.path for entry in self.entries)

    @property
    def reading(self) -> str:
        return self.slicing.reading

    def sliced(self, slicing: Slicing) -> Source:
        return replace(self, slicing=slicing)

    def only(self, paths: Collection[str]) -> Source:
        return replace(self, entries=[e for e in self.entries if printable(e.path) in paths])

    def digests(self) -> dict[str, str | None]:
        hashes = hashed(self.entries, partial(entry_digest, self.root))
        labels = self.labels.labels_for
        return {
            "files": rows_digest((entry.path, sha256) for entry, sha256 in hashes),
            "labels": rows_digest((path, labels(path)) for path in self.paths),
        }

    def piece(self, i: int) -> Piece | Rejection:
        entry, path = self.entries[i], printable(self.entries[i].path)
        tokenizer = Tokenizer.preset(self.slicing.tokenizer)
        try:
            data = read_entry(self.root, entry)
            performance = tokenizer.read(data, compat=compat_of(self.slicing.reading))
            slices = midi_slices(performance, self.slicing)
            known = tokenizer.with_tokens(performance)
        except InvalidMidi as error:
            return Rejection(path, error.reason, printable(str(error)))
        except OSError as error:
            return Rejection(path, "unreadable", printable(str(error)))
        return Piece(
            path=path,
            sha256=hashlib.sha256(data).hexdigest(),
            slices=slices,
            n_notes=len(known.notes),
            duration_ms=performance.duration_ms,
            labels=self.labels.labels_for(entry.path, performance.texts),
        )


@dataclass(frozen=True)
class _Shards:
    data_dir: Path
    slicing: Slicing
    splits: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def warnings(self) -> Sequence[str]:
        return ()

    @property
    def paths(self) -> Sequence[str]:
        return [
            f"{split}/{i}"
            for split, size in zip(self.splits, self.sizes, strict=True)
            for i in range(size)
        ]

    @property
    def reading(self) -> str:
        return reading_of(load_manifest(self.data_dir))

    def sliced(self, slicing: Slicing) -> Source:
        return replace(self, slicing=slicing)

    def only(self, paths: Collection[str]) -> Source:
        return self

    @cached_property
    def _opened(self) -> list[Pieces]:
        return [Pieces(self.data_dir, split) for split in self.splits]

    def __getstate__(self) -> dict:  # each process opens the files itself
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def digests(self) -> dict[str, str | None]:
        manifest = load_manifest(self.data_dir)
        cleaning = json_digest(manifest.get("settings", {}).get("cleaning"))
        return {"files": json_digest(manifest), "labels": None, "cleaning": cleaning}

    def piece(self, i: int) -> Piece | Rejection:
        slicing = self.slicing
        split = int(np.searchsorted(np.cumsum(self.sizes), i, side="right"))
        pieces, number = self._opened[split], i - sum(self.sizes[:split])
        record, n_notes = pieces.shards[number], pieces.n_notes(number)
        slices = [
            pieces.notes(number, start, start + slicing.slice_notes)
            for start in range(0, n_notes, slicing.slice_notes)
        ]
        return Piece(
            path=record.meta["path"],
            sha256=record.meta["sha256"],
            slices=[truncated(ids, slicing.max_tokens, pieces.tokenizer.eos_id) for ids in slices],
            n_notes=record.meta["n_notes"],
            duration_ms=record.meta["duration_ms"],
            labels={**record.meta["labels"], "split": self.splits[split]},
        )


def midi_slices(performance: Performance, slicing: Slicing) -> list[np.ndarray]:
    """Consecutive slices of a file, each at most `max_tokens` long.

    Raises:
        InvalidMidi: no notes that have tokens.
    """
    tokenizer = Tokenizer.preset(slicing.tokenizer)
    slices = encode_slices(tokenizer.with_tokens(performance), tokenizer, slicing.slice_notes)
    return [truncated(ids, slicing.max_tokens, tokenizer.eos_id) for ids in slices]
