"""The protocol of tokenizers: all that shards, loaders, training, embedding and generation ask of a
scheme that turns performances into token ids.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np

from data_pipeline.cleaning import supported_notes
from data_pipeline.dedup import content_hash
from data_pipeline.errors import InvalidMidi, UserError, did_you_mean, expect
from data_pipeline.midi import (
    DRUM_CHANNEL,
    NOTE,
    PROGRAM,
    Performance,
    note_programs,
    read_midi,
    refuse_overlong,
    resolve_pedal,
)  # fmt: skip
from data_pipeline.settings import AugmentConfig
from data_pipeline.vocabulary import (
    INSTRUMENT_OF_PROGRAM,
    INSTRUMENTS,
    PROGRAMS,
    VELOCITY_STEP,
    Automaton,
    Kind,
)

COMMON_SPECIAL = ("<S>", "<E>", "<P>", "<U>")
SOUND = np.dtype(
    [("instrument", "u1"), ("pitch", "u1"), ("velocity", "u1"), ("start", "i8"), ("end", "i8")]
)
"""A note as it sounds: index into `INSTRUMENTS` (their number for drums), and times in ms."""


def sounding_notes(performance: Performance) -> np.ndarray:
    """`SOUND` [N] of the notes of supported instruments by onset, from 0; the pedal is in the ends,
    and a key that is struck again ends its note before.

    Raises:
        InvalidMidi: there are none, or it lasts longer than a day.
    """
    expect(performance, Performance, "encode: a Performance")
    performance = resolve_pedal(supported_notes(performance))
    notes = performance.notes
    out = np.zeros(len(notes), SOUND)
    is_drum = notes["channel"] == DRUM_CHANNEL
    instruments = INSTRUMENT_OF_PROGRAM[note_programs(performance)]
    out["instrument"] = np.where(is_drum, len(INSTRUMENTS), instruments)
    out["pitch"], out["velocity"] = notes["pitch"], notes["velocity"]
    out["start"] = performance.between_ms(int(notes["start"][0]), notes["start"])
    lengths = performance.between_ms(notes["start"], notes["end"])
    out["end"] = out["start"] + np.maximum(lengths, 0)
    refuse_overlong(out["end"], "a performance")
    return out


def performance_of(sounds: np.ndarray) -> Performance:
    """The performance of 1 tick = 1 ms of `SOUND` rows, each instrument on its own channel."""
    sounds = sounds[np.argsort(sounds["start"], kind="stable")]
    channel_of = np.array([*range(9), 10, DRUM_CHANNEL])
    notes = np.zeros(len(sounds), NOTE)
    for name in ("pitch", "velocity", "start", "end"):
        notes[name] = sounds[name]
    notes["channel"] = channel_of[sounds["instrument"]]
    used = np.unique(sounds["instrument"]).tolist()
    rows = [
        (0, PROGRAMS[INSTRUMENTS[i]] if i < len(INSTRUMENTS) else 0, channel_of[i]) for i in used
    ]
    return Performance(500, notes, programs=np.array(rows or [(0, 0, 0)], PROGRAM))


class Tokenizer(ABC):
    """A vocabulary and the two directions through it.

    Whoever implements one gives `preset_name`, `tokens`, `kind`, `encode`, `decode` and `events`;
    the rest follows from them, and is overridden where a scheme has more or does it faster. Ids fit
    uint16; the first four are those of `COMMON_SPECIAL` in every scheme. Objects never change, and
    `Tokenizer.preset(preset_name)` is the same one in any process.

    Attributes:
        preset_name: what manifests and checkpoints call it.
        dim_id: `<D>`, which announces the end; -1 in a scheme without it.
        augmentations: settings of `AugmentConfig` that `augment` carries out; empty for none.
        has_pedal: whether pedal events are tokens; elsewhere durations have the pedal in them.
    """

    preset_name: str
    augmentations: frozenset[str] = frozenset()
    bos_id, eos_id, pad_id, unk_id = range(4)
    dim_id = -1

    @staticmethod
    @lru_cache
    def preset(name: str) -> "Tokenizer":
        """The tokenizer of that name, built once.

        Raises:
            UserError: no such preset, or a package it needs is missing.
        """
        from data_pipeline.tokenizers import SCHEMES, load_scheme, render
        from data_pipeline.tokenizers.events import SCHEME, EventTokenizer

        if name.partition(":")[0] == SCHEME:
            return EventTokenizer.from_preset(name)
        if name == render.SCHEME:
            return render.RenderTokenizer()
        if name not in SCHEMES:
            *names, last = SCHEMES
            known = f"{', '.join(names)} and {last}; {SCHEME} and {render.SCHEME} are for Parquet"
            hint = did_you_mean(name, [*SCHEMES, SCHEME, render.SCHEME])
            raise UserError(f"no tokenizer preset {name!r}{hint}; the presets are {known}")
        return load_scheme(name)

    @property
    def scheme(self) -> str:
        """What people call it: the preset's name, without a vocabulary that is in it."""
        return self.preset_name.partition(":")[0]

    # --- vocabulary ---

    @property
    @abstractmethod
    def tokens(self) -> tuple:
        """Token of each id: a string, or a tuple such as ("piano", 60, 70) or ("onset", 1230)."""

    @property
    @abstractmethod
    def kind(self) -> np.ndarray:
        """`Kind` of each id, uint8 [V]; exactly one token of each note is a NOTE or DRUM."""

    @property
    def has_pedal(self) -> bool:
        """Whether pedal events are tokens."""
        return False

    @property
    def slices_tokens(self) -> bool:
        """Whether a slice of a piece is a part of its tokens, and not its notes encoded anew."""
        return self.has_pedal

    @cached_property
    def _id_of(self) -> dict:
        return {token: i for i, token in enumerate(self.tokens)}

    def id_of(self, token: str | tuple) -> int:
        """The id of a token; UserError where the vocabulary has none such."""
        try:
            return self._id_of[token]
        except KeyError:
            raise UserError(f"the {self.scheme} vocabulary has no token {token!r}") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.tokens)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of vocabulary and scheme: data and models with the same hash fit together."""
        return hashlib.sha256(json.dumps([self.preset_name, self.tokens]).encode()).hexdigest()

    # What a token says, for features of it; -1 where it does not say this. int32 [V] each.

    def _says_nothing(self) -> np.ndarray:
        return np.full(self.vocab_size, -1, np.int32)

    @cached_property
    def onset_ms(self) -> np.ndarray:
        """Onset within its segment of each onset token in ms, else -1; int32 [V]."""
        return self._says_nothing()

    @cached_property
    def dur_ms(self) -> np.ndarray:
        """Duration of each duration token in ms, else -1; int32 [V]."""
        return self._says_nothing()

    @cached_property
    def pitch(self) -> np.ndarray:
        """Pitch of each token that begins a note or drum hit, else -1; int32 [V]."""
        return self._says_nothing()

    @cached_property
    def velocity(self) -> np.ndarray:
        """Velocity of each token that names one, else -1; int32 [V]."""
        return self._says_nothing()

    def reachable(self, occurring: np.ndarray) -> np.ndarray:
        """Ids that a corpus can hold, however it is augmented; ascending int64.

        Args:
            occurring: bool [V], the ids in the corpus as it is.
        """
        del occurring
        return np.arange(self.vocab_size)

    # --- performance -> ids -> performance ---

    def read(self, data: bytes, *, compat: str | None = None, repair: bool = False) -> Performance:
        """What the bytes of one file of a source say; see `read_midi`."""
        return read_midi(data, compat=compat, repair=repair)

    def content_hash(self, performance: Performance) -> str:
        """SHA-256 (hex) of what is played or happens, whatever file it stands in."""
        return content_hash(performance)

    @abstractmethod
    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        add_eos: bool = True,
    ) -> np.ndarray:
        """Token ids of a performance, uint16 [L].

        Args:
            labels: composer, form, genre; left out by a scheme without tokens for them.
            add_eos: end with `<E>`.

        Raises:
            InvalidMidi: no note of it has a token.
        """

    @abstractmethod
    def decode(self, ids: np.ndarray) -> Performance:
        """A performance of 1 tick = 1 ms; what is incomplete in `ids` is left out."""

    @abstractmethod
    def events(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whole notes, drum hits and pedal events in `ids`: position of the first token of each,
        and its onset in ms from the first token; int64 [N] both.
        """

    def check_ids(self, ids: np.ndarray) -> np.ndarray:
        """`ids` as int64; UserError where one is not of the vocabulary."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(f"token ids must lie in 0..{self.vocab_size - 1}")
        return ids

    # --- slices ---

    def note_positions(self, ids: np.ndarray) -> np.ndarray:
        """Where each note and drum hit of a piece begins, int32 [N]."""
        kind = self.kind[np.asarray(ids)]
        return np.flatnonzero((kind == Kind.NOTE) | (kind == Kind.DRUM)).astype(np.int32)

    def n_notes(self, ids: np.ndarray) -> int:
        """Notes and drum hits in `ids`."""
        return len(self.note_positions(ids))

    def with_tokens(self, performance: Performance) -> Performance:
        """Only the notes that have tokens: what is counted and sliced.

        Raises:
            InvalidMidi: there are none.
        """
        if not len(performance.notes):
            raise InvalidMidi("no-notes", "no notes")
        return performance

    def slice_ids(self, ids: np.ndarray, note_at: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Notes `start:stop` of a piece as a piece of its own, without labels; uint16.

        Args:
            ids: uint16 [L]; note_at: its `note_positions`.
        """
        del note_at
        part = _decoded(self, np.asarray(ids, np.uint16).tobytes()).slice_notes(start, stop)
        if not len(part.notes):
            return np.array([self.bos_id, self.eos_id], np.uint16)
        return self.encode(part)

    def _decode_for_encoding(self, ids: np.ndarray) -> Performance:
        """What `encode` makes the same tokens of; a scheme in beats keeps its tempo here."""
        return self.decode(ids)

    def start(self, instrument: str = "piano") -> np.ndarray:
        """The beginning of a piece of which only the instrument is known, int64."""
        del instrument
        return np.array([self.bos_id])

    # --- what a scheme may or may not have ---

    def augment(
        self, ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator
    ) -> np.ndarray:
        """Part of a piece, or of several, changed at random as far as `augmentations` goes; uint16.

        No padding comes back; the length may differ. What the scheme cannot do is left undone:
        callers compare `augmentations` with what they ask for. Here each part that ends in `<E>` is
        decoded, changed and encoded again: what sounded already where a window begins goes.
        """
        ids = ids[ids != self.pad_id]
        ends = np.flatnonzero(ids == self.eos_id) + 1
        parts = [part for part in np.split(ids, ends) if len(part)]
        return np.concatenate([ids[:0], *(self._part_augmented(one, config, rng) for one in parts)])

    def _part_augmented(
        self, ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator
    ) -> np.ndarray:
        factor = rng.uniform(1 - config.tempo, 1 + config.tempo)
        semitones = int(rng.integers(-config.pitch, config.pitch + 1))
        louder = int(rng.integers(-config.velocity, config.velocity + 1)) * VELOCITY_STEP
        performance = self._decode_for_encoding(ids)
        notes = performance.notes.copy()
        pitch = notes["pitch"] + np.where(notes["channel"] == DRUM_CHANNEL, 0, semitones)
        notes["pitch"] = np.clip(pitch, 0, 127)
        notes["velocity"] = np.clip(notes["velocity"].astype(int) + louder, 1, 127)
        if "tempo" in self.augmentations:
            length = np.rint((notes["end"] - notes["start"]) * factor)
            notes["start"] = np.rint(notes["start"] * factor)
            notes["end"] = notes["start"] + np.maximum(length, 1)
        notes = notes[(pitch >= 0) & (pitch <= 127)]
        if not len(notes):
            return ids
        changed = self.encode(
            replace(performance, notes=notes), add_eos=bool(ids[-1] == self.eos_id)
        )
        header = int(np.argmax(ids == self.bos_id)) + 1 if self.bos_id in ids else 0
        body = changed[int(np.argmax(changed == self.bos_id)) + 1 :]
        return np.concatenate([ids[:header], body]).astype(np.uint16)

    def grammar(self) -> Automaton | None:
        """The automaton that reads every whole piece of this scheme; None where there is none."""
        return None

    def with_dim(self, ids: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """`ids` with `<D>`, the sign that the end is near, about 100 tokens from it.

        Raises:
            UserError: the scheme has no such token.
        """
        raise UserError(
            f"the {self.scheme} tokenizer has no <D> that announces the end: task `continue` "
            "takes shards built with aria or pedal"
        )


@lru_cache(maxsize=2)
def _decoded(tokenizer: Tokenizer, ids: bytes) -> Performance:
    """Of a piece that is sliced: its slices are asked for one after another, and each alone would
    cost the decoding of all."""
    return tokenizer._decode_for_encoding(np.frombuffer(ids, np.uint16))
