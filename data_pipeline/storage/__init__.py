"""Paths of every room: on this disk, or in a bucket (gs://, s3://).

What lies in a bucket has its place in a folder of this disk, the mirror: gs://b/a/x is the file
MIRROR/gs/b/a/x. All rooms read and write files there, as anywhere else. `local` brings objects
there before they are read; `upload` sends files that were made. So a path on the disk costs
nothing more than it did, and what is computed from a bucket has the same bytes.

    MIRROR/gs/b/a/x           the object gs://b/a/x, whole
    MIRROR/.known/gs/b/a/x    which version of the object that is; its time: when it was last used

The bucket is the truth: an object that has changed replaces the file, and one that is gone takes
the file with it. What was made here and not yet sent stays until it is. The mirror is
$ARIA_JAX_CACHE, by default ~/.cache/aria_jax; beyond $ARIA_JAX_CACHE_GB, by default nine tenths of
the disk, files go that were not used for longest.

Objects that are large and not all wanted at once, shards and the arrays of checkpoints, are left
in the bucket by `local`, for whoever reads them to `fetch`.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline import errors
from data_pipeline.errors import UserError, did_you_mean
from data_pipeline.storage import buckets
from data_pipeline.storage.buckets import Object

SCHEMES = ("gs", "s3")
"""Of the buckets that are known; the extra for gs is called gcs."""
TRANSFERS = 16
"""Objects under way at once."""
COMMITTED = "commit_success.txt"
"""Object that Orbax writes last into a checkpoint in a bucket, where nothing can be renamed."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?!/)(.*)", re.DOTALL)
_LAZY = re.compile(
    rf"\.arrayrecord$|/checkpoints/[0-9][^/]*/(?!record/metadata$|{re.escape(COMMITTED)}$)"
)
_KNOWN = ".known"


# --- places --------------------------------------------------------------------------------------


def mirror() -> Path:
    """The folder of this disk that stands for all buckets."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _mirror(os.environ.get("ARIA_JAX_CACHE") or f"{home}/aria_jax")


@cache
def _mirror(folder: str) -> Path:
    found = Path(os.path.abspath(folder))
    errors.SHOWN_AS.update({f"{found}/{scheme}/": f"{scheme}://" for scheme in SCHEMES})
    return found


def is_url(path: object) -> bool:
    """Whether a path begins with a scheme."""
    return isinstance(path, str | Path) and _URL.fullmatch(str(path)) is not None


def place(path: str | Path) -> Path:
    """Where a path lies on this disk: in the mirror if it has a scheme; asks no bucket.

    Raises:
        UserError: another scheme than the known ones, no bucket, or a name that no file can have.
    """
    found = _URL.fullmatch(str(path))  # `Path` makes one slash of two
    if found is None:
        return Path(path)
    scheme, name = found[1].lower(), found[2].rstrip("/")
    if scheme not in SCHEMES:
        known = " or ".join(f"{each}://" for each in SCHEMES)
        raise UserError(
            f"{path}: {scheme}:// is no storage that is known{did_you_mean(scheme, SCHEMES)}; a "
            f"path begins with {known}, or is one of the disk"
        )
    if not name:
        raise UserError(f"{path}: names no bucket; expected {scheme}://BUCKET/PATH")
    if {"", ".", ".."} & set(name.split("/")):
        raise UserError(f"{path}: a part of this name is empty, . or ..; name it without")
    return mirror() / scheme / name


def is_remote(path: str | Path) -> bool:
    """Whether a place lies in the mirror."""
    parts, root = Path(path).parts, mirror().parts
    return len(parts) > len(root) and parts[: len(root)] == root and parts[len(root)] in SCHEMES


def url(path: str | Path) -> str:
    """What a place is called: gs://… of what lies in the mirror, any other path as it is."""
    if not is_remote(path):
        return str(path)
    scheme, *name = Path(path).relative_to(mirror()).parts
    return f"{scheme}://{'/'.join(name)}"


def local(path: str | Path) -> Path:
    """Where a path lies on this disk, brought there if it has a scheme, but for large objects.

    Raises:
        UserError: as `place` and `fetch`.
    """
    found = place(path)
    if is_url(path):
        fetch(found)
    return found


# --- bringing ------------------------------------------------------------------------------------


def listing(path: Path) -> dict[str, Object]:
    """The objects at or below a place, by their names relative to it; "" for the object itself.

    Raises:
        UserError: there is no such bucket, no right to look, or no answer.
    """
    return buckets.listing(url(path))


def fetch(
    path: Path, objects: Mapping[str, Object] | None = None, *, lazily: bool = True
) -> dict[str, Object]:
    """Makes what lies at a place of the mirror what lies in its bucket; nothing for other places.

    Args:
        objects: from `listing`, to save asking.
        lazily: leave what is large and read in parts, see the module.

    Returns:
        What lies in the bucket.

    Raises:
        UserError: no such bucket, no right, no answer, or more than the mirror may hold.
    """
    if not is_remote(path):
        return {}
    objects = listing(path) if objects is None else dict(objects)
    _forget_missing(path, objects)
    wanted = {n: o for n, o in objects.items() if not (lazily and _LAZY.search(f"{path}/{n}"))}
    _bring_all(path, wanted)
    return objects


def read_ahead(path: Path, objects: Mapping[str, Object]) -> None:
    """Begins to bring objects below a place, without waiting; whoever wants one sooner fetches it.

    Raises:
        UserError: they are more than the mirror may hold.
    """
    missing = {name: one for name, one in objects.items() if not _is_here(path / name, one)}
    _make_room(path, sum(one.size for one in missing.values()))

    def bring() -> None:
        with suppress(UserError):  # whoever reads the object is told
            _bring_all(path, missing)

    if missing:
        threading.Thread(target=bring, name="read-ahead", daemon=True).start()


def _bring_all(path: Path, objects: Mapping[str, Object]) -> None:
    missing = {name: one for name, one in objects.items() if not _is_here(path / name, one)}
    _make_room(path, sum(one.size for one in missing.values()))
    _at_once(lambda item: _bring(path / item[0], item[1]), missing.items())


def _at_once(do: Callable[[Any], object], items: Iterable[Any]) -> None:
    items = list(items)
    if len(items) < 2:
        for item in items:
            do(item)
        return
    with ThreadPoolExecutor(min(TRANSFERS, len(items))) as pool:
        list(pool.map(do, items))


def _known(path: Path) -> Path:
    """What is known of the file at a place."""
    return mirror() / _KNOWN / path.relative_to(mirror())


def _stamp(path: Path, tag: str) -> list[Any]:
    found = path.stat()
    return [tag, found.st_size, found.st_mtime_ns]


def _noted(path: Path) -> list[Any] | None:
    """Version, size and time of the file when it was as in the bucket; None if it never was."""
    with suppress(OSError, ValueError):
        return json.loads(_known(path).read_text())
    return None


def is_changed(path: Path) -> bool:
    """Whether a file of the mirror is not what was brought or sent, or not there at all."""
    if not path.is_file():
        return True
    noted = _noted(path)
    return noted is None or noted != _stamp(path, noted[0])


def _is_here(path: Path, of: Object) -> bool:
    """Whether the file is that version of its object, or what became of it here; it is used now."""
    noted = _noted(path)
    if noted is None or noted[0] != of.tag or not path.is_file() or _size(path) < noted[1]:
        return False
    with suppress(OSError):
        os.utime(_known(path))
    return True


def _bring(path: Path, of: Object) -> None:
    """Downloads one object whole or not at all, one process at a time."""
    known = _known(path)
    known.parent.mkdir(parents=True, exist_ok=True)
    with known.open("a+") as note:
        flock(note, LOCK_EX)
        if _is_here(path, of):
            return
        unfinished = known.with_name(
            f"{known.name[:100]}.{os.getpid()}-{threading.get_ident()}.part"
        )
        try:
            buckets.get(url(path), unfinished, of)
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(path)  # not flushed: it can be brought again
        finally:
            unfinished.unlink(missing_ok=True)
        note.truncate(0)
        note.write(json.dumps(_stamp(path, of.tag)))


def _forget_missing(path: Path, objects: Mapping[str, Object]) -> None:
    """Removes files that were brought or sent and whose objects are gone; and a file in the way."""
    known = _known(path)
    for one in [known] if known.is_file() else list(_files_below(known)):
        name = "" if one == known else one.relative_to(known).as_posix()
        if name not in objects and not name.endswith(".part"):
            if one.stat().st_size:
                (path / name).unlink(missing_ok=True)
            one.unlink(missing_ok=True)
            _remove_empty((path / name).parent)
            _remove_empty(one.parent)
    if objects.keys() - {""} and path.is_file():
        path.unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        while folder.is_relative_to(mirror()):
            folder.rmdir()
            folder = folder.parent


def _make_room(path: Path, n_bytes: int) -> None:
    """Lets files go that were not used for longest, so that so many bytes fit."""
    root = mirror()
    if not n_bytes:
        return
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    asked = float(os.environ.get("ARIA_JAX_CACHE_GB") or 0) * 1e9
    if not asked and n_bytes < 0.9 * free:
        return
    notes = sorted(_files_below(root / _KNOWN), key=_used_at)
    files = {root / note.relative_to(root / _KNOWN): note for note in notes}
    sizes = {file: _size(file) for file in files}
    used = sum(sizes.values())
    limit = asked or 0.9 * (used + free)
    wanted = n_bytes + sum(size for file, size in sizes.items() if file.is_relative_to(path))
    if wanted > limit:
        raise UserError(
            f"{url(path)}: {wanted / 1e9:,.1f} GB are wanted in {root}, which may hold "
            f"{limit / 1e9:,.1f}; raise ARIA_JAX_CACHE_GB, or set ARIA_JAX_CACHE to a folder of a "
            "larger disk"
        )
    for file, size in sizes.items():
        if used + n_bytes <= limit:
            return
        if size and not file.is_relative_to(path):
            file.unlink(missing_ok=True)
            files[file].unlink(missing_ok=True)
            used -= size


def _files_below(folder: Path) -> Iterator[Path]:
    """But for what is removed meanwhile: a checkpoint goes in one thread, what lies beside it is
    sent in another. (`Path.rglob` fails then.)
    """
    for where, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(where, name)).is_file())


def _used_at(note: Path) -> int:
    with suppress(OSError):
        return note.stat().st_mtime_ns
    return 0


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


# --- sending -------------------------------------------------------------------------------------


def upload(path: Path, *, last: str = "", only: Callable[[str], bool] | None = None) -> int:
    """Sends the file at a place of the mirror, or all below it, but for what the bucket has.

    Names with a part that begins with a dot stay on this disk. Each object appears whole or not.

    Args:
        last: name that is sent when all others are there.
        only: of which names; None for all.

    Returns:
        How many files were sent.

    Raises:
        UserError: no such bucket, no right, no answer.
    """
    if not is_remote(path) or not path.exists():
        return 0
    names = [""]
    if path.is_dir():
        below = (p.relative_to(path).as_posix() for p in sorted(_files_below(path)))
        names = [name for name in below if not any(part[0] == "." for part in name.split("/"))]
    there = listing(path)
    todo = [
        name
        for name in names
        if (only is None or only(name)) and (name not in there or is_changed(path / name))
    ]
    _at_once(lambda name: _send(path / name), [name for name in todo if not last or name != last])
    if last and last in todo:
        _send(path / last)
    return len(todo)


def _send(path: Path) -> None:
    known = _known(path)
    known.parent.mkdir(parents=True, exist_ok=True)
    with known.open("a+") as note:
        flock(note, LOCK_EX)
        before = _stamp(path, "")  # the file may grow meanwhile
        before[0] = buckets.put(path, url(path)).tag
        note.truncate(0)
        note.write(json.dumps(before))


def remove(path: Path) -> None:
    """Removes what lies at or below a place, in the bucket and on this disk."""
    if is_remote(path):
        _at_once(buckets.delete, [url(path / name) for name in listing(path)])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: Path, to: Path) -> None:
    """Gives what lies at or below a place another name, in its bucket and on this disk."""
    names = list(listing(path)) if is_remote(path) else []
    _at_once(lambda name: buckets.copy(url(path / name), url(to / name)), names)
    _at_once(lambda name: buckets.delete(url(path / name)), names)
    if path.exists():
        path.rename(to)
