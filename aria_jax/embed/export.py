"""Embeddings of many files: slices in batches of like length, the mean of a file's slices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import jax
import numpy as np
from flax import nnx

from aria_jax.embed.pieces import Piece
from aria_jax.embed.table import Embeddings
from aria_jax.models.heads import Model
from data_pipeline.errors import UserError

Encode = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Slices of token ids -> float32 [number of slices, E]."""

BUCKET = 128  # lengths are padded to a multiple of this: few compilations, little waste
BATCH_TOKENS = 16_384
PIECES_AT_ONCE = 512  # bounds memory and still gives full batches of like length


def model_encoder(model: Model, pad_id: int, pooling: str = "eos") -> Encode:
    """Embeds slices with a model that has an embedding head.

    Raises:
        UserError: the model has another head.
    """
    if model.config.head != "embedding":
        raise UserError(
            f"this model has a {model.config.head!r} head, not an embedding head; "
            "train one with `aria-jax train contrastive`"
        )
    graph, state = nnx.split(model)

    @jax.jit
    def embed(state, tokens_BxL: jax.Array, eos_B: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).pooled(tokens_BxL, eos_B, pooling)

    def encode(slices: Sequence[np.ndarray]) -> np.ndarray:
        out = np.empty((len(slices), model.config.emb_size), np.float32)
        for chosen, tokens_BxL, eos_B in length_buckets(slices, pad_id):
            out[chosen] = embed(state, tokens_BxL, eos_B)[: len(chosen)]
        return out

    return encode


def length_buckets(
    slices: Sequence[np.ndarray], pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of like length: positions in `slices`, tokens int32 [B, L], `<E>` position int32 [B].

    Every batch of a length has the same B; the last one is filled with rows of padding.
    """
    lengths = np.array([len(ids) for ids in slices])
    padded = -(-lengths // BUCKET) * BUCKET
    for length in np.unique(padded):
        members = np.flatnonzero(padded == length)
        rows = max(BATCH_TOKENS // int(length), 1)
        for start in range(0, len(members), rows):
            chosen = members[start : start + rows]
            tokens = np.full((rows, length), pad_id, np.int32)
            eos = np.zeros(rows, np.int32)
            for row, i in enumerate(chosen):
                tokens[row, : lengths[i]] = slices[i]
                eos[row] = lengths[i] - 1
            yield chosen, tokens, eos


def embed_pieces(
    pieces: Iterable[Piece],
    encode: Encode,
    *,
    fingerprint: str,
    per_slice: bool = False,
    n_pieces: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """One row per file, the plain mean of its slices; or one row per slice (path#0, path#1, …).

    Raises:
        UserError: there is nothing to embed.
    """
    pieces = iter(pieces)
    rows: list[tuple[Piece, str, np.ndarray, int]] = []
    done = 0
    while group := list(islice(pieces, PIECES_AT_ONCE)):
        encoded = encode([ids for piece in group for ids in piece.slices])
        ends = np.cumsum([len(piece.slices) for piece in group])
        for piece, own in zip(group, np.split(encoded, ends[:-1]), strict=True):
            if per_slice:
                rows += [(piece, f"{piece.path}#{i}", row, 1) for i, row in enumerate(own)]
            else:
                rows.append((piece, piece.path, own.mean(0), len(own)))
        done += len(group)
        if progress is not None:
            progress(done, max(n_pieces, done))
    if not rows:
        raise UserError("nothing to embed: every file was rejected")
    return Embeddings(
        path=[path for _, path, _, _ in rows],
        sha256=[piece.sha256 for piece, _, _, _ in rows],
        embedding=np.stack([vector for _, _, vector, _ in rows]).astype(np.float32),
        n_slices=np.array([n for _, _, _, n in rows]),
        n_notes=np.array([piece.n_notes for piece, _, _, _ in rows]),
        duration_ms=np.array([piece.duration_ms for piece, _, _, _ in rows]),
        labels=[piece.labels for piece, _, _, _ in rows],
        fingerprint=fingerprint,
    )
