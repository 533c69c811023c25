"""Token shards on disk: ArrayRecord files of pieces, one index per split, one manifest.

    DATA_DIR/train-00000-of-00004.arrayrecord   one record per piece (msgpack {ids, meta})
    DATA_DIR/train-index.npz                    tokens, notes, duration and labels of every piece
    DATA_DIR/manifest.json                      what was built, how, and how much
    DATA_DIR/rejected.jsonl                     what was left out, and why

Pieces of a split are numbered through its shards in order; the index is in the same order, so
lengths and labels of a million pieces are known without reading one record.
"""

import heapq
import io
import json
import os
import threading
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from data_pipeline import storage
from data_pipeline.artifact import sync, synced
from data_pipeline.errors import UserError, check_readable

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
"""The third is there where the metadata names pieces of a published test set."""
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
FILES = "files.jsonl"
"""[path, sha256] of every file that a corpus was made of, rejected ones too."""
READING_BEFORE = "aria-utils"
"""How MIDI files were read for corpora and models that do not say it."""

_META = ("path", "sha256", "duration_ms", "n_notes", "labels", "repaired")

# What the bytes of a damaged zip file can raise: its fields say anything then, sizes too.
_DAMAGE = (
    *(ValueError, KeyError, EOFError, OverflowError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)

# One record per chunk: a random read decompresses one piece and nothing else.
_WRITER_OPTIONS = "group_size:1,zstd:3"
# No read-ahead: batches are drawn at random from the whole corpus.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class Record:
    """One piece.

    Attributes:
        ids: token ids, uint16 [L].
        meta: path (relative to the source), sha256 (of the MIDI file), duration_ms, n_notes,
            labels (dict of str to str); of a truncated file that was read up to the break also
            repaired, the reason.
    """

    ids: np.ndarray
    meta: dict[str, Any]


def shard_name(split: str, index: int, count: int) -> str:
    """File name of shard `index` of `count`."""
    return f"{split}-{index:05d}-of-{count:05d}.arrayrecord"


def index_name(split: str) -> str:
    """File name of the split's index."""
    return f"{split}-index.npz"


def pack_record(ids: np.ndarray, meta: dict[str, Any]) -> bytes:
    """ids uint16 [L] and its meta as the bytes of one record (little-endian on any machine)."""
    return msgpack.packb({"ids": ids.astype("<u2").tobytes(), "meta": meta})


def unpack_record(data: bytes) -> Record:
    """Inverse of `pack_record`; ids are writable."""
    record = msgpack.unpackb(data)
    ids = np.frombuffer(record["ids"], dtype="<u2").astype(np.uint16)
    return Record(ids=ids, meta=record["meta"])


class ShardWriter:
    """Writes records to one ArrayRecord file; the same records give the same bytes."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = path
        self.n_pieces = 0
        self.n_tokens = 0
        self._writer = ArrayRecordWriter(os.fsencode(path), _WRITER_OPTIONS)

    def write(self, ids: np.ndarray, meta: dict[str, Any]) -> None:
        """Appends one piece: ids uint16 [L]."""
        self._writer.write(pack_record(ids, meta))
        self.n_pieces += 1
        self.n_tokens += len(ids)

    def close(self) -> dict[str, Any]:
        """Flushes to the disk and returns the shard's entry of the manifest."""
        self._writer.close()
        sync(self.path)
        return {
            "file": self.path.name,
            "n_pieces": self.n_pieces,
            "n_tokens": self.n_tokens,
            "bytes": self.path.stat().st_size,
        }


class IndexWriter:
    """Collects what the index says of each piece, 12 bytes a piece and 4 for each label."""

    def __init__(self) -> None:
        self._n_tokens, self._n_notes, self._duration_ms = array("I"), array("I"), array("I")
        self._values: dict[str, dict[str, int]] = {}
        self._codes: dict[str, array[int]] = {}

    def add(self, n_tokens: int, n_notes: int, duration_ms: int, labels: dict[str, str]) -> None:
        """Adds the next piece of the shard."""
        for name, value in labels.items():
            values = self._values.setdefault(name, {})
            codes = self._codes.setdefault(name, array("i"))
            codes.extend([-1] * (len(self._n_tokens) - len(codes)))
            codes.append(values.setdefault(value, len(values)))
        self._n_tokens.append(n_tokens)
        self._n_notes.append(n_notes)
        self._duration_ms.append(min(duration_ms, 2**32 - 1))

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, list[str | None]]]:
        """Numbers (uint32 [N] each) and, per label name, its value or None for each piece."""
        n = len(self._n_tokens)
        numbers = {
            "n_tokens": np.array(self._n_tokens, dtype=np.uint32),
            "n_notes": np.array(self._n_notes, dtype=np.uint32),
            "duration_ms": np.array(self._duration_ms, dtype=np.uint32),
        }
        labels = {}
        for name in sorted(self._codes):
            names = [*self._values[name], None]
            codes = [*self._codes[name]] + [-1] * (n - len(self._codes[name]))
            labels[name] = [names[code] for code in codes]
        return numbers, labels


def write_index(path: Path, shards: Sequence[IndexWriter]) -> None:
    """Writes the split's index: the pieces of `shards`, one after the other."""
    columns = [shard.columns() for shard in shards]
    arrays = {}
    for name in ("n_tokens", "n_notes", "duration_ms"):
        arrays[name] = np.concatenate([numbers[name] for numbers, _ in columns])
    for label in sorted({label for _, labels in columns for label in labels}):
        column: list[str | None] = []
        for numbers, labels in columns:
            column += labels.get(label, [None] * len(numbers["n_tokens"]))
        values = sorted({value for value in column if value is not None})
        code_of: dict[str | None, int] = {value: code for code, value in enumerate(values)}
        code_of[None] = -1
        arrays[f"label:{label}"] = np.array([code_of[value] for value in column], dtype=np.int32)
        text = json.dumps(values).encode()
        arrays[f"values:{label}"] = np.frombuffer(text, dtype=np.uint8)
    with synced(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


class SplitWriter:
    """The shards of one split; each piece goes to the shard with the fewest tokens so far."""

    def __init__(self, split: str, n_shards: int, work: Path):
        self._path = work / index_name(split)
        self._shards = [ShardWriter(work / shard_name(split, i, n_shards)) for i in range(n_shards)]
        self._indexes = [IndexWriter() for _ in self._shards]
        self._load = [(0, i) for i in range(n_shards)]
        self._n_notes = self._duration_ms = self._n_repaired = 0

    def write(self, ids: np.ndarray, summary: dict[str, Any]) -> None:
        """Adds a piece: ids uint16 [L], and what the merge knows of it."""
        load, shard = heapq.heappop(self._load)
        heapq.heappush(self._load, (load + len(ids), shard))
        meta = {key: summary[key] for key in _META if key in summary}
        self._shards[shard].write(ids, meta)
        self._indexes[shard].add(len(ids), meta["n_notes"], meta["duration_ms"], meta["labels"])
        self._n_notes += meta["n_notes"]
        self._duration_ms += meta["duration_ms"]
        self._n_repaired += "repaired" in meta

    def close(self) -> dict[str, Any]:
        """Writes the index; returns the split's entry of the manifest."""
        shards = [shard.close() for shard in self._shards]
        write_index(self._path, self._indexes)
        return {
            "n_pieces": sum(shard["n_pieces"] for shard in shards),
            "n_tokens": sum(shard["n_tokens"] for shard in shards),
            "n_notes": self._n_notes,
            "duration_ms": self._duration_ms,
            "n_repaired": self._n_repaired,
            "shards": shards,
        }


def load_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of a finished build; UserError where none is, or one of another format."""
    folder = storage.local(data_dir)
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / ".build").is_dir()
        hint = (
            "the build there is unfinished: run the same `aria-jax data build` again"
            if unfinished
            else "make it with `aria-jax data build MIDI_DIR OUT_DIR`"
        )
        if not folder.exists():
            raise UserError(f"{data_dir}: no such folder, so no token shards here; {hint}")
        raise UserError(f"{data_dir}: no token shards here ({MANIFEST} is missing); {hint}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); build the data again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: shard format {version}, this program reads {FORMAT_VERSION}; "
            "build the data again"
        )
    if missing := {"splits", "tokenizer"} - manifest.keys():
        raise UserError(f"{path}: says nothing of {min(missing)}; build the data again")
    return manifest


def reading_of(manifest: dict[str, Any]) -> str:
    """How the corpus's MIDI files were read, as `midi.reading_name` calls it."""
    return manifest.get("reading", READING_BEFORE)


class TokenShards:
    """A split as a sequence of `Record`s with random access; may be pickled and shared by threads.

    Args:
        data_dir: folder written by `data build`.
        split: one of `SPLITS`.
        tokenizer: the tokenizer the ids will be used with (its `hash` must be the shards'); None
            where ids are not interpreted.

    Raises:
        UserError: no shards there, unknown split, wrong tokenizer, missing or truncated shard file;
            when a record is read, a damaged one.
    """

    def __init__(self, data_dir: str | Path, split: str, tokenizer: Any = None):
        self.data_dir = storage.local(data_dir)
        self.split = split
        self.manifest = load_manifest(self.data_dir)
        if split not in self.manifest["splits"]:
            raise UserError(
                f"{data_dir}: no split {split!r}; it has {', '.join(self.manifest['splits'])}"
            )
        built_with = self.manifest["tokenizer"]
        if tokenizer is not None and tokenizer.hash != built_with["hash"]:
            raise UserError(
                f"{data_dir}: built with tokenizer preset {built_with['preset']!r} "
                f"(hash {built_with['hash'][:12]}), the model uses hash {tokenizer.hash[:12]}; "
                "build the data again with the model's preset (--tokenizer)"
            )
        shards = self.manifest["splits"][split]["shards"]
        self._objects = self._in_bucket()
        self._paths = [self._checked(shard) for shard in shards]
        self._first = np.cumsum([0] + [shard["n_pieces"] for shard in shards])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        index_path = self.data_dir / index_name(split)
        check_readable(index_path)
        if not index_path.is_file():
            raise UserError(f"{index_path}: missing; build the data again")
        content = io.BytesIO(index_path.read_bytes())  # a disk that fails is not a damaged file
        try:
            with np.load(content, allow_pickle=False) as index:
                self._index = {name: index[name] for name in index.files}
        except _DAMAGE as error:
            raise _damaged(index_path, error) from error

    def _in_bucket(self) -> dict[str, storage.Object]:
        """The shards of a corpus in a bucket, which are brought when they are read."""
        there = storage.listing(self.data_dir) if storage.is_remote(self.data_dir) else {}
        names = {shard["file"] for shard in self.manifest["splits"][self.split]["shards"]}
        return {name: there[name] for name in names & there.keys()}

    def read_ahead(self) -> None:
        """Begins to bring all shards from their bucket; UserError where the disk has no room."""
        storage.read_ahead(self.data_dir, self._objects)

    def _checked(self, shard: dict[str, Any]) -> Path:
        path = self.data_dir / shard["file"]
        check_readable(path)
        size = path.stat().st_size if path.is_file() else None
        if storage.is_remote(path):
            there = self._objects.get(shard["file"])
            size = None if there is None else there.size
        if size != shard["bytes"]:
            found = "missing" if size is None else f"{size} bytes instead of {shard['bytes']}"
            raise UserError(f"{path}: {found}; copy it again or build the data again")
        return path

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, i: int) -> Record:
        if not -len(self) <= i < len(self):
            raise IndexError(f"piece {i} of {len(self)} in {self.data_dir} ({self.split})")
        i %= len(self)
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        try:
            return unpack_record(self._reader(shard).read([i - int(self._first[shard])])[0])
        except (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            check_readable(self._paths[shard])
            raise _damaged(self._paths[shard], error) from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                from array_record.python.array_record_module import ArrayRecordReader

                path = self._paths[shard]
                if (there := self._objects.get(path.name)) is not None:
                    storage.fetch(path, {"": there}, lazily=False)
                self._readers[shard] = ArrayRecordReader(os.fsencode(path), _READER_OPTIONS)
            return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, int64 [N]; reads no record."""
        return self._index["n_tokens"].astype(np.int64)

    @property
    def n_notes(self) -> np.ndarray:
        """Notes of each piece, int64 [N]; reads no record."""
        return self._index["n_notes"].astype(np.int64)

    @property
    def duration_ms(self) -> np.ndarray:
        """Duration of each piece in ms, int64 [N]; reads no record."""
        return self._index["duration_ms"].astype(np.int64)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels that at least one piece has."""
        names = (key.partition(":") for key in self._index)
        return tuple(sorted(name for prefix, _, name in names if prefix == "label"))

    def label_codes(self, label: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Per piece the position of its value in the sorted values, or -1; int32 [N], values."""
        if label not in self.label_names:
            return np.full(len(self), -1, dtype=np.int32), ()
        values = tuple(json.loads(self._index[f"values:{label}"].tobytes()))
        return self._index[f"label:{label}"], values


def occurring_ids(data_dir: str | Path, vocab_size: int) -> np.ndarray:
    """Which token ids the pieces of all splits hold, bool [V]; reads every record."""
    found = np.zeros(vocab_size, bool)
    for split in load_manifest(data_dir)["splits"]:
        pieces = TokenShards(data_dir, split)
        pieces.read_ahead()
        for i in range(len(pieces)):
            found[pieces[i].ids] = True
    return found


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0].partition(";")[0][:120]
    return UserError(
        f"{path}: damaged ({reason}); copy it again, or build the data again with --overwrite"
    )


def rejections(data_dir: str | Path) -> Iterable[dict[str, Any]]:
    """The lines of rejected.jsonl: path, stage, reason, value. Raises UserError without it."""
    path = storage.local(data_dir) / REJECTED
    if not path.is_file():
        raise UserError(f"{path}: missing; build the corpus again with --overwrite")
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
