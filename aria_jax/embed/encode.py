"""Slices to vectors, in batches of like length."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from flax import nnx

from aria_jax.models.heads import Model, head_width
from aria_jax.sharding import batch_sharding, put_batch, replicated, row_shards, usable_cpus
from data_pipeline.errors import UserError

Encode = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Slices of token ids -> float32 [number of slices, E]."""

BUCKET = 64  # batches are padded to a multiple of this: few compilations, little waste
BATCH_TOKENS = 16_384
CPU_BATCH_TOKENS = 4096
"""On a CPU two small batches side by side are half again as fast as a large one on all cores: they
stay in the cores' caches, and one computes while the other waits for its last thread."""
MAX_SIDE_BY_SIDE = 4


def model_encoder(
    model: Model, pad_id: int, pooling: str = "eos", *, mesh: jax.sharding.Mesh | None = None
) -> Encode:
    """Embeds slices with a model that has an embedding head.

    Args:
        pooling: as it was trained with, "eos" or "mean".
        mesh: batches are sharded over its devices, where the model must already be. Where they
            are those of several processes, all must encode the same slices; each gets all rows.

    Raises:
        UserError: the model has another head.
    """
    if model.config.head != "embedding":
        raise UserError(
            f"this model has a {model.config.head!r} head, not an embedding head; "
            "train one with `aria-jax train contrastive`"
        )
    return _encoder(model, pad_id, pooling, mesh)


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
            f"this model has a {model.config.head!r} head, not a class head; "
            "train one with `aria-jax train classify`"
        )
    return _encoder(model, pad_id, pooling, mesh, jax.nn.softmax)


def _encoder(
    model: Model,
    pad_id: int,
    pooling: str,
    mesh: jax.sharding.Mesh | None,
    read: Callable[[jax.Array], jax.Array] = lambda outputs: outputs,
) -> Encode:
    """What `read` makes of the head's outputs."""
    graph, state = nnx.split(model)

    @partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def embed(state, tokens_BxL: jax.Array, eos_B: jax.Array) -> jax.Array:
        return read(nnx.merge(graph, state).pooled(tokens_BxL, eos_B, pooling))

    ways = 1 if mesh is None else row_shards(batch_sharding(mesh))
    batch_tokens, side_by_side = BATCH_TOKENS, 1
    if mesh is None and jax.default_backend() == "cpu":
        batch_tokens, side_by_side = CPU_BATCH_TOKENS, min(usable_cpus(), MAX_SIDE_BY_SIDE)

    def encode_batch(batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple:
        chosen, tokens_BxL, eos_B = batch
        if mesh is None:
            return chosen, np.asarray(embed(state, tokens_BxL, eos_B))[: len(chosen)]
        tokens, eos = put_batch((tokens_BxL, eos_B), batch_sharding(mesh))
        with jax.set_mesh(mesh):  # a thread has a mesh of its own
            return chosen, np.asarray(embed(state, tokens, eos))[: len(chosen)]

    def encode(slices: Sequence[np.ndarray]) -> np.ndarray:
        out = np.empty((len(slices), head_width(model.config)), np.float32)
        batches = like_length(slices, pad_id, ways, batch_tokens)
        with ThreadPoolExecutor(side_by_side) as pool:
            for chosen, rows in pool.map(encode_batch, batches):
                out[chosen] = rows
        return out

    return encode


def like_length(
    slices: Sequence[np.ndarray], pad_id: int, ways: int = 1, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of slices next to each other in length, the longest first: a batch is as long as its
    first row, and the last of them is the only one that may lack rows.

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
        rows = min(max(batch_tokens // length, 1), most)
        rows = -(-rows // ways) * ways
        chosen = order[at : at + rows]
        tokens = np.full((rows, length), pad_id, np.int32)
        eos = np.zeros(rows, np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : lengths[i]] = slices[i]
            eos[row] = lengths[i] - 1
        yield chosen, tokens, eos
        at += rows
