"""Slices to vectors, in batches of like length: by a model, or by counting to hold it against.

And whole performances in memory, embedded as `aria-jax embed` embeds their files.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from aria_jax.checkpoints.models import LoadedModel, load_model
from aria_jax.config import ComputeConfig
from aria_jax.embed.pieces import Slicing, midi_slices
from aria_jax.embed.table import check_slice_pool, pool_slices, read_settings
from aria_jax.models.heads import Model, build_model, head_width
from aria_jax.sharding import batch_sharding, put_batch, replicated, row_shards, usable_cpus
from data_pipeline.errors import UserError
from data_pipeline.midi import DRUM_CHANNEL, Performance
from data_pipeline.tokenizers import AriaTokenizer, Tokenizer
from data_pipeline.vocabulary import SEGMENT_MS, Kind

Encode = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Slices of token ids -> float32 [number of slices, E]."""

BUCKET = 64  # batches are padded to a multiple of this: few compilations, little waste
BATCH_TOKENS = 16_384
CPU_BATCH_TOKENS = 4096
"""On a CPU two small batches side by side are half again as fast as a large one on all cores: they
stay in the cores' caches, and one computes while the other waits for its last thread."""
MAX_SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class FixedShapes:
    """Batches of a few shapes, for a server that may not compile once it is ready.

    Attributes:
        lengths: of batches, ascending: the only ones there are.
        before_batch: called before each; may wait until others have what they need.
    """

    lengths: tuple[int, ...]
    before_batch: Callable[[], object] = lambda: None

    @classmethod
    def up_to(cls, max_tokens: int, **rest: Callable[[], object]) -> "FixedShapes":
        """Lengths that double: little is compiled, and no slice is padded to more than twice."""
        longest = -(-max_tokens // BUCKET) * BUCKET
        lengths = [min(2 * BUCKET, longest)]
        while lengths[-1] < longest:
            lengths.append(min(2 * lengths[-1], longest))
        return cls(tuple(lengths), **rest)


def model_encoder(
    model: Model,
    pad_id: int,
    pooling: str = "eos",
    *,
    mesh: jax.sharding.Mesh | None = None,
    fixed: FixedShapes | None = None,
) -> Encode:
    """Embeds slices with a model that has an embedding head.

    Args:
        pooling: as it was trained with, "eos" or "mean".
        mesh: batches are sharded over its devices, where the model must already be. Where they
            are those of several processes, all must encode the same slices; each gets all rows.
        fixed: the only shapes of batches, one at a time.

    Raises:
        UserError: the model has another head.
    """
    if model.config.head != "embedding":
        raise UserError(
            f"this model has the head {model.config.head!r}, not an embedding head; "
            "train one with `aria-jax train contrastive`"
        )
    return _encoder(model, pad_id, pooling, mesh, fixed=fixed)


def class_encoder(
    model: Model, pad_id: int, pooling: str = "eos", *, mesh: jax.sharding.Mesh | None = None
) -> Encode:
    """From slices to the probabilities of a class head, in the order of `config.class_names`.

    Args:
        mesh: as of `model_encoder`.

    Raises:
        UserError: the model has another head.
    """
    if model.config.head != "class":
        raise UserError(
            f"this model has the head {model.config.head!r}, not a class head; "
            "train one with `aria-jax train classify`"
        )
    return _encoder(model, pad_id, pooling, mesh, jax.nn.softmax)


def _encoder(
    model: Model,
    pad_id: int,
    pooling: str,
    mesh: jax.sharding.Mesh | None,
    read: Callable[[jax.Array], jax.Array] = lambda outputs: outputs,
    fixed: FixedShapes | None = None,
) -> Encode:
    """What `read` makes of the head's outputs."""
    graph, state = nnx.split(model)

    @partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def embed(state: nnx.State, tokens_BxL: jax.Array, eos_B: jax.Array) -> jax.Array:
        return read(nnx.merge(graph, state).pooled(tokens_BxL, eos_B, pooling))

    ways = 1 if mesh is None else row_shards(batch_sharding(mesh))
    batch_tokens, side_by_side = BATCH_TOKENS, 1
    if mesh is None and jax.default_backend() == "cpu":
        batch_tokens, side_by_side = CPU_BATCH_TOKENS, min(usable_cpus(), MAX_SIDE_BY_SIDE)
    lengths: tuple[int, ...] = ()
    if fixed is not None:
        lengths, batch_tokens, side_by_side = fixed.lengths, fixed.lengths[-1], 1

    def encode_batch(batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple:
        chosen, tokens_BxL, eos_B = batch
        if fixed is not None:
            fixed.before_batch()
        if mesh is None:
            return chosen, np.asarray(embed(state, tokens_BxL, eos_B))[: len(chosen)]
        tokens, eos = put_batch((tokens_BxL, eos_B), batch_sharding(mesh))
        with jax.set_mesh(mesh):  # a thread has a mesh of its own
            return chosen, np.asarray(embed(state, tokens, eos))[: len(chosen)]

    def encode(slices: Sequence[np.ndarray]) -> np.ndarray:
        out = np.empty((len(slices), head_width(model.config)), np.float32)
        batches = length_bucketed_batches(slices, pad_id, ways, batch_tokens, lengths)
        with ThreadPoolExecutor(side_by_side) as pool:
            for chosen, rows in pool.map(encode_batch, batches):
                out[chosen] = rows
        return out

    return encode


def length_bucketed_batches(
    slices: Sequence[np.ndarray],
    pad_id: int,
    ways: int = 1,
    batch_tokens: int = BATCH_TOKENS,
    fixed_lengths: Sequence[int] = (),
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of slices next to each other in length, the longest first: a batch is as long as its
    first row, and the last of them is the only one that may lack rows.

    Args:
        fixed_lengths: the only lengths of batches, ascending, no slice longer; those of one length
            then always have as many rows. Without: multiples of `BUCKET`.

    Yields:
        Positions in `slices`, int [n]; tokens int32 [B, L] and `<E>` positions int32 [B], of which
        the first n rows count. B divides by `ways`; a batch has about `batch_tokens`.
    """
    lengths = np.array([len(ids) for ids in slices])
    order = np.argsort(-lengths, kind="stable")
    # A single file fills no batch: fewer rows then, by powers of two for the compiler's sake.
    most, at = 1 << max(len(order) - 1, 0).bit_length(), 0
    while at < len(order):
        length = -(-int(lengths[order[at]]) // BUCKET) * BUCKET
        if fixed_lengths:
            length = next(one for one in fixed_lengths if one >= lengths[order[at]])
        rows = max(batch_tokens // length, 1)
        rows = rows if fixed_lengths else min(rows, most)
        rows = -(-rows // ways) * ways
        chosen = order[at : at + rows]
        tokens = np.full((rows, length), pad_id, np.int32)
        eos = np.zeros(rows, np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : lengths[i]] = slices[i]
            eos[row] = lengths[i] - 1
        yield chosen, tokens, eos
        at += rows


def pitch_class_histogram(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Share of each of the 12 pitch classes among the notes, float32 [12]."""
    pitches = tokenizer.pitch[ids]
    counts = np.bincount(pitches[pitches >= 0] % 12, minlength=12)
    return (counts / max(counts.sum(), 1)).astype(np.float32)


def note_statistics(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Handcrafted statistics, float32 [24]: pitch classes, and mean and spread of pitch, velocity,
    duration, time between onsets, notes at once, and notes per second.
    """
    if isinstance(tokenizer, AriaTokenizer):
        at, onset_ms = tokenizer.events(ids)
        is_note = tokenizer.kind[ids[at]] == Kind.NOTE
        at, onset_ms = at[is_note], onset_ms[is_note]
        pitch, velocity = tokenizer.pitch[ids[at]], tokenizer.velocity[ids[at]]
        duration_ms = tokenizer.dur_ms[ids[at + 2]]
    else:
        notes = tokenizer.decode(ids).notes
        notes = notes[notes["channel"] != DRUM_CHANNEL]
        onset_ms, pitch, velocity = notes["start"], notes["pitch"], notes["velocity"]
        duration_ms = notes["end"] - notes["start"]
    if len(onset_ms) < 2:
        return np.zeros(24, np.float32)
    # In slices that begin after the last change of tempo the clock of the aria-utils reading can
    # start below 0 (its get_duration_ms); the first `<T>` is then missing.
    gaps = np.maximum(np.diff(onset_ms), 0)
    chords = np.unique(onset_ms, return_counts=True)[1]
    seconds = max(gaps.sum() / 1000, SEGMENT_MS / 1e6)
    values = (
        pitch,
        velocity,
        np.log1p(duration_ms),
        np.log1p(gaps),
        chords,
    )
    moments = [moment for value in values for moment in (np.mean(value), np.std(value))]
    rates = [len(onset_ms) / seconds, np.mean(gaps == 0)]
    return np.concatenate([pitch_class_histogram(ids, tokenizer), moments, rates]).astype(
        np.float32
    )


BASELINES = {"pitch-class": pitch_class_histogram, "statistics": note_statistics}


def baseline_encoder(name: str, tokenizer: Tokenizer) -> Encode:
    """An encoder of slices that counts instead of computing a network."""

    def encode(slices: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([BASELINES[name](ids.astype(np.int64), tokenizer) for ids in slices])

    return encode


@dataclass(frozen=True)
class PerformanceEncoder:
    """From a performance to its embedding, float32 [E]: its slices, pooled.

    Attributes:
        slicing: also says how the files of the model's corpus were read.
        fingerprint: of the model, as embeddings files have it.
        pool: over slices, see `pool_slices`.
    """

    encode: Encode
    slicing: Slicing
    fingerprint: str
    pool: str = "mean"

    def __call__(self, performance: Performance) -> np.ndarray:
        """Raises `InvalidMidi` where there is nothing to embed."""
        return pool_slices(self.encode(midi_slices(performance, self.slicing)), self.pool)


def slicing_of(
    loaded: LoadedModel,
    slice_notes: int | None = None,
    max_tokens: int | None = None,
    reading: str | None = None,
) -> Slicing:
    """How files are sliced for a model.

    Args:
        slice_notes, max_tokens: of a slice; None takes what the model embeds best (`slices`), and
            no slice is longer than its context.
        reading: of the MIDI files; None as those of its corpus were read.
    """
    notes, tokens = loaded.slices
    return Slicing(
        loaded.tokenizer,
        slice_notes or notes,
        min(max_tokens or tokens, loaded.config.max_seq_len),
        reading or loaded.reading,
    )


def performance_encoder(
    checkpoint: LoadedModel | str | Path,
    *,
    slice_notes: int | None = None,
    max_tokens: int | None = None,
    pooling: str | None = None,
    pool: str = "mean",
    before_batch: Callable[[], object] | None = None,
) -> PerformanceEncoder:
    """The encoder of a trained model.

    Args:
        slice_notes, max_tokens: of a slice, see `slicing_of`.
        pooling: of the tokens of a slice, "eos" or "mean"; None as it was trained.
        pool: of the slices of a performance, see `pool_slices`.
        before_batch: makes it one for a server, see `FixedShapes`.

    Raises:
        UserError: no checkpoint with an embedding head there, or no such `pool`.
    """
    check_slice_pool(pool)
    loaded = checkpoint if isinstance(checkpoint, LoadedModel) else load_model(checkpoint)
    slicing = slicing_of(loaded, slice_notes, max_tokens)
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    fixed = None
    if before_batch is not None:
        fixed = FixedShapes.up_to(slicing.max_tokens, before_batch=before_batch)
    encode = model_encoder(loaded.model, pad_id, pooling or loaded.pooling, fixed=fixed)
    return PerformanceEncoder(encode, slicing, loaded.fingerprint, pool)


def encoder_of(
    embeddings: str | Path,
    checkpoint: LoadedModel | str | Path,
    *,
    before_batch: Callable[[], object] | None = None,
) -> PerformanceEncoder:
    """The encoder that made an embeddings file, for what is held against its rows.

    Args:
        before_batch: as of `performance_encoder`.

    Raises:
        UserError: no file of `aria-jax embed`, or one that another model made.
    """
    settings = read_settings(embeddings)
    encoder = performance_encoder(
        checkpoint,
        slice_notes=settings["slice_notes"],
        max_tokens=settings["max_tokens"],
        pooling=settings.get("pooling", "eos"),
        pool=settings.get("pool_slices", "mean"),
        before_batch=before_batch,
    )
    if encoder.fingerprint != settings["fingerprint"]:
        raise UserError(
            f"{embeddings} was made by another model ({settings['fingerprint']}, not "
            f"{encoder.fingerprint}); name that one, or embed the files again"
        )
    return encoder


def trained_and_untrained(
    checkpoint: str | Path,
    name: str,
    *,
    slice_notes: int | None = None,
    max_tokens: int | None = None,
    pooling: str | None = None,
    seed: int = 0,
) -> dict[str, tuple[Encode, dict[str, Any]]]:
    """Encoders of a model, by `name`, and of its architecture with weights that it might have
    started from, each with all that its numbers depend on.

    Args:
        slice_notes, max_tokens, pooling: as of `performance_encoder`.
        seed: of the untrained weights.
    """
    loaded = load_model(checkpoint)
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    pooling = pooling or loaded.pooling
    settings = {"pooling": pooling, **asdict(slicing_of(loaded, slice_notes, max_tokens))}
    untrained = build_model(loaded.config, ComputeConfig(), rngs=nnx.Rngs(params=seed))
    made = {
        "untrained": (untrained, f"untrained {loaded.config} seed {seed}"),
        name: (loaded.model, loaded.fingerprint),
    }
    return {
        row: (model_encoder(model, pad_id, pooling), {"fingerprint": fingerprint, **settings})
        for row, (model, fingerprint) in made.items()
    }
