"""The errors a user can cause, told in a way that says what to do, and names fit to print."""

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind")


SHOWN_AS: dict[str, str] = {}
"""Folders of this disk that stand for something else, and what a user calls it; see `storage`."""


def printable(text: str) -> str:
    """The text as a user knows it and any format can hold it: lone surrogates become U+FFFD.

    They stand for the bytes of a file name that is not UTF-8, or come from JSON truncated in
    the middle of a character.
    """
    for folder, name in SHOWN_AS.items():
        text = text.replace(folder, name)
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'train'?" where a known word is near, else nothing.

    Letters decide, not the dashes that all options share, nor capitals.
    """
    plain = {name.lstrip("-").lower(): name for name in known}
    near = difflib.get_close_matches(word.lstrip("-").lower(), plain, n=1)
    return f", did you mean {plain[near[0]]!r}?" if near else ""


class UserError(Exception):
    """A mistake the user can mend: the message says what, where, and what to do.

    The command line prints the message on one line and exits with status 2; libraries never
    catch it silently.
    """


@contextmanager
def about(path: object) -> Iterator[None]:
    """Puts a path, or what else was given, before the message of an error that does not name it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


class InvalidMidi(UserError):
    """Bytes that are not a usable MIDI file.

    Attributes:
        reason: short machine-readable word for `rejected.jsonl`, e.g. "not-midi", "truncated".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


_DISK = {
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "a folder is there, a file is needed",
    errno.ENOTDIR: "a file is there, a folder is needed",
    errno.EEXIST: "a file is there, a folder is needed",
    errno.EACCES: "no permission; change it with chmod, or name another place",
    errno.EPERM: "no permission; change it with chmod, or name another place",
    errno.EROFS: "this disk is read-only; name another place",
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "your share of the disk is full; free some space and run the same command again",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "links here lead in a circle",
}


def disk_error(error: OSError) -> str | None:
    """What a user can do about an error of the disk, with its file; None where that is unknown."""
    said = _DISK.get(error.errno or 0, error.strerror if error.filename is not None else None)
    if said is None:
        return None
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"


def check_readable(path: str | Path) -> None:
    """Raises `UserError` for a file that is there and that this user may not read."""
    if os.path.isfile(path) and not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; give yourself permission with chmod u+r {path}")


def check_file(path: str | Path, wanted: str) -> Path:
    """The path of a file that a user names.

    Args:
        wanted: what it should be, e.g. "one MIDI file".

    Raises:
        UserError: no such file, one that may not be read, a folder, or no path at all.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"expected the path of {wanted}, not {kind_of(path)}")
    from data_pipeline import storage  # which raises these errors

    path = storage.local(path)
    if path.is_dir():
        shards = (path / "manifest.json").is_file()
        found = "token shards are here" if shards else "a folder is here"
        raise UserError(f"{path}: {found}, {wanted} is wanted")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    check_readable(path)
    return path


def kind_of(value: object) -> str:
    """The type of a value in a sentence, e.g. "a list", "an int"."""
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def expect(value: Any, kind: type[Kind], wanted: str) -> Kind:
    """`value`, if it is of that kind; else a `UserError` that says what was expected."""
    if isinstance(value, kind):
        return value
    hint = "; `read_midi` reads a file" if isinstance(value, str | Path) else ""
    raise UserError(f"{wanted} is expected, not {kind_of(value)}{hint}")


def expect_array(value: Any, wanted: str, *sizes: str) -> tuple[int, ...]:
    """The shape of an array, traced or not, with so many axes; else a `UserError`."""
    shape = f"[{', '.join(sizes)}]"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise UserError(
            f"{wanted} is expected as an array {shape} (`jnp.asarray`), not {kind_of(value)}"
        )
    if len(value.shape) != len(sizes):
        raise UserError(f"{wanted} is expected as an array {shape}, not {list(value.shape)}")
    return value.shape
