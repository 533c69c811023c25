"""What an artefact was made of, and what may be done with what is already there.

An `Identity` holds what was asked: the digests of all inputs, by content, and the settings. It is
kept with the artefact, so that whoever finds one where it wants to write gets Fresh, Resume or
Done, or one refusal that names the difference. Files are compared by the sha256 of their bytes,
never by their times: reading and hashing a million files of 30 kB takes about a minute.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import UserError, printable

Item = TypeVar("Item")

HASHING_THREADS = 16
"""Hide the latency of opening files; hashing and reading let other threads run."""
_FILES_PER_TASK = 64
MAX_DIFFERENCES = 3
"""That one refusal names."""


class There(Enum):
    """What was found where an artefact is to be written."""

    FRESH = "nothing that counts: make it from the beginning"
    RESUME = "the beginning of the same artefact: go on"
    DONE = "the same artefact, finished: nothing to do"


@dataclass(frozen=True)
class Identity:
    """All that an artefact depends on.

    Attributes:
        kind: what it is, in the words of its users ("a corpus", "embeddings").
        version: of what the program makes of these inputs; raised when that changes.
        inputs: digest of each input by its name, see `file_digest`, `rows_digest`.
        settings: JSON values.
    """

    kind: str
    version: int
    inputs: Mapping[str, str | None]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        # As it comes back from JSON, so that tuples and lists are the same.
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "kind": self.kind,
            "version": self.version,
            "inputs": dict(self.inputs),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, value: Any) -> "Identity | None":
        """The identity in a JSON object; None for anything else."""
        try:
            return cls(value["kind"], value["version"], value["inputs"], value["settings"])
        except (KeyError, TypeError):
            return None

    @property
    def digest(self) -> str:
        """sha256 of everything."""
        return json_digest(self.to_json())

    def differences(
        self, before: "Identity", details: Mapping[str, str] | None = None
    ) -> list[str]:
        """Each input and setting that is not as `before`, e.g. "val_fraction: 0.1 → 0.2".

        Args:
            details: what can be said of an input or a setting that changed, e.g. "3 files more",
                instead of digests and values; "" for nothing.
        """
        if (self.kind, self.version) != (before.kind, before.version):
            return [f"{before.kind} (version {before.version}) → {self.kind} ({self.version})"]
        found = []
        for name in sorted(self.inputs.keys() | before.inputs.keys()):
            old, new = before.inputs.get(name, ""), self.inputs.get(name, "")
            if old != new:
                known = (details or {}).get(name, f"{_short(old)} → {_short(new)}")
                found += [f"{name}: {known}"] * bool(known)
        both = [dict(before.settings), dict(self.settings)]
        for name, known in (details or {}).items():
            if (old := both[0].get(name)) is not None and old != both[1].get(name) and known:
                found.append(f"{name}: {known}")
                both = [{k: v for k, v in side.items() if k != name} for side in both]
        was, now = map(_flat, both)
        for name in sorted(was.keys() | now.keys()):
            old, new = was.get(name, _ABSENT), now.get(name, _ABSENT)
            if old != new and not name.endswith("_hash"):  # its preset differs, or its version
                found.append(f"{name}: {_shown(old)} → {_shown(new)}")
        return found or ["another version of the tokenizer"] * (self != before)


def look(
    out: str | Path,
    asked: Identity,
    *,
    finished: Identity | None = None,
    unfinished: Identity | None = None,
    overwrite: bool = False,
    details: Callable[[Identity], Mapping[str, str]] | None = None,
) -> There:
    """Holds what was asked against what is there.

    Args:
        finished, unfinished: identities of the complete and of the unfinished artefact at `out`.
        overwrite: whatever is there may be replaced.
        details: what can be said of inputs that differ from those of the given identity.

    Raises:
        UserError: something else is there, and `overwrite` was not said.
    """
    if overwrite:
        return There.RESUME if unfinished == asked else There.FRESH
    if finished == asked:
        return There.DONE
    if finished is None and unfinished == asked:
        return There.RESUME
    other = finished or unfinished
    if other is None:
        return There.FRESH
    found = asked.differences(other, details(other) if details else None)
    if len(found) > MAX_DIFFERENCES:
        found[MAX_DIFFERENCES:] = [f"and {len(found) - MAX_DIFFERENCES} more differences"]
    what = other.kind if finished else f"the beginning of {other.kind}"
    raise UserError(
        f"{out}: holds {what} made otherwise ({'; '.join(found)}); "
        "choose another output, or --overwrite to replace it"
    )


_ABSENT = object()


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not said"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-16:]}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


# --- digests -------------------------------------------------------------------------------------


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed(
    items: Iterable[Item], digest: Callable[[Item], str | None]
) -> Iterator[tuple[Item, str | None]]:
    """Yields each item with its digest, in order, computed by threads; memory is bounded."""

    def task(group: tuple[Item, ...]) -> list[tuple[Item, str | None]]:
        return [(item, digest(item)) for item in group]

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        waiting: deque = deque()
        todo = iter(items)
        while group := tuple(islice(todo, _FILES_PER_TASK)):
            waiting.append(pool.submit(task, group))
            if len(waiting) > 2 * HASHING_THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def rows_digest(rows: Iterable[Any]) -> str:
    """sha256 of JSON values in order, such as (path, sha256) of each file of a listing."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(json.dumps(row, sort_keys=True).encode())
    return sha.hexdigest()


def listing_difference(
    before: Iterable[tuple[str, str | None]], now: Iterable[tuple[str, str | None]]
) -> str:
    """How two listings, sorted by the bytes of the path, differ: "3 files more, 1 changed …"."""
    counts, first = {"more": 0, "fewer": 0, "changed": 0}, list[str]()
    old, new = iter(before), iter(now)
    one, other = next(old, None), next(new, None)
    while one is not None or other is not None:
        if other is None or (one is not None and os.fsencode(one[0]) < os.fsencode(other[0])):
            path, kind, one = one[0], "fewer", next(old, None)  # type: ignore[index]
        elif one is None or os.fsencode(other[0]) < os.fsencode(one[0]):
            path, kind, other = other[0], "more", next(new, None)
        else:
            path, kind = one[0], "" if one[1] == other[1] else "changed"
            one, other = next(old, None), next(new, None)
        if kind:
            counts[kind] += 1
            first += [printable(path)] * (len(first) < MAX_DIFFERENCES)
    said = [f"{n:,} {kind}" for kind, n in counts.items() if n]
    if not said:
        return "the same files"
    number, _, rest = said[0].partition(" ")
    unit = "file" if number == "1" else "files"
    return ", ".join([f"{number} {unit} {rest}", *said[1:]]) + f" (first: {', '.join(first)})"


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def atomic(path: str | Path, *, beside: Path | None = None) -> Iterator[Path]:
    """Yields a file name to write to; what is there at the end takes the place of `path`.

    Flushed to the disk, file and folder: `path` holds all of it or what it held before, whatever
    happens, and several processes may write at once.

    Args:
        beside: folder on the same disk for the unfinished file, instead of that of `path`.
    """
    path = Path(path)
    name = f".{path.name}.{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}.part"
    partial = (beside or path.parent) / name
    try:
        yield partial
        sync(partial)
        publish(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # what its reader knows
        raise


def write_atomically(path: str | Path, data: bytes | str, *, beside: Path | None = None) -> None:
    """Writes bytes, or text as UTF-8, see `atomic`."""
    with atomic(path, beside=beside) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def publish(made: Path, path: Path) -> None:
    """Renames a file that is already flushed, and flushes the folder's entry."""
    os.replace(made, path)
    sync(path.parent, os.O_RDONLY)


@contextmanager
def synced(path: Path, mode: str = "wb", encoding: str | None = None) -> Iterator[Any]:
    """Opens a file to write to, and flushes it to the disk at the end of the block.

    For what nobody else reads before it is published, or before a record names it; see `atomic`.
    """
    with path.open(mode, encoding=encoding) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Flushes to the disk what was written to a file that is closed, or, read-only, a folder."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process. Nothing where the disk has none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: str | Path, *, make: bool = True) -> Iterator[Path]:
    """Makes a folder and its parents; where the block fails, those that are new and empty go.

    Args:
        make: False leaves making them to the block.
    """
    path = Path(path)
    made = []
    for folder in (path, *path.absolute().parents):
        if folder.exists():
            break
        made.append(folder)
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{path}: a file is where a folder is wanted; name another folder"
        ) from None
    try:
        yield path
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                break
        raise


def refuse_occupied(out: str | Path, wanted: str) -> None:
    """Raises `UserError` for a folder with what is neither ours to mix with nor what is `wanted`.

    Args:
        wanted: "a corpus" or "a training run".
    """
    from data_pipeline.build.listing import is_midi_name

    folder = Path(out)
    if not folder.is_dir():
        return
    midi = next((path.name for path in folder.iterdir() if is_midi_name(path.name)), None)
    found = {
        "a corpus": (folder / "manifest.json").is_file(),
        "a training run": (folder / "checkpoints").is_dir(),
        f"MIDI files ({midi}, …)": midi is not None,
    }
    if others := [what for what, there in found.items() if there and what != wanted]:
        raise UserError(
            f"{out}: holds {' and '.join(others)}, among which {wanted} would be written; name a "
            "folder of its own"
        )


def refuse_inside(out: str | Path, source: str | Path, what: str) -> None:
    """Raises `UserError` where `out` is the folder `source` or lies in it."""
    inner, outer = Path(out).resolve(), Path(source).resolve()
    if outer.is_dir() and (inner == outer or outer in inner.parents):
        raise UserError(
            f"{out}: lies in {source}; nothing is written into {what}: name a folder outside"
        )
