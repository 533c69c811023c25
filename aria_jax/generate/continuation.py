"""Performance to prompt, and generated ids to performances on the timeline of the prompt."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aria_jax.generate.decoding import Decoding, decode, room_behind
from aria_jax.generate.given import GivenTracks
from aria_jax.generate.weights import DecoderWeights
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import Performance
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import PARTS, Kind

_BEGINS = (Kind.NOTE, Kind.DRUM, Kind.PEDAL)
_SOUNDS = (*_BEGINS, *PARTS, Kind.NOTE_OFF, Kind.HELD)


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        prompt_ids: int [T].
        ids: generated ids, `<E>` included where it came, int [N].
        tokenizer: of both.
        given: the tracks whose notes stand among `ids`, if any.
    """

    prompt_ids: np.ndarray
    ids: np.ndarray
    tokenizer: Tokenizer
    given: GivenTracks | None = None

    @property
    def full(self) -> Performance:
        """Prompt and continuation, in ms from the prompt's first note; given notes of an instrument
        that the model plays too are on another channel.
        """
        if self.by_origin:
            given, generated = self.by_origin
            notes = np.concatenate([given.notes, generated.notes])
            return replace(given, notes=notes[np.argsort(notes["start"], kind="stable")])
        return self.tokenizer.decode(np.concatenate([self.prompt_ids, self.ids]))

    @cached_property
    def by_origin(self) -> tuple[Performance, ...]:
        """The notes of `full` that are given, and all others; nothing where no tracks are given."""
        return () if self.given is None else self.given.performances(self.tokenizer, self.ids)

    @property
    def prompt(self) -> Performance:
        """The notes of the prompt, each with its full duration."""
        return self.tokenizer.decode(self.prompt_ids[: self.n_complete])

    @property
    def continuation(self) -> Performance:
        """The generated notes alone, on the timeline of `full`."""
        prompt = self.prompt_ids[: self.n_complete]
        partial_event = self.prompt_ids[self.n_complete :]
        kind = self.tokenizer.kind[prompt]
        header = prompt[~np.isin(kind, _SOUNDS)]
        ids = self.ids
        if self.given is not None:
            ids = ids[~self.given.is_given(self.tokenizer, ids)[len(self.prompt_ids) :]]
        return self.tokenizer.decode(np.concatenate([header, partial_event, ids]))

    @property
    def continuation_from_zero(self) -> Performance:
        """The generated notes, in ms from the onset of the prompt's last note."""
        continuation, prompt_end_ms = self.continuation, self.prompt_end_ms
        notes, pedals = continuation.notes.copy(), continuation.pedals.copy()
        notes["start"] -= prompt_end_ms
        notes["end"] -= prompt_end_ms
        pedals["tick"] -= prompt_end_ms
        # Without the grammar a model may step back in time; nothing begins before the file does.
        notes = notes[notes["start"] >= 0]
        return replace(continuation, notes=notes, pedals=pedals[pedals["tick"] >= 0])

    @property
    def prompt_end_ms(self) -> int:
        """Onset of the prompt's last event, in ms from its first."""
        onsets_ms = self.tokenizer.events(self.prompt_ids[: self.n_complete])[1]
        return int(onsets_ms[-1]) if len(onsets_ms) else 0

    @property
    def n_complete(self) -> int:
        """Prompt tokens up to its last complete event; a partial one after it is the model's."""
        begins = np.flatnonzero(np.isin(self.tokenizer.kind[self.prompt_ids], _BEGINS))
        whole = self.tokenizer.events(self.prompt_ids)[0]
        partial = begins[begins > (whole[-1] if len(whole) else -1)]
        return int(partial[0]) if len(partial) else len(self.prompt_ids)

    @property
    def ended(self) -> bool:
        """Whether the model ended the piece itself, and not with the given tracks."""
        by_model = len(self.ids) > 0 and self.given is None
        return by_model and self.ids[-1] == self.tokenizer.eos_id

    @property
    def n_notes(self) -> int:
        """Generated notes and drum hits."""
        return len(self.continuation.notes)

    @property
    def seconds(self) -> float:
        """Music generated: from the prompt's last onset to the last generated one."""
        notes = self.continuation_from_zero.notes
        return float(notes["start"].max()) / 1000 if len(notes) else 0.0


@dataclass(frozen=True)
class Throughput:
    """How far a batch of continuations is.

    Attributes:
        n_tokens, max_tokens: per sequence.
        n_notes: events over all sequences.
        music_seconds: of the longest sequence, from the prompt's last onset.
        wall_seconds: since the start, prefill and compilation included.
    """

    n_tokens: int
    max_tokens: int
    n_notes: int
    music_seconds: float
    wall_seconds: float

    def __str__(self) -> str:
        wall = max(self.wall_seconds, 1e-9)
        return f"{self.n_notes / wall:.1f} notes/s, {self.music_seconds / wall:.1f}x real time"


def unconditional_prompt(tokenizer: Tokenizer, instrument: str = "piano") -> np.ndarray:
    """The start of a piece of which nothing is known, int64."""
    return tokenizer.start(instrument)


def check_prompt_limits(
    *, seconds: float | None, notes: int | None, from_nothing: bool = False
) -> None:
    """Raises UserError unless exactly one limit is given, and above 0 (`from_nothing`: or 0)."""
    if (seconds is None) == (notes is None):
        raise UserError("a prompt is measured in seconds or in notes: give one of them")
    limit, unit = (seconds, "seconds") if seconds is not None else (notes, "notes")
    if not (limit is not None and 0 <= limit < float("inf") and (limit or from_nothing)):
        raise UserError(
            f"a prompt of {limit} {unit} holds nothing to continue; take more, or leave the prompt "
            "out to begin from nothing"
        )


def make_prompt(
    performance: Performance,
    tokenizer: Tokenizer,
    *,
    seconds: float | None = None,
    notes: int | None = None,
    labels: dict[str, str] | None = None,
) -> np.ndarray:
    """The beginning of a performance as ids, int64 (reference: get_inference_prompt).

    A note belongs to the prompt when it begins in it, and keeps its whole duration, the pedal's
    share included, even where that reaches past the prompt. Seconds count from the first note.

    Raises:
        UserError: both limits given, one that is not above 0, or a performance without notes:
            what holds no note is no prompt (`unconditional_prompt` begins a piece from nothing).
    """
    check_prompt_limits(seconds=seconds, notes=notes)
    starts = performance.notes["start"]
    if not len(starts):
        raise InvalidMidi("no-notes", "no notes to continue; without a prompt a piece begins anew")
    if seconds is not None:
        starts_ms = performance.ms(starts)
        notes = int(np.searchsorted(starts_ms - starts_ms[0], seconds * 1000, side="right"))
    prompt = performance.slice_notes(0, notes or 0)
    if tokenizer.has_pedal:
        last = prompt.notes["start"][-1]
        prompt = replace(prompt, pedals=prompt.pedals[prompt.pedals["tick"] <= last])
    return tokenizer.encode(prompt, labels=labels, add_eos=False).astype(np.int64)


def prompt_of_file(
    path: str | Path, tokenizer: Tokenizer, *, compat: str | None = None, **limits: Any
) -> np.ndarray:
    """`make_prompt` of a MIDI file, `compat` as in `read_midi`; errors name it."""
    from data_pipeline.midi import read_midi

    performance = read_midi(path, compat=compat)
    try:
        return make_prompt(performance, tokenizer, **limits)
    except InvalidMidi as error:
        raise InvalidMidi(error.reason, f"{path}: {error}") from None


def fitting_tokens(weights: DecoderWeights, prompt: np.ndarray, settings: Decoding) -> int:
    """How many of `settings.max_tokens` fit behind the prompt; all where the context slides.

    Raises:
        UserError: the prompt fills the context.
    """
    if settings.sliding:
        return settings.max_tokens
    room = room_behind(weights, len(prompt))
    if room < 1:
        raise UserError(
            f"the prompt takes {len(prompt)} tokens of the {weights.max_seq_len} the model sees; "
            "use a shorter one, or a sliding context (--sliding)"
        )
    return min(room, settings.max_tokens)


def less_room(n_prompt: int, room: int, max_tokens: int, context: int) -> str:
    """What is said where the context cannot hold what was asked for."""
    return (
        f"the prompt takes {n_prompt:,} of the {context:,} tokens that the model sees, so that "
        f"only {room:,} of {max_tokens:,} tokens follow (about {room // 3:,} notes); shorten the "
        "prompt, or go on beyond with a sliding context"
    )


def check_memory(weights: DecoderWeights, n: int, max_tokens: int, *, guided: bool) -> None:
    """Raises `UserError` where the keys and values of `n` continuations cannot be held here."""
    slots = min(max_tokens, weights.max_seq_len)
    per_token = 2 * len(weights.blocks) * weights.embedding_VxD.shape[1]
    each = (1 + guided) * slots * per_token * weights.embedding_VxD.dtype.itemsize
    stats = [device.memory_stats() for device in jax.local_devices()]
    memory = sum(one["bytes_limit"] for one in stats if one and "bytes_limit" in one)
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if n * each > memory:
        raise UserError(
            f"{n:,} continuations at once take {n * each / 2**30:.0f} GiB for their keys and "
            f"values, of {memory / 2**30:.0f} GiB there are: ask for at most {memory // each:,}, "
            "and for more with another seed"
        )


def continue_prompt(
    weights: DecoderWeights,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    *,
    n: int,
    seed: int,
    settings: Decoding,
    given: GivenTracks | None = None,
    condition_E: np.ndarray | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[Throughput], None] | None = None,
) -> list[Continuation]:
    """`n` continuations of a prompt; variation i of a seed is the same whatever `n` is.

    Args:
        given: whose prompt this is; its notes come in their time, and the model plays the rest.

    Raises:
        UserError: see `decode` and `fitting_tokens`.
    """
    room = fitting_tokens(weights, prompt, settings)
    settings = replace(settings, max_tokens=room)
    began = time.monotonic()
    ids_SxN = np.zeros((n, 0), np.int32)
    for ids_SxN in decode(
        weights,
        tokenizer,
        prompt,
        n_sequences=n,
        key=jax.random.key(seed),
        settings=settings,
        given=given,
        condition_E=condition_E,
        mesh=mesh,
    ):
        if progress is not None:
            progress(_throughput(tokenizer, prompt, ids_SxN, room, time.monotonic() - began))
    return [Continuation(prompt, _until_end(tokenizer, ids), tokenizer, given) for ids in ids_SxN]


def _until_end(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    return ids[: ends[0] + 1] if len(ends) else ids


def _throughput(
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    ids_SxN: np.ndarray,
    max_tokens: int,
    wall_seconds: float,
) -> Throughput:
    prompt_onsets_ms = tokenizer.events(prompt)[1]
    prompt_end_ms = prompt_onsets_ms[-1] if len(prompt_onsets_ms) else 0
    onsets_ms = []
    for ids in ids_SxN:
        at, onset_ms = tokenizer.events(np.concatenate([prompt, ids]))
        onsets_ms.append(onset_ms[at >= len(prompt)])
    return Throughput(
        n_tokens=ids_SxN.shape[1],
        max_tokens=max_tokens,
        n_notes=sum(map(len, onsets_ms)),
        music_seconds=max((o[-1] - prompt_end_ms for o in onsets_ms if len(o)), default=0) / 1000,
        wall_seconds=wall_seconds,
    )
