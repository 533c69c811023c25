"""Where MIDI files come from: a folder, an archive, Parquet, or a single file.

    folder                        searched recursively, linked folders too
    .zip, .tar                    read in place
    .tar.gz, .tar.bz2, .tar.xz    unpacked into one file for as long as the build takes
    .parquet, or a folder of it   rows with MIDI bytes; unpacked likewise
    .mid, .midi, .kar, .rmi       one file; with .gz after it also in all of the above

Every source is listed in the same order (by the bytes of the path), so that a folder and what was
made of it give the same corpus.
"""

import errno
import hashlib
import lzma
import sqlite3
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.artifact import file_digest
from data_pipeline.building.archives import (
    FILE_BYTES,
    BrokenArchiveError,
    add_tar,
    add_zip,
    gunzipped,
    is_zip,
    unzip,
)
from data_pipeline.building.listing import SUFFIXES, DiskTree, Entry, MemberTree, is_midi_name, walk
from data_pipeline.building.parquet_table import add_parquet, is_parquet
from data_pipeline.errors import InvalidMidi, UserError

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
        if first is None and (files := _parquet_files(source)):
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
        return next(walk_folder(source), None) is None and bool(_parquet_files(source))
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


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.parquet") if path.is_file())


def _list_members(source: Path, files: list[Path], spool: Path, tables: Path) -> Iterator[Entry]:
    """Lists the archive, or the Parquet files, that `source` is or holds."""
    tree = MemberTree(spool.with_name("members"))
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
