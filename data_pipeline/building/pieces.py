"""One MIDI file's bytes to one piece of the corpus, or to the reason why not."""

import hashlib
from functools import partial
from typing import Any

from data_pipeline import cleaning, dedup, filters
from data_pipeline.building.journal import rejection
from data_pipeline.errors import InvalidMidi, printable
from data_pipeline.metadata import labels_from_texts
from data_pipeline.midi import compat_of, read_midi
from data_pipeline.tokenizer import Tokenizer

# A MIDI file with a pedal press and enough notes for a fingerprint.
_TRACK = (
    b"\x00\xb0\x40\x7f" + b"\x10\x90\x3c\x40\x10\x3c\x00" * dedup.MIN_NOTES + b"\x00\xff\x2f\x00"
)
_WARM_UP = (
    b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0MTrk" + len(_TRACK).to_bytes(4, "big") + _TRACK
)


class PieceMaker:
    """Parses, filters and tokenises; keeps what is slow to make between files.

    Args:
        settings: tokenizer_preset, filters (resolved thresholds), cleaning (fields of
            `cleaning.Cleaning`), fingerprints (whether near-duplicates will be looked for),
            reading (as `midi.reading_name` calls it), repair (whether cut files are).
    """

    def __init__(self, settings: dict[str, Any]):
        self._tokenizer = Tokenizer.preset(settings["tokenizer_preset"])
        self._filters = settings["filters"]
        self._cleaning = cleaning.Cleaning(**settings["cleaning"])
        self._fingerprints = settings["fingerprints"]
        compat = compat_of(settings["reading"])
        self._read = partial(read_midi, compat=compat, repair=settings["repair"])

    def warm_up(self) -> None:
        """Loads or compiles all that `process_midi` uses, so that no file has to pay for it."""
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
                "content": dedup.content_hash(performance),
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
