"""The errors a user can cause, told in a way that says what to do, and names fit to print."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def printable(text: str) -> str:
    """The text as any format can hold it: lone surrogates become U+FFFD.

    They stand for the bytes of a file name that is not UTF-8, or come from JSON truncated in
    the middle of a character.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'train'?" where a known word is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


class UserError(Exception):
    """A mistake the user can mend: the message says what, where, and what to do.

    The command line prints the message on one line and exits with status 2; libraries never
    catch it silently.
    """


class InvalidMidi(UserError):
    """Bytes that are not a usable MIDI file.

    Attributes:
        reason: short machine-readable word for `rejected.jsonl`, e.g. "not-midi", "truncated".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def check_file(path: str | Path, wanted: str) -> Path:
    """The path of a file that a user names.

    Args:
        wanted: what it should be, e.g. "one MIDI file".

    Raises:
        UserError: no such file, a folder, or no path at all.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"expected the path of {wanted}, not {kind_of(path)}")
    path = Path(path)
    if path.is_dir():
        shards = (path / "manifest.json").is_file()
        found = "token shards are here" if shards else "a folder is here"
        raise UserError(f"{path}: {found}, {wanted} is wanted")
    if not path.exists():
        raise UserError(f"{path}: no such file")
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
