"""What is embedded: files as lists of token slices, from a folder of MIDI or from token shards."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_pipeline.building.sources import list_source, read_entry, readable_root
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.metadata import load_labels
from data_pipeline.midi import Performance, read_midi
from data_pipeline.shards import MANIFEST, TokenShards, load_manifest
from data_pipeline.tokenizer import Kind, Tokenizer

Reject = Callable[[str, str, str], None]
"""Told (path, reason, message) of each file that cannot be embedded."""


@dataclass(frozen=True)
class Piece:
    """One file.

    Attributes:
        slices: token ids of consecutive slices, each uint16, ending with `<E>`.
        labels: those of the metadata; from shards also "split".
    """

    path: str
    sha256: str
    slices: list[np.ndarray]
    n_notes: int
    duration_ms: int
    labels: dict[str, str]


def read_pieces(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    slice_notes: int,
    max_tokens: int,
    reject: Reject,
    metadata: str | Path | None = None,
) -> tuple[int, Iterator[Piece]]:
    """How many files `source` has, and those that can be embedded, in a fixed order.

    Raises:
        UserError: no MIDI files or shards there, or shards of another tokenizer.
    """
    source = Path(source)
    if (source / MANIFEST).is_file():
        splits = [
            TokenShards(source, split, tokenizer) for split in load_manifest(source)["splits"]
        ]
        cut = _from_shards(splits, tokenizer, slice_notes, max_tokens)
        return sum(map(len, splits)), cut
    with TemporaryDirectory() as folder:
        spool = Path(folder) / "spool"
        entries = list(list_source(source, spool))
        if readable_root(source, spool) == spool:
            raise UserError(f"{source}: unpack this archive first, or give a plain .tar")
    if not entries:
        raise UserError(f"{source}: no MIDI files (.mid, .midi, .kar) here")
    table = load_labels(source, metadata)

    def pieces() -> Iterator[Piece]:
        for entry in entries:
            data = read_entry(source, entry)
            try:
                performance = read_midi(data)
                slices = midi_slices(performance, tokenizer, slice_notes, max_tokens)
            except InvalidMidi as error:
                reject(entry.path, error.reason, str(error))
                continue
            yield Piece(
                path=entry.path,
                sha256=hashlib.sha256(data).hexdigest(),
                slices=slices,
                n_notes=len(performance.notes),
                duration_ms=performance.duration_ms,
                labels=table.labels_for(entry.path),
            )

    return len(entries), pieces()


def midi_slices(
    performance: Performance, tokenizer: Tokenizer, slice_notes: int, max_tokens: int
) -> list[np.ndarray]:
    """Consecutive slices of `slice_notes` notes, each tokenised on its own and cut at
    `max_tokens` with `<E>` last (reference: aria/embedding.py get_global_embedding_from_midi).
    """
    if not len(performance.notes):
        raise InvalidMidi("no-notes", "no notes")
    slices = []
    for start in range(0, len(performance.notes), slice_notes):
        ids = tokenizer.encode(performance.slice_notes(start, start + slice_notes))
        slices.append(_cut(ids, tokenizer, max_tokens))
    return slices


def _cut(ids: np.ndarray, tokenizer: Tokenizer, max_tokens: int) -> np.ndarray:
    ids = ids[:max_tokens].copy()
    ids[-1] = tokenizer.eos_id
    return ids


def _from_shards(
    splits: list[TokenShards], tokenizer: Tokenizer, slice_notes: int, max_tokens: int
) -> Iterator[Piece]:
    """Slices of shard records start at a token boundary: their onsets are already quantised, so
    they can differ by one 10 ms step from slices of the MIDI file.
    """
    for shards in splits:
        for i in range(len(shards)):
            record = shards[i]
            ids = _without_labels(record.ids, tokenizer)
            starts = range(0, tokenizer.n_notes(ids), slice_notes)
            slices = [tokenizer.slice_notes(ids, s, s + slice_notes) for s in starts]
            yield Piece(
                path=record.meta["path"],
                sha256=record.meta["sha256"],
                slices=[_cut(ids, tokenizer, max_tokens) for ids in slices],
                n_notes=record.meta["n_notes"],
                duration_ms=record.meta["duration_ms"],
                labels={**record.meta["labels"], "split": shards.split},
            )


def _without_labels(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Only instruments stay in the prefix: a composer there would give a probe its answer."""
    label = (tokenizer.kind[ids] == Kind.PREFIX) & (tokenizer.instrument[ids] < 0)
    return ids[~label]
