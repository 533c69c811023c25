"""A score before its performance, in Aria's tokens: what is rendered, and how it was.

    <prefix> <S> score <E> <prefix> <S> performance <E>

The score is written as a machine would play it: a beat is 500 ms, every velocity 60, no pedal. A
slice is some notes of the score and their notes in the performance, both from onset 0. Which are
theirs follows from the tokens: the n-th note of a key in the score is the n-th of that key in the
performance (in 100 pieces of ASAP that was wrong for 3 notes in 10,000).

Ids and vocabulary are those of "aria", so that its models can be the beginning of a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import NOTE, Performance
from data_pipeline.settings import AugmentConfig
from data_pipeline.tokenizers.aria import AriaTokenizer
from data_pipeline.vocabulary import VELOCITY_STEP, Kind

SCHEME = "render"
BEAT_MS, SCORE_VELOCITY = 500, 60
COLUMNS = ("score_onset", "score_end", "pitch", "onset_ms", "end_ms", "velocity")
"""Of a Parquet file: in each row lists of a number for each note, score times in beats."""
_ARIA = AriaTokenizer()  # of either half by itself


@dataclass(frozen=True, eq=False)
class Rendition(Performance):
    """A performance of the notes of a score.

    Attributes:
        score: as a machine would play it; as many notes of each key as were performed.
    """

    score: Performance | None = None


def pair_bytes(row: Mapping[str, list]) -> bytes:
    """The columns of a row as `RenderTokenizer.read` takes them."""
    return msgpack.packb([np.asarray(row[name], "<f8").tobytes() for name in COLUMNS])


def as_score(performance: Performance) -> Performance:
    """A performance or a notated file as a score: beats of 500 ms, velocity 60, no pedal."""
    ticks = performance.ticks_per_beat
    notes = performance.notes.copy()
    notes["start"] = np.rint(notes["start"] * (BEAT_MS / ticks))
    notes["end"] = np.maximum(np.rint(notes["end"] * (BEAT_MS / ticks)), notes["start"] + 1)
    notes["velocity"] = SCORE_VELOCITY
    programs = performance.programs.copy()
    programs["tick"] = np.rint(programs["tick"] * (BEAT_MS / ticks))
    return Performance(BEAT_MS, notes, programs=programs)


@dataclass(frozen=True)
class RenderTokenizer(AriaTokenizer):
    """Aria's tokens of a score, and behind them of a performance of it.

    What counts as notes of a piece are those of its score; `decode` and `events` take the
    performance behind it.
    """

    preset_name: str = SCHEME
    augmentations = frozenset(("pitch",))
    slices_tokens = True

    def read(self, data: bytes, *, compat: str | None = None, repair: bool = False) -> Performance:
        """See `Tokenizer.read`: of `pair_bytes`; a MIDI file is a score.

        Raises:
            InvalidMidi: lists of several lengths, or a note that cannot be.
        """
        if data[:1] != msgpack.packb([0] * len(COLUMNS))[:1]:
            return super().read(data, compat=compat, repair=repair)
        columns = dict(
            zip(COLUMNS, (np.frombuffer(c, "<f8") for c in msgpack.unpackb(data)), strict=True)
        )
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise InvalidMidi("bad-pairs", f"lists of {sorted(lengths)} numbers in one row")
        for name, low, high in (("pitch", 0, 127), ("velocity", 1, 127)):
            if not ((columns[name] >= low) & (columns[name] <= high)).all():
                raise InvalidMidi("bad-pairs", f"a {name} outside {low}..{high}")
        times = np.concatenate(
            [column for name, column in columns.items() if name not in ("pitch", "velocity")]
        )
        if not np.isfinite(times).all() or np.abs(times).max(initial=0) > 1e8:
            raise InvalidMidi("bad-pairs", "a time that is no finite number")
        score, played = (
            self._notes(columns, *names)
            for names in (("score_onset", "score_end", BEAT_MS), ("onset_ms", "end_ms", 1))
        )
        score["velocity"] = SCORE_VELOCITY
        return Rendition(BEAT_MS, played, score=Performance(BEAT_MS, score))

    @staticmethod
    def _notes(columns: Mapping[str, np.ndarray], start: str, end: str, scale: float) -> np.ndarray:
        notes = np.zeros(len(columns[start]), NOTE)
        first = columns[start].min(initial=np.inf)
        notes["start"] = np.rint((columns[start] - first) * scale)
        notes["end"] = np.maximum(np.rint((columns[end] - first) * scale), notes["start"] + 1)
        notes["pitch"], notes["velocity"] = columns["pitch"], columns["velocity"]
        return notes[np.lexsort((notes["pitch"], notes["start"]))]

    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        add_eos: bool = True,
        **options: Any,
    ) -> np.ndarray:
        """See `AriaTokenizer.encode`: of a `Rendition`; any other performance is taken for a
        score, all that stands before a performance.
        """
        if isinstance(performance, Rendition) and performance.score is not None:
            score = _ARIA.encode(performance.score, **options)
            return np.concatenate(
                [score, _ARIA.encode(performance, labels=labels, add_eos=add_eos, **options)]
            )
        score = _ARIA.encode(as_score(performance), **options)
        header = score[: int(np.argmax(score == self.bos_id)) + 1]
        return np.concatenate([score, header]).astype(np.uint16)

    def halves(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The score, with its `<E>`, and what stands behind it; nothing is behind where none is."""
        ends = np.flatnonzero(ids == self.eos_id)
        behind = int(ends[0]) + 1 if len(ends) else 0
        return ids[:behind], ids[behind:]

    def decode(self, ids: np.ndarray) -> Performance:
        """See `Tokenizer.decode`: the performance behind the score."""
        return _ARIA.decode(self.halves(self.check_ids(ids))[1])

    def events(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.events`: of the performance behind the score."""
        score, performance = self.halves(np.asarray(ids, np.int64))
        at, onset_ms = _ARIA.events(performance)
        return at + len(score), onset_ms

    def note_positions(self, ids: np.ndarray) -> np.ndarray:
        """See `Tokenizer.note_positions`: those of the score."""
        return _ARIA.note_positions(self.halves(np.asarray(ids))[0])

    def performed(self, ids: np.ndarray) -> np.ndarray:
        """Of each note of the score which one of the performance it is, -1 where none is left;
        int64 [N]. Whole notes of both are counted in the order of their tokens.
        """
        halves = self.halves(np.asarray(ids, np.int64))
        score, played = (self.pitch[half[_ARIA.events(half)[0]]] for half in halves)
        number = {key: i for i, key in enumerate(_keys_and_ranks(played))}
        return np.array([number.get(key, -1) for key in _keys_and_ranks(score)], np.int64)

    def slice_ids(self, ids: np.ndarray, note_at: np.ndarray, start: int, stop: int) -> np.ndarray:
        """See `Tokenizer.slice_ids`: notes of the score, and of the performance those of them."""
        score, performance = self.halves(np.asarray(ids))
        part = _ARIA.slice_ids(score, note_at, start, stop)
        chosen = np.sort(self.performed(ids)[start:stop])
        return np.concatenate([part, self._performed_slice(performance, chosen[chosen >= 0])])

    def _performed_slice(self, ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Notes `chosen` of a performance, from onset 0, with its prefix of instruments."""
        from data_pipeline import _kernels as kernels

        prefix = ids[: int(np.argmax(ids == self.bos_id))]
        prefix = prefix[self.instrument[prefix] >= 0]
        at, onset_ms = _ARIA.events(ids)
        at, onset_ms = at[chosen], onset_ms[chosen]
        body = kernels.write_events(
            ids[at].astype(np.int64), onset_ms - onset_ms[:1], ids[at + 2].astype(np.int64),
            np.arange(len(at)), self.first_onset_id, self.time_id,
        )  # fmt: skip
        return np.concatenate([prefix, [self.bos_id], body, [self.eos_id]]).astype(np.uint16)

    def augment(
        self, ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator
    ) -> np.ndarray:
        """See `Tokenizer.augment`: score and performance transposed alike, if all notes allow."""
        ids = ids[ids != self.pad_id]
        semitones = int(rng.integers(-config.pitch, config.pitch + 1))
        notes = self.kind[ids] == Kind.NOTE
        pitch = self.pitch[ids][notes] + semitones
        if len(pitch) and pitch.min() >= 0 and pitch.max() <= 127:
            moved = ids.astype(np.int64)
            moved[notes] += semitones * (120 // VELOCITY_STEP + 1)
            return moved.astype(np.uint16)
        return ids


def _keys_and_ranks(pitch: np.ndarray) -> list[tuple[int, int]]:
    """Of each note its key, and how many notes of that key come before it."""
    order = np.argsort(pitch, kind="stable")
    ordered = pitch[order]
    rank = np.empty(len(pitch), np.int64)
    rank[order] = np.arange(len(pitch)) - np.searchsorted(ordered, ordered)
    return list(zip(pitch.tolist(), rank.tolist(), strict=True))


# --- how near a rendering is ---------------------------------------------------------------------


def rendition_errors(
    tokenizer: RenderTokenizer, truth: np.ndarray, rendered: np.ndarray
) -> dict[str, float]:
    """How a rendering of a score differs from a performance of it.

    Args:
        truth, rendered: ids of score and performance, the score being the same.

    Returns:
        "matched" (share of the performed notes that were rendered), "added" (rendered notes that
        no note of the score is for, as a share of it); over the matched notes "onset_ms" (mean
        deviation from the first on), "onset_ms_scaled" (the same with the tempo of the
        performance, so that rubato alone is left), and the correlations "velocity_r" and
        "duration_r" (of the logarithm), NaN where one of both is constant.
    """
    ours, theirs = tokenizer.performed(rendered), tokenizer.performed(truth)
    both = (ours >= 0) & (theirs >= 0)
    n_rendered = len(tokenizer.events(rendered)[0])
    found = {
        "matched": float(both.sum() / max((theirs >= 0).sum(), 1)),
        "added": float((n_rendered - (ours >= 0).sum()) / max(len(ours), 1)),
    }
    names = ("onset_ms", "onset_ms_scaled", "velocity_r", "duration_r")
    if both.sum() < 3:
        return {**found, **dict.fromkeys(names, float("nan"))}
    here, there = (
        _heard(tokenizer, ids, which[both]) for ids, which in ((rendered, ours), (truth, theirs))
    )
    start, wanted = (x["start"] - x["start"].min() for x in (here, there))
    scale = float(wanted @ start) / max(float(start @ start), 1e-9)
    lengths = [np.log(np.maximum(x["end"] - x["start"], 1)) for x in (here, there)]
    values = (
        np.abs(start - wanted).mean(),
        np.abs(start * scale - wanted).mean(),
        correlation(here["velocity"], there["velocity"]),
        correlation(*lengths),
    )
    return {**found, **dict(zip(names, map(float, values), strict=True))}


def _heard(
    tokenizer: RenderTokenizer, ids: np.ndarray, chosen: np.ndarray
) -> dict[str, np.ndarray]:
    """Start, end and velocity of notes of the performance, by their number among its tokens."""
    performance = tokenizer.halves(np.asarray(ids, np.int64))[1]
    at, onset_ms = _ARIA.events(performance)
    at, onset_ms = at[chosen], onset_ms[chosen].astype(float)
    durations = tokenizer.dur_ms[performance[at + 2]]
    return {
        "start": onset_ms,
        "end": onset_ms + durations,
        "velocity": tokenizer.velocity[performance[at]].astype(float),
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of both is constant."""
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
