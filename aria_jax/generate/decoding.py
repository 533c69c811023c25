"""The sampling loop: a jitted `lax.while_loop` over cached steps, in chunks the host can watch.

With a sliding context a full cache is no end: each sequence keeps the younger half of what it has
seen, in whole 5 s segments, which is read again as a prompt of its own (`slide`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aria_jax.generate.cache import (
    LayerCache,
    PromptCache,
    decode_step,
    empty_cache,
    prefill,
    prefill_each,
)
from aria_jax.generate.given import GivenGrammar, GivenTracks, given_grammar
from aria_jax.generate.grammar import AnyGrammar, AnyState, grammar_after
from aria_jax.generate.sampler import MinP, RepetitionPenalty, Sampler, combine_branches, step_keys
from aria_jax.generate.weights import DecoderWeights
from aria_jax.models.heads import check_known
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import PARTS, Kind

ENDING_TOKENS = 130
"""Where `<D>` is forced, counted from the last token that fits (reference: update_seq_ids_)."""
SLOTS = 256
"""Caches are padded to multiples of this, so that other lengths reuse a compiled loop."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to continue a prompt.

    Attributes:
        sampler: how each token is chosen.
        max_tokens: tokens generated per sequence, at most.
        use_grammar: forbid what the detokeniser could not read.
        force_end: ask for an ending with `<D>` where the space runs out.
        guidance: strength of classifier-free guidance; needs a condition.
        repetition: penalty on recently played notes.
        sliding: where the context is full, forget the oldest events and go on.
        chunk: tokens between two looks of the host.
    """

    sampler: Sampler = field(default_factory=MinP)
    max_tokens: int = 1024
    use_grammar: bool = True
    force_end: bool = False
    guidance: float = 1.0
    repetition: RepetitionPenalty = field(default_factory=RepetitionPenalty)
    sliding: bool = False
    chunk: int = 32

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max tokens {self.max_tokens} must be at least 1")
        if self.force_end and self.max_tokens <= ENDING_TOKENS:
            raise UserError(
                f"an ending needs room: {self.max_tokens} tokens are to be generated, "
                f"more than {ENDING_TOKENS} are needed"
            )
        if not 0 <= self.guidance <= 10:
            raise UserError(f"guidance {self.guidance} must lie between 0 and 10")


@flax.struct.dataclass
class LoopState:
    """Everything the loop changes.

    Attributes:
        n: tokens generated so far, int32.
        filled: slots of `cache` in use, int32; `n` until the context slides.
        finite: whether all logits so far were finite, bool.
        ids_SxG: generated ids, int32, padded with `<P>`.
        logits_RxV: of the next token, float32.
        cache: keys and values of generated tokens.
        ended_S, dim_seen_S: whether `<E>` and `<D>` have come.
        recent_SxW: the latest ids, for the repetition penalty; -1 where there is none.
        grammar: the automaton's state, None without.
    """

    n: jax.Array
    filled: jax.Array
    finite: jax.Array
    ids_SxG: jax.Array
    logits_RxV: jax.Array
    cache: tuple[LayerCache, ...]
    ended_S: jax.Array
    dim_seen_S: jax.Array
    recent_SxW: jax.Array
    grammar: AnyState


@flax.struct.dataclass
class Vocabulary:
    """What the loop knows of the tokenizer.

    Attributes:
        penalised_V: bool; ids that count as repetition.
        inside_event_V: bool; onsets and durations, before which `<D>` is never put.
    """

    penalised_V: jax.Array
    inside_event_V: jax.Array
    eos_id: int = flax.struct.field(pytree_node=False)
    pad_id: int = flax.struct.field(pytree_node=False)
    dim_id: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """The tables of a tokenizer."""
        return cls(
            penalised_V=jnp.asarray(np.isin(tokenizer.kind, (Kind.NOTE, Kind.DRUM))),
            inside_event_V=jnp.asarray(np.isin(tokenizer.kind, PARTS)),
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            dim_id=tokenizer.dim_id,
        )


def _choose(
    state: LoopState,
    key: jax.Array,
    grammar: AnyGrammar | None,
    vocabulary: Vocabulary,
    settings: Decoding,
    n_branches: int,
) -> jax.Array:
    """The next token of every sequence, int32[S]."""
    logits_SxV = state.logits_RxV
    if n_branches == 2:
        logits_SxV = combine_branches(logits_SxV, state.n, settings.guidance, settings.max_tokens)
    if settings.repetition.penalty != 1:
        logits_SxV = settings.repetition.apply(logits_SxV, state.recent_SxW, vocabulary.penalised_V)
    if n_branches == 2 and vocabulary.dim_id >= 0:  # ends where it is told to, as the reference
        logits_SxV = logits_SxV.at[:, vocabulary.dim_id].set(-jnp.inf)
    if grammar is not None:
        allowed_SxV = grammar.allowed(state.grammar, settings.max_tokens - state.n)
        logits_SxV = jnp.where(allowed_SxV, logits_SxV, -jnp.inf)
    keys_S = step_keys(key, jnp.arange(logits_SxV.shape[0]), state.n)
    token_S = settings.sampler.draw(logits_SxV, keys_S)
    if settings.force_end:
        due = state.n >= settings.max_tokens - ENDING_TOKENS
        at_event_S = ~vocabulary.inside_event_V[token_S] & ~state.dim_seen_S
        token_S = jnp.where(due & at_event_S, vocabulary.dim_id, token_S)
    return jnp.where(state.ended_S, vocabulary.pad_id, token_S)


@partial(jax.jit, static_argnames=("settings", "n_branches"), donate_argnames=("state",))
def _advance_chunk(
    weights: DecoderWeights,
    prompt: PromptCache,
    state: LoopState,
    key: jax.Array,
    grammar: AnyGrammar | None,
    vocabulary: Vocabulary,
    stop: jax.Array,
    *,
    settings: Decoding,
    n_branches: int,
) -> LoopState:
    """Generates up to `stop` tokens in all, or until every sequence has ended."""

    def unfinished(state: LoopState) -> jax.Array:
        return (state.n < stop) & ~state.ended_S.all() & state.finite

    def read(state: LoopState, token_S: jax.Array) -> tuple[jax.Array, Any, AnyState]:
        token_R = jnp.tile(token_S, n_branches)
        logits_RxV, cache = decode_step(weights, prompt, state.cache, token_R, state.filled)
        in_grammar = None if grammar is None else grammar.advance(state.grammar, token_S)
        return logits_RxV, cache, in_grammar

    def step(state: LoopState) -> LoopState:
        def choose_after(token_S: jax.Array) -> jax.Array:
            logits_RxV, _, in_grammar = read(state, token_S)
            ahead = replace(state, n=state.n + 1, logits_RxV=logits_RxV, grammar=in_grammar)
            return _choose(ahead, key, grammar, vocabulary, settings, n_branches)

        token_S = _choose(state, key, grammar, vocabulary, settings, n_branches)
        if isinstance(grammar, GivenGrammar):
            left = settings.max_tokens - state.n
            token_S, in_grammar = grammar.interleave(state.grammar, token_S, choose_after, left)
            state = replace(state, grammar=in_grammar)
        logits_RxV, cache, in_grammar = read(state, token_S)
        return LoopState(
            n=state.n + 1,
            filled=state.filled + 1,
            finite=jnp.isfinite(logits_RxV).all(),
            ids_SxG=jax.lax.dynamic_update_slice_in_dim(
                state.ids_SxG, token_S[:, None], state.n, axis=1
            ),
            logits_RxV=logits_RxV,
            cache=cache,
            ended_S=state.ended_S | (token_S == vocabulary.eos_id),
            dim_seen_S=state.dim_seen_S | (token_S == vocabulary.dim_id),
            recent_SxW=jnp.concatenate([state.recent_SxW[:, 1:], token_S[:, None]], axis=1),
            grammar=in_grammar,
        )

    return jax.lax.while_loop(unfinished, step, state)


_prefill = jax.jit(prefill)
_prefill_each = jax.jit(prefill_each)


def _padded_size(n: int) -> int:
    return -(-n // SLOTS) * SLOTS


def _initial_state(
    logits_PxV: jax.Array,
    prompt: np.ndarray,
    tokenizer: Tokenizer,
    n_sequences: int,
    settings: Decoding,
    cache: tuple[LayerCache, ...],
    grammar: AnyState,
) -> LoopState:
    window = settings.repetition.window if settings.repetition.penalty != 1 else 1
    n_slots, tail = _padded_size(settings.max_tokens), np.full(window, -1, np.int32)
    tail[max(0, window - len(prompt)) :] = prompt[-window:]
    return LoopState(
        n=jnp.int32(0),
        filled=jnp.int32(0),
        finite=jnp.isfinite(logits_PxV).all(),
        ids_SxG=jnp.full((n_sequences, n_slots), tokenizer.pad_id, jnp.int32),
        logits_RxV=jnp.repeat(logits_PxV, n_sequences, axis=0),
        cache=cache,
        ended_S=jnp.zeros(n_sequences, bool),
        dim_seen_S=jnp.full(n_sequences, bool((prompt == tokenizer.dim_id).any())),
        recent_SxW=jnp.tile(jnp.asarray(tail), (n_sequences, 1)),
        grammar=grammar,
    )


def room_behind(weights: DecoderWeights, n_prompt: int) -> int:
    """Tokens that the context holds behind a prompt; one position is a condition's."""
    return weights.max_seq_len - n_prompt - 1


def slide(tokenizer: Tokenizer, ids: np.ndarray, max_tokens: int) -> np.ndarray:
    """`ids` [L] without their oldest events, at most `max_tokens` of them, as a piece of their own.

    Prefix and `<S>` stay. Whole 5 s segments go, with their `<T>`s, so that onsets count from the
    first segment kept and ids need no change; where the last segment alone is too long, its oldest
    events go too. A partial event at the end stays.
    """
    if len(ids) <= max_tokens:
        return ids
    n_header = int(np.argmax(ids == tokenizer.bos_id)) + 1 if tokenizer.bos_id in ids else 0
    body = ids[n_header:]
    first = len(body) - (max_tokens - n_header)
    kind = tokenizer.kind[body]
    segments = np.flatnonzero(kind == Kind.TIME) + 1
    starts = segments[segments >= first]
    if not len(starts) or starts[0] == len(body):
        inside = np.isin(kind, PARTS)
        starts = np.flatnonzero(~inside)
        starts = starts[starts >= first]
    return np.concatenate([ids[:n_header], body[starts[0] if len(starts) else len(body) :]])


def _padded(rows: list[np.ndarray], size: int, pad_id: int) -> np.ndarray:
    """Rows of at most `size` ids padded to one length, int32 [S, T]."""
    padded = np.full((len(rows), _padded_size(size)), pad_id, np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def decode(
    weights: DecoderWeights,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    *,
    n_sequences: int,
    key: jax.Array,
    settings: Decoding,
    given: GivenTracks | None = None,
    condition_E: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Continues one prompt `n_sequences` times, yielding what there is after every chunk.

    Sequence i depends on (key, i) only, not on how many others there are: a context slides after
    a number of tokens, not when what a sequence keeps happens to fill it.

    Args:
        weights: see `aria_jax.generate.weights.decoder_weights`.
        prompt: ids [T], int; `given.prompt` where tracks are given.
        condition_E: embedding the model is conditioned on, float [E].
        mesh: spreads the cache; the mesh that the weights are spread over.

    Yields:
        int32 [S, n]: generated ids so far, `<P>` after `<E>`; the last one is the result.

    Raises:
        UserError: an empty or ended prompt, a condition for a model without an adapter, or logits
            that are not finite.
    """
    prompt = np.asarray(prompt, np.int64)
    _check(weights, tokenizer, prompt, condition_E)
    if settings.force_end and tokenizer.dim_id < 0:
        raise UserError(
            f"an ending is asked for by <D>, which {tokenizer.scheme} lacks: leave --end out"
        )
    guided = condition_E is not None
    condition = jnp.asarray(condition_E, jnp.float32) if guided else None
    # What slides keeps at most half of the context; the first round keeps the prompt if it fits.
    half = weights.max_seq_len // 2
    later_room = room_behind(weights, half)
    too_long = settings.sliding and room_behind(weights, len(prompt)) < 1
    first = slide(tokenizer, prompt, half) if too_long else prompt
    room = room_behind(weights, len(first)) if settings.sliding else settings.max_tokens
    (padded,) = _padded([first], len(first) + guided, tokenizer.pad_id)
    length = jnp.int32(len(first))
    logits_PxV, prompt_cache = _prefill(weights, jnp.asarray(padded), length, condition)
    n_branches = logits_PxV.shape[0]
    slots = _padded_size(min(settings.max_tokens, max(room, later_room)))
    cache = empty_cache(weights, n_branches * n_sequences, slots, mesh, weights.cache_dtype)
    grammar: AnyGrammar | None = None
    in_grammar: AnyState = None
    if given is not None:
        check_known(weights.config, given.ids, tokenizer.tokens, "what is given")
        grammar, in_grammar = given_grammar(tokenizer, given, n_sequences)
    elif settings.use_grammar:
        grammar, in_grammar = grammar_after(tokenizer, prompt, n_sequences)
    state = _initial_state(logits_PxV, prompt, tokenizer, n_sequences, settings, cache, in_grammar)
    vocabulary = Vocabulary.of(tokenizer)
    n, n_full = 0, room
    while True:
        state = _advance_chunk(
            weights,
            prompt_cache,
            state,
            key,
            grammar,
            vocabulary,
            jnp.int32(min(n + settings.chunk, settings.max_tokens, n_full)),
            settings=settings,
            n_branches=n_branches,
        )
        n = int(state.n)
        _refuse_not_finite(state, len(prompt) + n)
        ids_SxN = np.asarray(state.ids_SxG)[:, :n]
        yield ids_SxN
        if n >= settings.max_tokens or bool(state.ended_S.all()):
            return
        if n >= n_full:
            seen = [slide(tokenizer, np.concatenate([prompt, ids]), half) for ids in ids_SxN]
            logits_RxV, prompt_cache = _prefill_each(
                weights,
                jnp.asarray(_padded(seen, half + guided, tokenizer.pad_id)),
                jnp.asarray([len(ids) for ids in seen], jnp.int32),
                condition,
            )
            finite = jnp.isfinite(logits_RxV).all()
            state = state.replace(filled=jnp.int32(0), logits_RxV=logits_RxV, finite=finite)
            n_full = n + later_room


def _refuse_not_finite(state: LoopState, n_tokens: int) -> None:
    if not state.finite:
        raise UserError(
            f"the model's logits are not finite after {n_tokens} tokens: its weights diverged in "
            "training, or overflow in this precision; use an earlier checkpoint, or float32"
        )


def _check(
    weights: DecoderWeights,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    condition_E: np.ndarray | None,
) -> None:
    if not len(prompt):
        raise UserError("the prompt is empty: it needs at least an instrument token and <S>")
    if prompt.min() < 0 or prompt.max() >= tokenizer.vocab_size:
        raise UserError(f"prompt ids must lie in 0..{tokenizer.vocab_size - 1}")
    check_known(weights.config, prompt, tokenizer.tokens, "the prompt")
    if tokenizer.eos_id in prompt[np.flatnonzero(prompt == tokenizer.bos_id)[-1:].sum() :]:
        raise UserError("the prompt holds <E>: nothing can follow the end of a piece; leave it out")
    if condition_E is not None and weights.adapter_ExD is None:
        raise UserError(
            "this model was not trained with a conditioning embedding: "
            "leave the embedding out, or use a checkpoint that has an embedding adapter"
        )
