"""The process that opens files nobody vouches for; started with a socket's number.

It may be killed at any file, by its own limits or by its parent; it writes nothing to the disk.
Both ends speak frames of bytes, and nothing that a file could have taken over is ever unpickled:

    to the worker     [settings, limits] once, then [root, [[file, labels], …]] for each unit
    from the worker   an empty frame when it has understood, then one [summary, ids] per file

So the parent has the results of all files before the one in hand: a death costs no finished work,
and one between two units is nobody's fault.
"""

import hashlib
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from data_pipeline import cleaning, dedup, filters
from data_pipeline.build.journal import rejection
from data_pipeline.build.sources import FILE_BYTES, Entry, read_entry
from data_pipeline.errors import InvalidMidi, printable
from data_pipeline.metadata import labels_from_texts
from data_pipeline.midi import compat_of
from data_pipeline.tokenizers import Tokenizer

# A MIDI file with a pedal press and enough notes for a fingerprint.
_TRACK = (
    b"\x00\xb0\x40\x7f" + b"\x10\x90\x3c\x40\x10\x3c\x00" * dedup.MIN_NOTES + b"\x00\xff\x2f\x00"
)
_WARM_UP = (
    b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0MTrk" + len(_TRACK).to_bytes(4, "big") + _TRACK
)
READY = b""
_HEADER_BYTES = 8
_RECEIVED_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    Attributes:
        cpu_s: processor seconds (not wall clock: a busy machine rejects no good file).
        wall_s: seconds, for a file that blocks without computing.
        memory_bytes: address space on top of the idle worker's.
        file_bytes: size of the file.
    """

    cpu_s: float = 20.0
    wall_s: float = 300.0
    memory_bytes: int = 2 << 30
    file_bytes: int = FILE_BYTES

    @property
    def result_bytes(self) -> int:
        """More than any file's result takes: three bytes of MIDI make at most one token of two."""
        return 4 * self.file_bytes + (1 << 20)


@dataclass(frozen=True)
class Job:
    """A work unit as a worker is given it.

    Attributes:
        number: of the unit.
        root: folder, archive or spool that the files are read from.
        entries: the files.
        labels: of each file, as far as they do not depend on its content.
    """

    number: int
    root: Path
    entries: list[Entry]
    labels: list[dict[str, str]]

    def packed(self, first: int) -> bytes:
        """The files from number `first` on, as the worker is sent them."""
        files = zip(self.entries[first:], self.labels[first:], strict=True)
        return pack([str(self.root), [[entry.row, labels] for entry, labels in files]])


# --- frames --------------------------------------------------------------------------------------


class GarbledError(Exception):
    """Bytes that no worker in its senses sends."""


class PieceMaker:
    """Parses, filters and tokenises; keeps what is slow to make between files.

    Args:
        settings: tokenizer_preset, filters (resolved thresholds), cleaning (fields of
            `cleaning.Cleaning`), fingerprints (whether near-duplicates will be looked for),
            reading (as `midi.reading_name` calls it), repair (whether truncated files are).
    """

    def __init__(self, settings: dict[str, Any]):
        self._tokenizer = Tokenizer.preset(settings["tokenizer_preset"])
        self._filters = settings["filters"]
        self._cleaning = cleaning.Cleaning(**settings["cleaning"])
        self._fingerprints = settings["fingerprints"]
        compat = compat_of(settings["reading"])
        self._read = partial(self._tokenizer.read, compat=compat, repair=settings["repair"])

    def warm_up(self) -> None:
        """Loads or compiles all that `process_midi` uses, so that no file has to pay for it."""
        if self._tokenizer.scheme == "events":  # for which nothing is compiled
            return
        performance = self._read(_WARM_UP)
        filters.check(self._cleaning.clean(performance), self._filters)
        self._tokenizer.encode(performance)
        dedup.content_hash(performance)
        if self._fingerprints:
            dedup.fingerprint(performance)

    def process_midi(
        self, path: str, data: bytes, labels: dict[str, str]
    ) -> tuple[dict[str, Any], bytes]:
        """Summary for the merge and ids as little-endian uint16 bytes (none for a rejected file).

        An error nobody foresaw costs its file only: it is rejected with the error as the reason.
        """
        stage = "parse"
        try:
            performance = self._read(data)
            stage = "filter"
            performance = self._cleaning.clean(performance)
            failures = filters.check(performance, self._filters)
            if failures:
                return rejection(path, stage, failures[0][0], dict(failures)), b""
            stage = "tokenize"
            # What the tables and the file's name say counts more than what its text says.
            labels = {**labels_from_texts(performance.texts), **labels}
            labels = {printable(name): printable(value) for name, value in labels.items()}
            ids = self._tokenizer.encode(performance, labels=labels)
            summary = {
                "path": printable(path),
                "sha256": hashlib.sha256(data).hexdigest(),
                "duration_ms": int(performance.duration_ms),
                "n_notes": int(self._tokenizer.n_notes(ids)),
                "n_tokens": len(ids),
                "labels": labels,
                "content": self._tokenizer.content_hash(performance),
            }
            if performance.repaired:
                summary["repaired"] = printable(performance.repaired)
            if self._fingerprints:
                summary["fingerprint"] = dedup.fingerprint(performance).astype("<u4").tobytes()
        except InvalidMidi as error:
            return rejection(path, stage, error.reason, str(error)), b""
        except MemoryError:
            return rejection(path, stage, "memory-limit"), b""
        except Exception as error:
            return rejection(path, stage, "error", f"{type(error).__name__}: {error}"), b""
        if summary["n_notes"] == 0:
            return rejection(path, stage, "no-notes"), b""
        return summary, ids.astype("<u2").tobytes()


def pack(message: Any) -> bytes:
    """For the worker; names that are not UTF-8 survive."""
    return msgpack.packb(message, unicode_errors="surrogatepass")


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Raises ConnectionError where nobody listens."""
    connection.sendall(len(data).to_bytes(_HEADER_BYTES, "big"))
    connection.sendall(data)


def receive_frame(
    connection: socket.socket, *, max_bytes: int | None = None, wall_s: float | None = None
) -> bytes:
    """The next frame.

    Args:
        max_bytes: of a frame; nothing is reserved for a longer one.
        wall_s: seconds until all of it must be here.

    Raises:
        EOFError: the other end hung up. TimeoutError. GarbledError: too long.
    """
    deadline = None if wall_s is None else time.monotonic() + wall_s

    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if deadline is not None:
                connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = connection.recv(min(size - len(data), _RECEIVED_BYTES))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    size = int.from_bytes(exactly(_HEADER_BYTES), "big")
    if max_bytes is not None and size > max_bytes:
        raise GarbledError(f"a frame of {size} bytes")
    return exactly(size)


# --- results -------------------------------------------------------------------------------------

_REJECTED = {"path": str, "stage": str, "reason": str}
_ACCEPTED = {
    "path": str,
    "sha256": str,
    "duration_ms": int,
    "n_notes": int,
    "n_tokens": int,
    "labels": dict,
    "content": str,
}


def pack_result(path: str, summary: dict[str, Any], ids: bytes) -> bytes:
    """A file's result for the parent, or the rejection of one that cannot be put into bytes."""
    try:
        return msgpack.packb([summary, ids])
    except MemoryError:
        return msgpack.packb([rejection(path, "worker", "memory-limit"), b""])
    except (ValueError, TypeError, OverflowError) as error:
        reason = printable(f"{type(error).__name__}: {error}")
        return msgpack.packb([rejection(path, "worker", "error", reason), b""])


def unpack_result(frame: bytes, path: str) -> tuple[dict[str, Any], bytes]:
    """Inverse of `pack_result`; checks all that the merge relies on.

    Raises:
        GarbledError: not the result of the file `path`.
    """
    try:
        summary, ids = msgpack.unpackb(frame)
        fields = _ACCEPTED if "n_tokens" in summary else _REJECTED
        whole = all(type(summary[name]) is kind for name, kind in fields.items())
        whole &= summary["path"] == printable(path) and len(ids) == 2 * summary.get("n_tokens", 0)
        if fields is _ACCEPTED:
            whole &= all(type(text) is str for pair in summary["labels"].items() for text in pair)
            whole &= len(bytes.fromhex(summary["content"])) > 0
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise GarbledError(f"{type(error).__name__}: {error}") from error
    if not whole:
        raise GarbledError("not the result of a file")
    return summary, ids


# --- the process ---------------------------------------------------------------------------------


def _process_file(
    root: Path, entry: Entry, labels: dict[str, str], maker: PieceMaker, limits: Limits
) -> tuple[dict[str, Any], bytes]:
    if entry.size > limits.file_bytes:
        return rejection(entry.path, "read", "too-large", entry.size), b""
    try:
        data = read_entry(root, entry, limits.file_bytes)
    except InvalidMidi as error:
        stage = "list" if entry.fault else "read"
        return rejection(entry.path, stage, error.reason, entry.detail or None), b""
    except OSError as error:
        return rejection(entry.path, "read", "unreadable", error.strerror), b""
    return maker.process_midi(entry.path, data, labels)


def _limit_memory(extra_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(argv: list[str]) -> None:
    """Serves the parent at the other end of the inherited socket until it hangs up."""
    connection = socket.socket(fileno=int(argv[1]))

    def receive() -> Any:
        return msgpack.unpackb(receive_frame(connection), unicode_errors="surrogatepass")

    settings, limit_values = receive()
    limits = Limits(*limit_values)
    maker = PieceMaker(settings)
    maker.warm_up()  # before the limits: compiling takes longer and more than a file may
    if sys.platform == "linux":
        _limit_memory(limits.memory_bytes)
    send_frame(connection, READY)
    while True:
        try:
            root, files = receive()
        except EOFError:
            return
        send_frame(connection, READY)
        for entry_values, labels in files:
            # SIGPROF's default action ends the process, even inside compiled code.
            signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
            entry = Entry(*entry_values)
            result = _process_file(Path(root), entry, labels, maker, limits)
            send_frame(connection, pack_result(entry.path, *result))
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(sys.argv)
