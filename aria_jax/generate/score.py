"""How surprised a model is by a piece: negative log-likelihood per token and per note."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from aria_jax.config import ModelConfig
from aria_jax.losses.cross_entropy import CHUNK_TOKENS, token_nll
from aria_jax.models.heads import Model, check_known
from aria_jax.models.transformer import token_rows
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import INSTRUMENTS, PARTS, Kind

BUCKET = 128
"""Windows are padded to multiples of this: few compilations, little waste."""
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Score:
    """The score of one piece.

    Attributes:
        ids: the piece, int [L].
        nll: of ids[1:], each given what stands before it, in nats; float32 [L - 1].
        tokenizer: of the ids.
    """

    ids: np.ndarray
    nll: np.ndarray
    tokenizer: Tokenizer

    @cached_property
    def mean_nll(self) -> float:
        """Nats per token."""
        return float(self.nll.mean(dtype=np.float64))

    @cached_property
    def notes(self) -> list[dict[str, Any]]:
        """Per note or drum hit: onset_ms, pitch, instrument ("drum"; "" where the scheme's token
        does not say it), nll (summed over the tokens that are its own).
        """
        at, onset_ms = self.tokenizer.events(self.ids)
        all_kinds = self.tokenizer.kind[self.ids]
        kind = all_kinds[at]
        chosen = np.isin(kind, (Kind.NOTE, Kind.DRUM)) & (at > 0)  # nothing predicts a first token
        others = np.flatnonzero(np.append(~np.isin(all_kinds, PARTS), True))
        ends = others[np.searchsorted(others, at, side="right")]
        found = []
        for begin, end, onset in zip(at[chosen], ends[chosen], onset_ms[chosen], strict=True):
            token = self.tokenizer.tokens[self.ids[begin]]
            found.append(
                {
                    "onset_ms": int(onset),
                    "pitch": int(self.tokenizer.pitch[self.ids[begin]]),
                    "instrument": token[0] if token[0] in (*INSTRUMENTS, "drum") else "",
                    "nll": float(self.nll[begin - 1 : end - 1].sum()),
                }
            )
        return found

    @cached_property
    def by_instrument(self) -> dict[str, dict[str, float]]:
        """Number of notes and nats per note of each instrument."""
        nll: dict[str, list[float]] = {}
        for note in self.notes:
            nll.setdefault(note["instrument"], []).append(note["nll"])
        return {
            name: {"n_notes": len(own), "nats_per_note": float(np.mean(own))}
            for name, own in sorted(nll.items())
        }


@dataclass(frozen=True)
class _Window:
    """inputs[start:stop] of one piece, whose predictions from `keep` on count."""

    piece: int
    start: int
    stop: int
    keep: int


def windows(piece: int, n_inputs: int, context: int) -> Iterator[_Window]:
    """Overlapping windows: beyond the context every token still sees at least half of it."""
    start, keep = 0, 0
    while True:
        stop = min(start + context, n_inputs)
        yield _Window(piece, start, stop, keep)
        if stop == n_inputs:
            return
        keep = stop
        start = max(stop - context // 2, 0)


def check_piece(ids: np.ndarray, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError for ids that cannot be scored: infinitely unlikely ones too."""
    if len(ids) < 2:
        raise UserError("a piece of fewer than two tokens has nothing to score")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(f"token ids must lie in 0..{config.vocab_size - 1}")
    check_known(config, ids, tokenizer.tokens, "the piece")


def score_pieces(
    model: Model,
    tokenizer: Tokenizer,
    pieces: Sequence[np.ndarray],
    *,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores pieces in length-bucketed batches of windows.

    Args:
        pieces: ids of each piece, at least two.
        context: tokens a window holds; the model's own by default.
        progress: told (tokens done, tokens in all).

    Raises:
        UserError: no language model, ids it gives no probability, a piece of one token, or a model
            whose predictions are not finite.
    """
    if model.config.head != "lm" or model.head is None:
        raise UserError(
            f"scoring needs a language model; this one has the head {model.config.head!r}"
        )
    context = min(context or model.config.max_seq_len, model.config.max_seq_len)
    if context < 2:
        raise UserError(f"a context of {context} tokens predicts nothing; use 2 or more")
    for ids in pieces:
        check_piece(ids, model.config, tokenizer)
    nll = [np.zeros(len(ids) - 1, np.float32) for ids in pieces]
    all_windows = [w for i, ids in enumerate(pieces) for w in windows(i, len(ids) - 1, context)]
    total, done = sum(w.stop - w.start for w in all_windows), 0
    compute = _nll_function(model, model.head[...])
    if progress is not None:
        progress(0, total)
    for batch, rows, length in _batches(all_windows):
        inputs_BxL, targets_BxL = np.full((2, rows, length), tokenizer.pad_id, np.int32)
        for row, w in enumerate(batch):
            inputs_BxL[row, : w.stop - w.start] = pieces[w.piece][w.start : w.stop]
            targets_BxL[row, : w.stop - w.start] = pieces[w.piece][w.start + 1 : w.stop + 1]
        nll_BxL = np.asarray(compute(inputs_BxL, targets_BxL))
        if not np.isfinite(nll_BxL).all():
            raise UserError(
                "the model's predictions are not finite: its weights diverged in training; use an "
                "earlier checkpoint"
            )
        for row, w in enumerate(batch):
            nll[w.piece][w.keep : w.stop] = nll_BxL[row, w.keep - w.start : w.stop - w.start]
            done += w.stop - w.start
        if progress is not None:
            progress(done, total)
    return [Score(ids, values, tokenizer) for ids, values in zip(pieces, nll, strict=True)]


def _batches(all_windows: Sequence[_Window]) -> Iterator[tuple[list[_Window], int, int]]:
    """Windows of one padded length, and the batch's rows and length; rows are the same throughout
    a length, so that it compiles once.
    """
    padded = [-(-(w.stop - w.start) // BUCKET) * BUCKET for w in all_windows]
    for length in sorted(set(padded)):
        members = [w for w, size in zip(all_windows, padded, strict=True) if size == length]
        rows = min(len(members), max(1, BATCH_TOKENS // length))
        for first in range(0, len(members), rows):
            yield members[first : first + rows], rows, length


def _nll_function(
    model: Model, head_DxV: jax.Array
) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    graph, state = nnx.split(model)

    @jax.jit
    def compute(
        state: nnx.State, head_DxV: jax.Array, inputs_BxL: jax.Array, targets_BxL: jax.Array
    ) -> jax.Array:
        hidden_BxLxD = nnx.merge(graph, state).hidden(inputs_BxL)
        hidden_TxD = hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1])
        targets_T = token_rows(model.config, targets_BxL.reshape(-1))
        nll_T, _ = token_nll(hidden_TxD, head_DxV, targets_T, CHUNK_TOKENS)
        return nll_T.reshape(inputs_BxL.shape)

    return partial(compute, state, head_DxV)
