"""The errors a user can cause, told in a way that says what to do, and names fit to print."""

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """The text as any format can hold it: lone surrogates become U+FFFD.

    They stand for the bytes of a file name that is not UTF-8, or come from JSON that was cut in
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
