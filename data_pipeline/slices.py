"""Slices of a piece by notes: the one way that loaders, embed, classify and search take them.

A slice is notes start:stop as a piece of its own: instruments, `<S>`, notes from onset 0, `<E>`.
Only notes that have tokens are counted, so that a MIDI file and its record in token shards have the
same notes, slices and instruments. Onsets can differ by one step of 10 ms: the reference tokenises
slices of the file, whose onsets are rounded from the slice's beginning (aria/embedding.py), while
those in shards are rounded from the piece's.
"""

from dataclasses import replace

import numpy as np

from data_pipeline.cleaning import remove_instruments
from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import DRUM_CHANNEL, Performance
from data_pipeline.tokenizer import Kind, Tokenizer
from data_pipeline.vocabulary import HIGHEST_DRUM, INSTRUMENTS, LOWEST_DRUM


def note_positions(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Where each note and drum hit of a piece begins, int32 [N]."""
    kind = tokenizer.kind[ids]
    return np.flatnonzero((kind == Kind.NOTE) | (kind == Kind.DRUM)).astype(np.int32)


def slice_ids(
    ids: np.ndarray, note_at: np.ndarray, start: int, stop: int, tokenizer: Tokenizer
) -> np.ndarray:
    """Notes `start:stop` of a tokenised piece, uint16.

    Composer, form and genre are left out: they would give away what is to be learned (reference:
    ContrastiveDataset.get_slice empties the metadata).

    Args:
        ids: uint16 [L]; note_at: its `note_positions`.
    """
    start, stop = (int(note_at[i]) if i < len(note_at) else len(ids) for i in (start, stop))
    body = ids[start:stop]
    prefix = ids[: int(np.argmax(ids == tokenizer.bos_id))]
    instrument = tokenizer.instrument[prefix]
    drums = len(INSTRUMENTS)  # announced where they are heard, as in a slice of the file
    heard = (instrument != drums) | (tokenizer.kind[body] == Kind.DRUM).any()
    prefix = prefix[(instrument >= 0) & heard]
    piece = np.concatenate([prefix, [tokenizer.bos_id], body])
    return tokenizer.slice_notes(piece, 0, len(piece))


def with_tokens(performance: Performance) -> Performance:
    """Only the notes that have tokens: what is counted and sliced.

    Raises:
        InvalidMidi: there are none.
    """
    performance = remove_instruments(performance)
    notes = performance.notes
    pitch_known = (notes["pitch"] >= LOWEST_DRUM) & (notes["pitch"] <= HIGHEST_DRUM)
    known = (notes["channel"] != DRUM_CHANNEL) | pitch_known
    if not known.any():
        raise InvalidMidi("no-notes", "no notes of a supported instrument")
    return performance if known.all() else replace(performance, notes=notes[known])


def encode_slices(
    performance: Performance, tokenizer: Tokenizer, slice_notes: int
) -> list[np.ndarray]:
    """Consecutive slices of `slice_notes` notes, the last as long as it comes; uint16 each.

    Args:
        performance: `with_tokens`.
    """
    starts = range(0, len(performance.notes), slice_notes)
    if tokenizer.has_pedal:  # pedal events belong to the notes around them, not to every slice
        ids = tokenizer.encode(performance)
        at = note_positions(ids, tokenizer)
        return [slice_ids(ids, at, start, start + slice_notes, tokenizer) for start in starts]
    parts = (performance.slice_notes(start, start + slice_notes) for start in starts)
    return [tokenizer.encode(part) for part in parts]


def truncated(ids: np.ndarray, max_tokens: int, eos_id: int) -> np.ndarray:
    """At most `max_tokens` of a slice, `<E>` in the place of the last one."""
    ids = ids[:max_tokens].copy()
    ids[-1] = eos_id
    return ids
