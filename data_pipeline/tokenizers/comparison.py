"""What each scheme makes of the same files: tokens, speed, and what a round trip loses."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import DRUM_CHANNEL, Performance, note_programs, resolve_pedal
from data_pipeline.tokenizers.base import Tokenizer

CONTEXT_TOKENS = 8192
DRUMS = 16
"""Number of the drums, after the 16 General MIDI families."""
_HEARD = np.dtype(
    [("family", "i8"), ("pitch", "i8"), ("velocity", "i8"), ("start", "i8"), ("end", "i8")]
)


@dataclass
class Tally:
    """What is counted over the files of one scheme; times in ms.

    Attributes:
        n_files, n_rejected: files that were encoded, and that the scheme has no notes for.
        n_notes: of the files as they are read, and tokens, seconds of music and of encoding.
        n_missing, n_added: notes that come back not, and that were not there.
        onset_ms, duration_ms, velocity: absolute error of each matched note; durations without
            drum hits, which have none. The pedal is in the durations on both sides.
        n_instruments, n_instruments_kept: families of instruments, summed over the files.
        n_pedals, n_pedals_kept: pedal events.
    """

    n_files: int = 0
    n_rejected: int = 0
    n_notes: int = 0
    n_tokens: int = 0
    music_s: float = 0.0
    encode_s: float = 0.0
    n_missing: int = 0
    n_added: int = 0
    onset_ms: list[np.ndarray] = field(default_factory=list)
    duration_ms: list[np.ndarray] = field(default_factory=list)
    velocity: list[np.ndarray] = field(default_factory=list)
    n_instruments: int = 0
    n_instruments_kept: int = 0
    n_pedals: int = 0
    n_pedals_kept: int = 0


@dataclass(frozen=True)
class SchemeReport:
    """One row of the comparison; see `Tally`. Errors are means, and the 95 % quantile of onsets;
    None where nothing was encoded. `context_s` is the music that 8,192 tokens hold.
    """

    name: str
    vocab_size: int
    n_files: int
    n_rejected: int
    n_notes: int
    tokens_per_note: float | None
    tokens_per_s: float | None
    context_s: float | None
    encode_notes_per_s: float | None
    missing_percent: float | None
    added_percent: float | None
    onset_error_ms: float | None
    onset_error_p95_ms: float | None
    duration_error_ms: float | None
    velocity_error: float | None
    instruments_kept_percent: float | None
    pedals: str

    def as_json(self) -> dict[str, Any]:
        """The row as JSON has it, to four significant digits."""
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


def heard(performance: Performance) -> np.ndarray:
    """What sounds: family, pitch, velocity, and times in ms from the first onset; by onset.

    The pedal is in the ends, and a key that is struck again ends its note before.
    """
    performance = resolve_pedal(performance)
    notes = performance.notes
    out = np.zeros(len(notes), _HEARD)
    if not len(notes):
        return out
    drum = notes["channel"] == DRUM_CHANNEL
    out["family"] = np.where(drum, DRUMS, note_programs(performance) // 8)
    out["pitch"], out["velocity"] = notes["pitch"], notes["velocity"]
    out["start"] = performance.between_ms(int(notes["start"][0]), notes["start"])
    lengths = performance.between_ms(notes["start"], notes["end"])
    out["end"] = out["start"] + np.maximum(lengths, 0)
    return out


def in_order(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of two ascending lists, in order, all of the shorter one's, with the least sum of
    differences; positions in each.
    """
    if len(a) > len(b):
        second, first = in_order(b, a)
        return first, second
    n_skipped = len(b) - len(a)
    best = np.zeros(n_skipped + 1)
    chosen = np.zeros((len(a), n_skipped + 1), np.int64)
    skips = np.arange(n_skipped + 1)
    for i, value in enumerate(a.tolist()):
        least = np.minimum.accumulate(best)
        chosen[i] = np.maximum.accumulate(np.where(best == least, skips, 0))
        best = least + np.abs(value - b[i : i + n_skipped + 1])
    pairs, k = np.zeros(len(a), np.int64), int(np.argmin(best))
    for i in range(len(a) - 1, -1, -1):
        pairs[i] = i + k
        k = int(chosen[i, k])
    return np.arange(len(a)), pairs


def matched(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two `heard` performances that are the same note, by family, pitch and order.

    The second may begin later as a whole: by the median of what the notes of equal number say.
    """
    keys = [rows["family"] * 128 + rows["pitch"] for rows in (before, after)]
    orders = [np.lexsort((r["start"], key)) for r, key in zip((before, after), keys, strict=True)]
    groups = [
        {int(key[part[0]]): part for part in np.split(order, _changes(key[order])) if len(part)}
        for key, order in zip(keys, orders, strict=True)
    ]
    both = sorted(groups[0].keys() & groups[1].keys())
    pairs = [(groups[0][key], groups[1][key]) for key in both]
    late = [after["start"][b] - before["start"][a] for a, b in pairs if len(a) == len(b)]
    shift = int(np.median(np.concatenate(late))) if late else 0
    found = [np.zeros((2, 0), np.int64)]
    for a, b in pairs:
        first, second = in_order(before["start"][a], after["start"][b] - shift)
        found.append(np.stack([a[first], b[second]]))
    left, right = np.concatenate(found, axis=1)
    after["start"] -= shift
    after["end"] -= shift
    return left, right


def _changes(ordered: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(ordered)) + 1


def add_file(tally: Tally, tokenizer: Tokenizer, performance: Performance) -> None:
    """Encodes and decodes one performance and adds what that makes to the tally."""
    began = time.perf_counter()
    try:
        ids = tokenizer.encode(performance)
    except InvalidMidi:
        tally.n_rejected += 1
        return
    tally.encode_s += time.perf_counter() - began
    before, decoded = heard(performance), tokenizer.decode(ids)
    after = heard(decoded)
    left, right = matched(before, after)
    tally.n_files += 1
    tally.n_notes += len(before)
    tally.n_tokens += len(ids)
    tally.music_s += int(before["end"].max()) / 1000
    tally.n_missing += len(before) - len(left)
    tally.n_added += len(after) - len(right)
    one, other = before[left], after[right]
    pitched = one["family"] != DRUMS
    lengths = [rows["end"] - rows["start"] for rows in (one, other)]
    tally.onset_ms.append(np.abs(one["start"] - other["start"]))
    tally.duration_ms.append(np.abs(lengths[0] - lengths[1])[pitched])
    tally.velocity.append(np.abs(one["velocity"] - other["velocity"]))
    families = set(before["family"].tolist())
    tally.n_instruments += len(families)
    tally.n_instruments_kept += len(families & set(after["family"].tolist()))
    tally.n_pedals += len(performance.pedals)
    tally.n_pedals_kept += len(decoded.pedals)


def report_of(tokenizer: Tokenizer, tally: Tally) -> SchemeReport:
    """The row of a scheme."""

    def mean(parts: list[np.ndarray]) -> float | None:
        values = np.concatenate([np.zeros(0), *parts])
        return float(values.mean()) if len(values) else None

    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    onsets = np.concatenate([np.zeros(0), *tally.onset_ms])
    per_s = ratio(tally.n_tokens, tally.music_s)
    kept = f"{tally.n_pedals_kept} of {tally.n_pedals} events"
    return SchemeReport(
        name=tokenizer.preset_name,
        vocab_size=tokenizer.vocab_size,
        n_files=tally.n_files,
        n_rejected=tally.n_rejected,
        n_notes=tally.n_notes,
        tokens_per_note=ratio(tally.n_tokens, tally.n_notes),
        tokens_per_s=per_s,
        context_s=CONTEXT_TOKENS / per_s if per_s else None,
        encode_notes_per_s=ratio(tally.n_notes, tally.encode_s),
        missing_percent=ratio(100 * tally.n_missing, tally.n_notes),
        added_percent=ratio(100 * tally.n_added, tally.n_notes),
        onset_error_ms=mean(tally.onset_ms),
        onset_error_p95_ms=float(np.quantile(onsets, 0.95)) if len(onsets) else None,
        duration_error_ms=mean(tally.duration_ms),
        velocity_error=mean(tally.velocity),
        instruments_kept_percent=ratio(100 * tally.n_instruments_kept, tally.n_instruments),
        pedals=kept if tokenizer.has_pedal else "in the durations",
    )


def compare(
    performances: Iterable[Performance],
    tokenizers: Sequence[Tokenizer],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[SchemeReport]:
    """Every scheme on the same performances; the first is encoded twice, for what compiles.

    Args:
        progress: told how many performances are done.
    """
    tallies = [Tally() for _ in tokenizers]
    for done, performance in enumerate(performances):
        for tokenizer, tally in zip(tokenizers, tallies, strict=True):
            if not done:
                add_file(Tally(), tokenizer, performance)
            add_file(tally, tokenizer, performance)
        if progress is not None:
            progress(done + 1)
    return [report_of(*one) for one in zip(tokenizers, tallies, strict=True)]
