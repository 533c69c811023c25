"""The files of a source in one order, whether they lie in folders or in an archive.

A folder of the disk and the index of an archive are both trees, and one walk lists either: by the
bytes of the path, through links to files and folders, but round no loop. So a folder and any
archive of it have the same listing. What cannot be read is listed too, with the reason.
"""

import errno
import os
import sqlite3
import stat
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
MAX_LINKED_FOLDERS = 10_000
"""Links to folders with links to folders … can make any number of files of a few bytes."""
_MAX_HOPS = 40  # links on the way to one file, as Linux has it
_MAX_PATH = 4096  # bytes
_CACHE_KIB = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a source.

    Attributes:
        path: relative to the source, "/" between parts; bytes that are not UTF-8 as surrogates.
        size: bytes (of a .gz: as it is stored).
        offset: where its bytes begin in the archive; -1 for a file of a folder.
        method, packed, crc: of a member of a zip: number of the compression, bytes it takes in the
            archive after the local header at `offset`, checksum; packed is -1 for other files.
        fault, detail: why it cannot be read; "" for a file that can.
    """

    path: str
    size: int
    offset: int = -1
    method: int = 0
    packed: int = -1
    crc: int = 0
    fault: str = ""
    detail: str = ""

    @property
    def row(self) -> tuple[str, int, int, int, int, int, str, str]:
        """All fields, in order (`dataclasses.astuple` takes ten times as long)."""
        place = (self.offset, self.method, self.packed, self.crc)
        return self.path, self.size, *place, self.fault, self.detail


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of a tree.

    Attributes:
        name: of the folder, or of the link to it.
        place: what its tree knows it by.
        identity: the same for each way that leads to it.
        linked: whether this is a link.
    """

    name: str
    place: str
    identity: Hashable
    linked: bool = False


class Tree(Protocol):
    """Folders in folders, with MIDI files in them."""

    def root(self) -> Folder:
        """Where it begins."""

    def children(self, folder: Folder) -> Iterator[Entry | Folder]:
        """The MIDI files and folders in a folder, `path` being the name, sorted by its bytes, with
        "/" after the name of a folder. Raises OSError.
        """


def is_midi_name(name: str) -> bool:
    """Whether a file name has a MIDI suffix, in any case, with or without .gz after it; macOS forks
    (._x) do not count.
    """
    return name.lower().removesuffix(".gz").endswith(SUFFIXES) and not name.startswith("._")


def walk(tree: Tree) -> Iterator[Entry]:
    """Yields the files depth first; memory is bounded by the largest single folder of the disk.

    Raises:
        OSError: the root cannot be read; of any other folder that is listed as a fault.
    """
    root = tree.root()
    above = [("", root, tree.children(root))]
    n_linked = 0
    while above:
        prefix, _, children = above[-1]
        child = next(children, None)
        if child is None:
            above.pop()
        elif isinstance(child, Entry):
            yield Entry(prefix + child.path, *child.row[1:])
        else:
            path = prefix + child.name
            n_linked += child.linked
            again = [p for p, folder, _ in above if folder.identity == child.identity]
            if again:
                yield Entry(path, 0, fault="link-loop", detail=again[0].rstrip("/") or ".")
                continue
            if child.linked and n_linked > MAX_LINKED_FOLDERS:
                yield Entry(path, 0, fault="too-many-links")
                continue
            try:
                above.append((path + "/", child, tree.children(child)))
            except OSError as error:
                yield Entry(path, 0, fault="unreadable-folder", detail=error.strerror or "")


def _counts(name: str) -> bool:
    """Whether a broken link is worth a word: a link without suffix may be meant for a folder."""
    return is_midi_name(name) or "." not in name


class DiskTree:
    """A folder of the disk."""

    def __init__(self, root: Path):
        self._root = str(root)
        # A link to a folder that holds the root leads to all that lies beside it, and back.
        enclosing = [folder.stat() for folder in root.resolve().parents]
        self._enclosing = {(found.st_dev, found.st_ino) for found in enclosing}

    def root(self) -> Folder:
        """See `Tree`."""
        found = os.stat(self._root)
        return Folder("", "", (found.st_dev, found.st_ino))

    def children(self, folder: Folder) -> Iterator[Entry | Folder]:
        """See `Tree`."""
        found: list[tuple[bytes, Entry | Folder]] = []
        with os.scandir(os.path.join(self._root, folder.place)) as items:
            for item in items:
                child = self._child(item, folder)
                if child is not None:
                    is_folder = isinstance(child, Folder)
                    found.append((os.fsencode(item.name) + b"/" * is_folder, child))
        found.sort(key=lambda pair: pair[0])
        return iter([child for _, child in found])

    def _child(self, item: "os.DirEntry[str]", folder: Folder) -> Entry | Folder | None:
        is_midi = is_midi_name(item.name)
        is_link = item.is_symlink()
        if not is_midi and not is_link and not item.is_dir():
            return None
        try:
            found = item.stat()
        except OSError as error:
            if not _counts(item.name):
                return None
            if not is_link:
                return Entry(item.name, 0, fault="unreadable", detail=error.strerror or "")
            fault = "link-loop" if error.errno == errno.ELOOP else "broken-link"
            return Entry(item.name, 0, fault=fault, detail=os.readlink(item.path))
        if stat.S_ISDIR(found.st_mode):
            if is_link and (found.st_dev, found.st_ino) in self._enclosing:
                detail = os.readlink(item.path)
                return Entry(item.name, 0, fault="link-loop", detail=detail)
            place = os.path.join(folder.place, item.name)
            return Folder(item.name, place, (found.st_dev, found.st_ino), is_link)
        if not is_midi:
            return None
        if not stat.S_ISREG(found.st_mode):
            return Entry(item.name, 0, fault="not-a-file")
        return Entry(item.name, found.st_size)


class MemberTree:
    """The members of an archive, added in any order; kept on disk, so that a million of them take
    no more memory than a few. Of members with one path the last counts, as when unpacking.

    Args:
        file: for the index; see `close`.
        any_name: whether files without a MIDI suffix count.
    """

    def __init__(self, file: Path, any_name: bool = False):
        self._file, self._any_name = file, any_name
        file.unlink(missing_ok=True)
        self._db = sqlite3.connect(file, isolation_level=None)
        for statement in (
            # Nothing here has to outlive the process.
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            """CREATE TABLE members (folder BLOB, name BLOB, place BLOB, size INT, offset INT,
               method INT, packed INT, crc INT, fault TEXT, detail TEXT,
               PRIMARY KEY (folder, name)) WITHOUT ROWID""",
            "CREATE TABLE links (path BLOB PRIMARY KEY, target BLOB) WITHOUT ROWID",
            "BEGIN",
        ):
            self._db.execute(statement)
        self._known_folder = b""
        self._has_links = False

    def close(self) -> None:
        """Removes the index."""
        self._db.close()
        self._file.unlink(missing_ok=True)

    def add(self, entry: Entry) -> None:
        """Adds a file; one of offset -1 has no bytes that are kept."""
        path = _encoded(entry.path)
        if len(path) > _MAX_PATH:
            name = path.rpartition(b"/")[2][-200:].decode("utf-8", "replace")
            entry = Entry(name, entry.size, fault="path-too-long", detail=f"{len(path)} bytes")
            path = _encoded(name)
        if self._has_links:
            self._db.execute("DELETE FROM links WHERE path = ?", (path,))
        self._db.execute(
            "INSERT OR REPLACE INTO members VALUES (?, ?, NULL, ?, ?, ?, ?, ?, ?, ?)",
            (*self._split(path), *entry.row[1:]),
        )

    def add_folder(self, path: str) -> None:
        """Adds a folder that may be empty; those of files need no mention."""
        self._split(_encoded(path) + b"/")

    def add_link(self, path: str, target: str) -> None:
        """Adds a symbolic link; its target is relative to its folder."""
        if len(raw := _encoded(path)) > _MAX_PATH or len(target) > _MAX_PATH:
            self.add(Entry(path, 0, fault="broken-link", detail=target[:200]))
            return
        self._has_links = True
        self._db.execute("DELETE FROM members WHERE folder = ? AND name = ?", self._split(raw))
        self._db.execute("INSERT OR REPLACE INTO links VALUES (?, ?)", (raw, _encoded(target)))

    def add_hard_link(self, path: str, target: str) -> None:
        """Adds another name of a member that was added before."""
        raw = _encoded(target)
        link = self._db.execute("SELECT target FROM links WHERE path = ?", (raw,)).fetchone()
        if link is not None:
            self.add_link(path, _decoded(link[0]))
        elif self._is_there(raw) == "file":
            if self._has_links:
                self._db.execute("DELETE FROM links WHERE path = ?", (_encoded(path),))
            self._copy(raw, _encoded(path))
        elif _counts(path.rpartition("/")[2]):
            self.add(Entry(path, 0, fault="broken-link", detail=target))

    def has(self, path: str) -> bool:
        """Whether there is a file of this path."""
        return self._is_there(_encoded(path)) == "file"

    def resolve_links(self) -> None:
        """Puts files, folders and faults in the place of links; once, when all is added."""
        links = self._db.execute("SELECT path, target FROM links ORDER BY path")
        for path, target in links:
            folder, name = self._split(path)
            fault, real = self._followed(path)
            kind = "" if fault else self._is_there(real)
            if kind == "file":
                self._copy(real, path)
            elif kind == "folder":
                self._db.execute(
                    "INSERT OR REPLACE INTO members (folder, name, place) VALUES (?, ?, ?)",
                    (folder, name + b"/", real),
                )
            elif _counts(_decoded(name)):
                self._db.execute(
                    "INSERT OR REPLACE INTO members VALUES (?, ?, NULL, 0, -1, 0, -1, 0, ?, ?)",
                    (folder, name, fault or "broken-link", target.decode("utf-8", "replace")),
                )

    def root(self) -> Folder:
        """See `Tree`."""
        return Folder("", "", identity="")

    def children(self, folder: Folder) -> Iterator[Entry | Folder]:
        """See `Tree`."""
        own = _encoded(folder.place)
        rows = self._db.execute("SELECT * FROM members WHERE folder = ? ORDER BY name", (own,))
        for _, raw, place, size, offset, method, packed, crc, fault, detail in rows:
            name = _decoded(raw)
            if place is not None:
                linked = place != (own + b"/" + raw if own else raw)[:-1]
                yield Folder(name[:-1], _decoded(place), identity=_decoded(place), linked=linked)
            elif fault or self._any_name or is_midi_name(name):
                if offset < 0 and not fault:
                    fault = "not-kept"
                yield Entry(name, size, offset, method, packed, crc, fault, detail)

    def _split(self, path: bytes) -> tuple[bytes, bytes]:
        """Folder and name; makes the folder."""
        folder, _, name = path.rpartition(b"/")
        above = folder
        while above and above != self._known_folder:
            parent, _, own = above.rpartition(b"/")
            made = self._db.execute(
                "INSERT OR IGNORE INTO members (folder, name, place) VALUES (?, ?, ?)",
                (parent, own + b"/", above),
            )
            if not made.rowcount:
                break
            above = parent
        self._known_folder = folder
        return folder, name

    def _is_there(self, path: bytes) -> str:
        """ "file", "folder" or ""."""
        if not path:
            return "folder"
        folder, _, name = path.rpartition(b"/")
        found = self._db.execute(
            "SELECT max(place IS NULL) FROM members WHERE folder = ? AND name IN (?, ?)",
            (folder, name, name + b"/"),
        ).fetchone()[0]
        return "" if found is None else "file" if found else "folder"

    def _copy(self, path: bytes, to: bytes) -> None:
        """Adds another name of a file."""
        folder, _, name = path.rpartition(b"/")
        self._db.execute(
            "INSERT OR REPLACE INTO members SELECT ?, ?, NULL, size, offset, method, packed, crc, "
            "fault, detail FROM members WHERE folder = ? AND name = ?",
            (*self._split(to), folder, name),
        )

    def _followed(self, path: bytes) -> tuple[str, bytes]:
        """Fault, or "" and the path without links that a link leads to."""
        to_go, real, hops = path.split(b"/"), list[bytes](), 0
        while to_go:
            part = to_go.pop(0)
            if part in (b"", b"."):
                continue
            if part == b"..":
                if not real:
                    return "link-outside", b""
                real.pop()
                continue
            here = b"/".join([*real, part])
            link = self._db.execute("SELECT target FROM links WHERE path = ?", (here,)).fetchone()
            if link is None:
                real.append(part)
                continue
            hops += 1
            if hops > _MAX_HOPS:
                return "link-loop", b""
            if link[0].startswith(b"/"):
                return "link-outside", b""
            to_go = link[0].split(b"/") + to_go
        return "", b"/".join(real)


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _decoded(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
