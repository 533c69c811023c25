"""Tar and zip archives as trees of members: read in place, or unpacked into one file.

A plain tar and a zip have random access. A compressed tar has none: the MIDI files in it go, one
after the other, into one spool file while it is listed.
"""

import bz2
import gzip
import io
import os
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.artifact import synced
from data_pipeline.build.listing import Entry, MemberTree, is_midi_name
from data_pipeline.errors import InvalidMidi
from data_pipeline.metadata import is_table_name

FILE_BYTES = 32 << 20
"""No larger file is unpacked: music is never that long, and a few bytes can become terabytes."""
_TABLE_BYTES = 1 << 30
_COPY_BYTES = 1 << 20
_MAX_NUMBER = 1 << 62


class BrokenArchiveError(Exception):
    """What is wrong with an archive."""


def member_path(name: str) -> str:
    """A member's name as the path that unpacking gives it."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def table_file(path: str, tables: Path) -> Path | None:
    """Where a member goes if it is a label table: of all, or of a folder at the top."""
    folder, _, name = path.rpartition("/")
    if not is_table_name(name) or "/" in folder or folder == "..":
        return None
    (tables / folder).mkdir(parents=True, exist_ok=True)
    return tables / folder / name


def gunzipped(data: bytes, name: str, max_bytes: int = FILE_BYTES) -> bytes:
    """What a .gz holds; other bytes as they are. Raises InvalidMidi: damaged, or too large."""
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(max_bytes + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidMidi("damaged", f"{name}: not whole gzip data ({error})") from None
        if len(data) > max_bytes:
            raise InvalidMidi("too-large", f"{name}: over {max_bytes:,} bytes")
    return data


def write_blocks(blocks: Iterator[bytes], path: Path) -> None:
    """Writes a file and flushes it to the disk."""
    with synced(path) as out:
        for block in blocks:
            out.write(block)


# --- tar -----------------------------------------------------------------------------------------


def add_tar(source: Path, tree: MemberTree, spool: Path, tables: Path) -> None:
    """Adds the members of a tar archive; makes the spool if it is compressed.

    Raises:
        BrokenArchiveError, tarfile.TarError, EOFError, OSError: it cannot be read.
    """
    with ExitStack() as stack:
        mode, out = "r:", None
        if _is_compressed(source):
            mode, out = "r|*", stack.enter_context(synced(spool))
        archive = stack.enter_context(tarfile.open(source, mode, encoding="utf-8"))  # type: ignore
        for member in _members(archive):
            if member is None and out is not None:
                raise BrokenArchiveError("cut off")  # no compressed archive ends so by itself
            if member is None:
                tree.add(Entry(source.name, 0, fault="no-end-of-archive"))
            else:
                _add_member(tree, archive, member, tables, out)


def _is_compressed(source: Path) -> bool:
    """Whether the archive's bytes are not those of the files in it."""
    try:
        with tarfile.open(source, "r:"):
            return False
    except tarfile.ReadError:
        return True


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo | None]:
    """Yields the members, and None at last where the archive just stops.

    Iterating over the archive itself keeps every member, and ends at a header that is damaged as if
    there was nothing after it.
    """
    member, stream = archive.next(), archive.fileobj
    while member is not None and stream is not None:
        if not 0 <= member.size < _MAX_NUMBER:  # could lead back to where it was before
            raise BrokenArchiveError(f"member {member.name[:100]!r} of {member.size} bytes")
        yield member
        if stream.tell() != archive.offset:
            stream.seek(archive.offset - 1)
            if not stream.read(1):
                raise BrokenArchiveError(f"cut off in member {member.name[:100]!r}")
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.HeaderError as error:
            kind = type(error).__name__
            if kind == "EmptyHeaderError":
                yield None
            elif kind != "EOFHeaderError":
                raise BrokenArchiveError(f"{error} at byte {archive.offset}") from None
            return


def _add_member(
    tree: MemberTree,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    tables: Path,
    out: BinaryIO | None,
) -> None:
    path = member_path(member.name)
    is_midi = is_midi_name(path.rpartition("/")[2])
    if not path:
        return
    if member.isdir():
        tree.add_folder(path)
    elif member.issym():
        tree.add_link(path, member.linkname)
    elif member.islnk():
        tree.add_hard_link(path, member_path(member.linkname))
    elif not member.isreg() or member.issparse():
        # A sparse member is stored in pieces that are not there as they should be read.
        if is_midi:
            fault = "sparse-member" if member.isreg() else "not-a-file"
            tree.add(Entry(path, member.size, fault=fault))
    elif (table := table_file(path, tables)) is not None:
        write_blocks(_blocks(archive, member), table)
    elif out is None:
        tree.add(Entry(path, member.size, member.offset_data))
    elif is_midi and member.size <= FILE_BYTES:
        tree.add(Entry(path, member.size, out.tell()))
        out.writelines(_blocks(archive, member))
    else:
        tree.add(Entry(path, member.size))


def _blocks(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    stream = archive.extractfile(member)
    while stream is not None and (block := stream.read(_COPY_BYTES)):
        yield block


# --- zip -----------------------------------------------------------------------------------------

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_ENCRYPTED, _UTF8_NAME = 1, 1 << 11
_FAT, _UNIX, _NTFS = 0, 3, 10
_ZIP64_EXTRA, _UNICODE_PATH_EXTRA = 0x0001, 0x7075
_MAX_COMMENT_BYTES = 65_535
_MAX_TARGET_BYTES = 4096


@dataclass(frozen=True)
class _ZipMember:
    """A record of the central directory, which alone knows sizes and kinds for certain."""

    path: str
    is_folder: bool
    size: int
    packed: int
    offset: int
    method: int
    crc: int
    mode: int
    encrypted: bool


def is_zip(source: Path) -> bool:
    """Whether a file begins as a zip archive does, or is called so: there may be something before
    the archive.
    """
    with source.open("rb") as file:
        return file.read(2) == b"PK" or source.suffix.lower() == ".zip"


def add_zip(source: Path, tree: MemberTree, tables: Path) -> None:
    """Adds the members of a zip archive.

    Raises:
        BrokenArchiveError, OSError: it cannot be read.
    """
    with source.open("rb") as file:
        for member in _zip_members(file):
            entry = Entry(
                member.path, member.size, member.offset, member.method, member.packed, member.crc
            )
            name = member.path.rpartition("/")[2]
            if member.is_folder:
                tree.add_folder(member.path)
            elif member.encrypted or member.method not in (_STORED, _DEFLATED, _BZIP2):
                if is_midi_name(name):
                    detail = "" if member.encrypted else f"method {member.method}"
                    fault = "encrypted" if member.encrypted else "unknown-compression"
                    tree.add(Entry(member.path, member.size, fault=fault, detail=detail))
            elif stat.S_ISLNK(member.mode):
                target = unzip(file, entry, _MAX_TARGET_BYTES)
                tree.add_link(member.path, target.decode("utf-8", "surrogateescape"))
            elif stat.S_IFMT(member.mode) not in (0, stat.S_IFREG):
                if is_midi_name(name):
                    tree.add(Entry(member.path, member.size, fault="not-a-file"))
            elif (table := table_file(member.path, tables)) is not None:
                write_blocks(iter([unzip(file, entry, _TABLE_BYTES)]), table)
            else:
                tree.add(entry)


def unzip(file: BinaryIO, entry: Entry, max_bytes: int) -> bytes:
    """The bytes of a member, checked against the archive's checksum.

    Raises:
        InvalidMidi: damaged, or not of the size that the archive says.
    """
    if entry.size > max_bytes:
        raise InvalidMidi("too-large", f"{entry.path}: {entry.size} bytes")
    file.seek(entry.offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise InvalidMidi("damaged", f"{entry.path}: no such member in the archive")
    *_, name_length, extra_length = _LOCAL.unpack(header)
    file.seek(name_length + extra_length, os.SEEK_CUR)
    packed = file.read(min(entry.packed, 2 * max_bytes))
    wanted = entry.size + 1
    try:
        if entry.method == _DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, wanted)
        elif entry.method == _BZIP2:
            data = bz2.BZ2Decompressor().decompress(packed, wanted)
        else:
            data = packed
    except (zlib.error, OSError, ValueError) as error:
        raise InvalidMidi("damaged", f"{entry.path}: {error}") from None
    if len(data) != entry.size or zlib.crc32(data) != entry.crc:
        raise InvalidMidi("damaged", f"{entry.path}: not the bytes that were packed")
    return data


def _central_directory(file: BinaryIO) -> tuple[int, int, int]:
    """Where it begins, where it ends, and what to add to the offsets in it.

    Raises:
        BrokenArchiveError: no zip archive, or one that was cut off.
    """
    length = file.seek(0, os.SEEK_END)
    tail_at = max(0, length - _END.size - _MAX_COMMENT_BYTES - _LOCATOR64.size)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise BrokenArchiveError("it has no central directory: cut off, or no zip at all")
    _, disk, _, _, _, size, offset, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if at >= _LOCATOR64.size and tail[at - _LOCATOR64.size : at - 16] == b"PK\6\7":
        _, _, end64, _ = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)
        # Archives with something before them: the record is where it should be, or right here.
        for place in (end64, end - _LOCATOR64.size - _END64.size):
            file.seek(min(place, length))
            record = file.read(_END64.size)
            if len(record) == _END64.size and record[:4] == b"PK\6\6":
                *_, disk, _, _, _, size, offset = _END64.unpack(record)
                end = place
                break
        else:
            raise BrokenArchiveError("its zip64 record is damaged")
    start = end - size
    if disk or start < 0 or offset > start:
        raise BrokenArchiveError("one part of several" if disk else "its end record is damaged")
    return start, end, start - offset


def _zip_members(file: BinaryIO) -> Iterator[_ZipMember]:
    at, end, shift = _central_directory(file)
    while at < end:  # the number of members in the end record is 16 bits of it with some writers
        file.seek(at)  # between two records the caller reads elsewhere
        header = file.read(_CENTRAL.size)
        if len(header) < _CENTRAL.size or header[:4] != b"PK\1\2":
            raise BrokenArchiveError("its central directory is damaged")
        fields = _CENTRAL.unpack(header)
        (system, flags, method) = fields[2], fields[5], fields[6]
        crc, packed, unpacked, name_length, extra_length, comment_length = fields[9:15]
        raw = file.read(name_length)
        extra = _extra_fields(file.read(extra_length))
        at += _CENTRAL.size + name_length + extra_length + comment_length
        numbers = [unpacked, packed, fields[18]]
        _widen(numbers, extra.get(_ZIP64_EXTRA, b""))
        if max(numbers) >= _MAX_NUMBER:
            raise BrokenArchiveError("its central directory is damaged")
        name = _zip_name(raw, flags, system, extra)
        if not member_path(name):
            continue
        yield _ZipMember(
            path=member_path(name),
            is_folder=name.endswith("/"),
            size=numbers[0],
            packed=numbers[1],
            offset=numbers[2] + shift,
            method=method,
            crc=crc,
            mode=fields[17] >> 16 if system == _UNIX else 0,
            encrypted=bool(flags & _ENCRYPTED),
        )


def _extra_fields(data: bytes) -> dict[int, bytes]:
    fields, at = {}, 0
    while at + 4 <= len(data):
        kind, size = struct.unpack_from("<2H", data, at)
        fields[kind] = data[at + 4 : at + 4 + size]
        at += 4 + size
    return fields


def _widen(numbers: list[int], extra: bytes) -> None:
    """Numbers that do not fit 32 bits are in the zip64 field, in this order."""
    at = 0
    for i, number in enumerate(numbers):
        if number == 0xFFFFFFFF and at + 8 <= len(extra):
            (numbers[i],) = struct.unpack_from("<Q", extra, at)
            at += 8


def _zip_name(raw: bytes, flags: int, system: int, extra: dict[int, bytes]) -> str:
    """The name as unpacking gives it: UTF-8 by flag or by its own extra field, else UTF-8 where it
    is that (macOS sets no flag), else the bytes as they are (Unix) or code page 437 (DOS).
    """
    unicode_path = extra.get(_UNICODE_PATH_EXTRA, b"")
    if unicode_path[:1] == b"\1" and unicode_path[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
        raw, flags = unicode_path[5:], flags | _UTF8_NAME
    raw = raw.partition(b"\0")[0]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        as_it_is = system == _UNIX or flags & _UTF8_NAME
        name = raw.decode("utf-8", "surrogateescape") if as_it_is else raw.decode("cp437")
    return name.replace("\\", "/") if system in (_FAT, _NTFS) else name
