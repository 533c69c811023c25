"""Where MIDI files come from: a folder, a tar archive read in place, or a compressed one.

Every source is listed in the same order (by the bytes of the path), so that a folder and the
archive made of it give the same corpus.
"""

import heapq
import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgpack

from data_pipeline.errors import UserError
from data_pipeline.metadata import is_table_name

SUFFIXES = (".mid", ".midi", ".kar")
_COPY_BYTES = 1 << 20
_RUN_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a source.

    Attributes:
        path: relative to the source, "/" between parts.
        size: bytes.
        offset: where its bytes begin in the archive; -1 for a file of a folder.
    """

    path: str
    size: int
    offset: int = -1


def no_midi_files(source: Path) -> UserError:
    """What to say of a source without any."""
    if (source / "manifest.json").is_file():
        return UserError(f"{source}: token shards are here, MIDI files are wanted")
    return UserError(f"{source}: no MIDI files ({', '.join(SUFFIXES)}) here or in its folders")


def is_midi_name(name: str) -> bool:
    """Whether a file name has a MIDI suffix, in any case; macOS forks (._x) do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith("._")


def list_source(source: Path, spool: Path, tables: Path) -> Iterator[Entry]:
    """Yields the MIDI files of a folder or archive, sorted by path.

    Args:
        source: folder, .tar, or a tar compressed as tarfile can read it (.tar.gz, .tgz, .tar.xz…).
        spool: file that takes the MIDI bytes of a compressed archive, which has no random access;
            untouched otherwise. Its folder also takes what sorting an archive needs.
        tables: folder that takes the label tables of an archive, which are found beside its MIDI
            files or in the folder that holds all of them; not made otherwise.

    Raises:
        UserError: no such folder or archive, or an archive that cannot be read.
    """
    if source.is_dir():
        yield from _walk(str(source), "")
    elif source.is_file():
        yield from _list_archive(source, spool, tables)
    else:
        raise UserError(
            f"{source}: no such folder or tar archive; give the folder of your MIDI files"
        )


def read_entry(root: Path, entry: Entry) -> bytes:
    """The bytes of a file; `root` is the folder, the archive or the spool. Raises OSError."""
    if entry.offset < 0:
        return (root / entry.path).read_bytes()
    with root.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size)


def readable_root(source: Path, spool: Path) -> Path:
    """What `read_entry` reads from, once `list_source` was exhausted."""
    return spool if source.is_file() and _is_compressed(source) else source


def _walk(root: str, prefix: str) -> Iterator[Entry]:
    """Depth first; memory is bounded by the largest single folder."""
    found = []
    with os.scandir(os.path.join(root, prefix)) as items:
        for item in items:
            if item.is_dir(follow_symlinks=False):
                found.append((item.name + "/", 0))
            elif is_midi_name(item.name) and item.is_file():
                found.append((item.name, item.stat().st_size))
    for name, size in sorted(found, key=lambda item: os.fsencode(item[0])):
        if name.endswith("/"):
            yield from _walk(root, prefix + name)
        else:
            yield Entry(prefix + name, size)


def _is_compressed(source: Path) -> bool:
    """Whether the archive's bytes are not those of the files in it."""
    try:
        with tarfile.open(source, "r:"):
            return False
    except tarfile.ReadError:
        return True


def _list_archive(source: Path, spool: Path, tables: Path) -> Iterator[Entry]:
    try:
        if _is_compressed(source):
            with tarfile.open(source, "r|*") as archive, spool.open("wb") as out:
                found = _Listing(spool.parent)
                for path, member in _members(archive, tables):
                    found.add(path, member.size, out.tell())
                    _copy(archive, member, out)
                out.flush()
                os.fsync(out.fileno())
        else:
            with tarfile.open(source, "r:") as archive:
                found = _Listing(spool.parent)
                for path, member in _members(archive, tables):
                    found.add(path, member.size, member.offset_data)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{source}: not a readable tar archive ({error}); give a folder, .tar or .tar.gz"
        ) from error
    yield from found.entries()


class _Listing:
    """Members of an archive in the order they are met, to be read sorted by path.

    Sorted runs go to the disk, so that a million members need no more memory than twenty thousand.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._rows: list[tuple[bytes, int, int, int]] = []
        self._runs: list[Path] = []
        self._n = 0

    def add(self, path: str, size: int, offset: int) -> None:
        # Of members with one path the last counts, which is what unpacking leaves: it comes first.
        self._n += 1
        self._rows.append((os.fsencode(path), -self._n, size, offset))
        if len(self._rows) == _RUN_ROWS:
            run = self._folder / f"members-{len(self._runs)}"
            with run.open("wb") as out:
                for row in self._sorted_rows():
                    out.write(msgpack.packb(row))
            self._runs.append(run)

    def _sorted_rows(self) -> list[tuple[bytes, int, int, int]]:
        rows, self._rows = self._rows, []
        rows.sort()
        return rows

    def entries(self) -> Iterator[Entry]:
        """Sorted by path, each path once."""
        with ExitStack() as stack:
            runs = [stack.enter_context(run.open("rb")) for run in self._runs]
            unpackers = [msgpack.Unpacker(run, use_list=False) for run in runs]
            before = None
            for path, _, size, offset in heapq.merge(self._sorted_rows(), *unpackers):
                if path != before:
                    yield Entry(os.fsdecode(path), size, offset)
                before = path
        for run in self._runs:
            run.unlink()


def _members(archive: tarfile.TarFile, tables: Path) -> Iterator[tuple[str, tarfile.TarInfo]]:
    for member in archive:
        vars(archive)["members"] = []  # tarfile keeps every header it read: a million of them
        path = member.name.removeprefix("./")
        folder, _, name = path.rpartition("/")
        # Sparse members are stored in pieces, so their bytes cannot be read in place.
        if not member.isreg() or member.issparse():
            continue
        if is_midi_name(name):
            yield path, member
        elif is_table_name(name) and "/" not in folder and folder not in ("..", "."):
            (tables / folder).mkdir(parents=True, exist_ok=True)
            with (tables / folder / name).open("wb") as out:
                _copy(archive, member, out)
                out.flush()
                os.fsync(out.fileno())


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, out: BinaryIO) -> None:
    stream = archive.extractfile(member)
    while stream is not None and (block := stream.read(_COPY_BYTES)):
        out.write(block)
