"""The grammar of Aria tokens as an automaton: which ids may come next, as a mask inside jit.

    piece  = prefix* <S> ( event | <T> | <D> )* <E>
    event  = note onset duration | drum onset | pedal onset

Within a segment (between two `<T>`) onsets do not decrease, and no key is struck twice at one
onset, which a MIDI file could not hold. Only instruments that the prefix announces may play, no
note is silent or without length, and `<D>` comes at most once. So every token of a generated
sequence means something to the detokeniser, and every note is in the file written from it.

Other schemes say in tables which tokens may follow which (`AutomatonGrammar`).
"""

from enum import IntEnum
from functools import cache
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.tokenizers import AriaTokenizer, Tokenizer, of_aria
from data_pipeline.vocabulary import Kind

MAX_EMPTY_SEGMENTS = 12
"""`<T>` in a row that may be generated: a minute of silence, more than any performance holds."""


class Expect(IntEnum):
    """What the automaton waits for."""

    EVENT = 0
    NOTE_ONSET = 1
    SHORT_ONSET = 2
    DURATION = 3
    END = 4


_AN_ONSET = len(Expect)  # in `next_V`: what follows an onset depends on what came before it


@flax.struct.dataclass
class GrammarState:
    """Where each sequence stands.

    Attributes:
        expect_B: `Expect`, int32.
        onset_B: latest onset within the segment in ms, int32.
        silence_B: `<T>` since the last event, int32.
        dim_seen_B: whether `<D>` has come.
        key_B: key of the latest event begun within the segment, int32.
        last_onset_BxK: latest onset of each key within the segment, -1 before the first; int16.
    """

    expect_B: jax.Array
    onset_B: jax.Array
    silence_B: jax.Array
    dim_seen_B: jax.Array
    key_B: jax.Array
    last_onset_BxK: jax.Array


@flax.struct.dataclass
class Grammar:
    """The automaton's tables; a pytree, so that jitted functions take it as an argument.

    Attributes:
        allowed_SxV: bool; ids that state S may be followed by, before onset and counts.
        onset_V: onset in ms of onset tokens, for others a number no onset reaches; int32.
        begins_V: bool; first tokens of events.
        next_V: the state after this id, except for onsets; int32.
        key_V: the key that a note or drum token strikes, a number of instrument and pitch; others
            have the last one, which is never struck; int32.
        max_onset_ms: the greatest onset, after which no key can be struck again.
        time_id, dim_id: `<T>` and `<D>`.
    """

    allowed_SxV: jax.Array
    onset_V: jax.Array
    begins_V: jax.Array
    next_V: jax.Array
    key_V: jax.Array
    max_onset_ms: int = flax.struct.field(pytree_node=False)
    time_id: int = flax.struct.field(pytree_node=False)
    dim_id: int = flax.struct.field(pytree_node=False)

    def allowed(self, state: GrammarState, remaining: jax.Array | int) -> jax.Array:
        """bool[B, V]: ids that may come next when `remaining` tokens fit, this one included.

        No event begins that could not be finished within the space left.
        """
        ids_V = jnp.arange(self.onset_V.shape[0])
        key_Bx1 = state.key_B[:, None]
        last_onset_B = jnp.take_along_axis(state.last_onset_BxK, key_Bx1, axis=1)[:, 0]
        after_last_B = last_onset_B.astype(jnp.int32) + 1
        min_onset_B = jnp.where(state.expect_B == Expect.EVENT, 0, after_last_B)
        exhausted_BxK = state.last_onset_BxK >= self.max_onset_ms
        forbidden_BxV = (
            ((ids_V == self.time_id) & (state.silence_B >= MAX_EMPTY_SEGMENTS)[:, None])
            | ((ids_V == self.dim_id) & state.dim_seen_B[:, None])
            | (self.begins_V & (jnp.asarray(remaining) < 3))
            | (self.onset_V < jnp.maximum(state.onset_B, min_onset_B)[:, None])
            | exhausted_BxK[:, self.key_V]
        )
        return self.allowed_SxV[state.expect_B] & ~forbidden_BxV

    def advance(self, state: GrammarState, token_B: jax.Array) -> GrammarState:
        """The state after each sequence's next token, int32[B]."""
        is_onset_B = self.next_V[token_B] == _AN_ONSET
        after_onset_B = jnp.where(
            state.expect_B == Expect.NOTE_ONSET, Expect.DURATION, Expect.EVENT
        )
        is_time_B = token_B == self.time_id
        silence_B = jnp.where(is_time_B, state.silence_B + 1, state.silence_B)
        ended_B = state.expect_B == Expect.END
        n_keys = state.last_onset_BxK.shape[1]
        last_onset_BxK = jnp.where(
            is_onset_B[:, None] & (jnp.arange(n_keys - 1) == state.key_B[:, None]),
            self.onset_V[token_B].astype(jnp.int16)[:, None],
            state.last_onset_BxK[:, :-1],
        )
        unplayed_Bx1 = state.last_onset_BxK[:, -1:]
        return GrammarState(
            expect_B=jnp.where(
                ended_B,
                Expect.END,
                jnp.where(is_onset_B, after_onset_B, self.next_V[token_B]),
            ),
            onset_B=jnp.where(
                is_time_B, 0, jnp.where(is_onset_B, self.onset_V[token_B], state.onset_B)
            ),
            silence_B=jnp.where(self.begins_V[token_B], 0, silence_B),
            dim_seen_B=state.dim_seen_B | (token_B == self.dim_id),
            key_B=jnp.where(self.begins_V[token_B] | is_time_B, self.key_V[token_B], state.key_B),
            last_onset_BxK=jnp.concatenate(
                [jnp.where(is_time_B[:, None], -1, last_onset_BxK), unplayed_Bx1], axis=1
            ),
        )


def make_grammar(
    tokenizer: Tokenizer, prompt: np.ndarray, silent: np.ndarray | tuple[int, ...] = ()
) -> Grammar:
    """The automaton for what may follow `prompt`, whose prefix names the instruments.

    Args:
        silent: numbers of instruments that begin no event all the same.

    Raises:
        UserError: the prompt announces no instrument, so that no note could be decoded; or the
            scheme has another grammar.
    """
    tokenizer = of_aria(tokenizer, "the grammar of onsets")
    kind = tokenizer.kind
    announced = np.unique(tokenizer.instrument[prompt[kind[prompt] == Kind.PREFIX]])
    announced = announced[announced >= 0]
    if not len(announced):
        raise UserError(
            "the prompt announces no instrument before <S>: begin it with a token such as "
            '("prefix", "instrument", "piano"), or switch the grammar off'
        )
    plays = np.isin(tokenizer.instrument, np.setdiff1d(announced, silent))
    note = (kind == Kind.NOTE) & plays & (tokenizer.velocity > 0)
    drum = (kind == Kind.DRUM) & plays
    pedal = kind == Kind.PEDAL
    onset = kind == Kind.ONSET
    ids = np.arange(tokenizer.vocab_size)
    between = np.isin(ids, [tokenizer.time_id, tokenizer.dim_id, tokenizer.eos_id])

    allowed = np.zeros((len(Expect), tokenizer.vocab_size), bool)
    allowed[Expect.EVENT] = note | drum | pedal | between
    allowed[Expect.NOTE_ONSET] = allowed[Expect.SHORT_ONSET] = onset
    allowed[Expect.DURATION] = tokenizer.dur_ms > 0
    allowed[Expect.END, tokenizer.pad_id] = True

    following = np.full(tokenizer.vocab_size, Expect.EVENT, np.int32)
    following[kind == Kind.NOTE] = Expect.NOTE_ONSET
    following[(kind == Kind.DRUM) | pedal] = Expect.SHORT_ONSET
    following[onset] = _AN_ONSET
    following[tokenizer.eos_id] = Expect.END
    return Grammar(
        allowed_SxV=jnp.asarray(allowed),
        onset_V=jnp.asarray(np.where(onset, tokenizer.onset_ms, np.iinfo(np.int32).max)),
        begins_V=jnp.asarray((kind == Kind.NOTE) | (kind == Kind.DRUM) | pedal),
        next_V=jnp.asarray(following),
        key_V=jnp.asarray(_keys(tokenizer)),
        max_onset_ms=int(tokenizer.onset_ms.max()),
        time_id=tokenizer.time_id,
        dim_id=tokenizer.dim_id,
    )


@cache
def _keys(tokenizer: AriaTokenizer) -> np.ndarray:
    """`Grammar.key_V`, int32 [V]."""
    strikes = np.isin(tokenizer.kind, (Kind.NOTE, Kind.DRUM))
    pairs = np.stack([tokenizer.instrument[strikes], tokenizer.pitch[strikes]], axis=1)
    distinct, number = np.unique(pairs, axis=0, return_inverse=True)
    key_V = np.full(tokenizer.vocab_size, len(distinct), np.int32)
    key_V[strikes] = number.reshape(-1)
    return key_V


def _last_onsets(tokenizer: AriaTokenizer, segment: np.ndarray) -> tuple[int, np.ndarray]:
    """The latest key begun in a segment, and the latest onset of each key, int16 [K]."""
    key_V = _keys(tokenizer)
    no_key = int(key_V.max())
    key, last_onset_K = no_key, np.full(no_key + 1, -1, np.int16)
    for token in segment:
        kind = tokenizer.kind[token]
        if kind in (Kind.NOTE, Kind.DRUM, Kind.PEDAL):
            key = int(key_V[token])
        elif kind == Kind.ONSET and key != no_key:
            last_onset_K[key] = tokenizer.onset_ms[token]
    return key, last_onset_K


def state_after(tokenizer: Tokenizer, prompt: np.ndarray, batch: int) -> GrammarState:
    """The state in which `batch` continuations of a prompt begin, even inside an event."""
    tokenizer = of_aria(tokenizer, "the grammar of onsets")
    ends = np.flatnonzero(prompt[:-1] == tokenizer.eos_id)
    prompt = prompt[ends[-1] + 1 :] if len(ends) else prompt  # another piece stands before it
    kind = tokenizer.kind[prompt]
    last, before = (kind[-1:].tolist() or [None])[0], (kind[-2:-1].tolist() or [None])[0]
    expect = Expect.EVENT
    if last == Kind.NOTE:
        expect = Expect.NOTE_ONSET
    elif last in (Kind.DRUM, Kind.PEDAL):
        expect = Expect.SHORT_ONSET
    elif last == Kind.ONSET and before == Kind.NOTE:
        expect = Expect.DURATION
    elif len(prompt) and prompt[-1] == tokenizer.eos_id:
        expect = Expect.END
    times = np.flatnonzero(kind == Kind.TIME)
    segment = prompt[times[-1] + 1 :] if len(times) else prompt
    onsets = tokenizer.onset_ms[segment]
    onset_ms = int(onsets[onsets >= 0][-1]) if (onsets >= 0).any() else 0
    events = np.flatnonzero(np.isin(kind, (Kind.NOTE, Kind.DRUM, Kind.PEDAL)))
    silence = int(np.count_nonzero(times > (events[-1] if len(events) else -1)))
    dim_seen = bool((prompt == tokenizer.dim_id).any())
    key, last_onset_K = _last_onsets(tokenizer, segment)
    return GrammarState(
        expect_B=jnp.full(batch, int(expect), jnp.int32),  # of an enum it would be weakly typed
        onset_B=jnp.full(batch, onset_ms, jnp.int32),
        silence_B=jnp.full(batch, silence, jnp.int32),
        dim_seen_B=jnp.full(batch, dim_seen),
        key_B=jnp.full(batch, key, jnp.int32),
        last_onset_BxK=jnp.tile(jnp.asarray(last_onset_K), (batch, 1)),
    )


@flax.struct.dataclass
class AutomatonGrammar:
    """`Tokenizer.grammar` inside jit; its state is the automaton's, int32 [B].

    Attributes:
        following_SxC: as of `Automaton`, int32.
        class_V: class of each id, int32.
        pad_id: what follows the end.
    """

    following_SxC: jax.Array
    class_V: jax.Array
    pad_id: int = flax.struct.field(pytree_node=False)

    def allowed(self, state_B: jax.Array, remaining: jax.Array | int) -> jax.Array:
        """bool [B, V]: ids that may come next, however few tokens fit."""
        del remaining
        allowed_BxV = self.following_SxC[state_B][:, self.class_V] >= 0
        ended_B = (self.following_SxC[state_B] < 0).all(axis=1)
        return allowed_BxV.at[:, self.pad_id].set(ended_B)

    def advance(self, state_B: jax.Array, token_B: jax.Array) -> jax.Array:
        """The state after each sequence's next token; that of an ended one stays."""
        following_B = self.following_SxC[state_B, self.class_V[token_B]]
        return jnp.where(following_B < 0, state_B, following_B)


AnyState = Any
"""A pytree that its grammar knows; None without a grammar."""


class AnyGrammar(Protocol):
    """What the sampling loop asks of a grammar."""

    def allowed(self, state: AnyState, remaining: jax.Array | int) -> jax.Array:
        """bool [B, V]: ids that may come next when `remaining` tokens fit, this one included."""

    def advance(self, state: AnyState, token_B: jax.Array) -> AnyState:
        """The state after each sequence's next token, int32 [B]."""


def grammar_after(
    tokenizer: Tokenizer, prompt: np.ndarray, batch: int
) -> tuple[AnyGrammar | None, AnyState]:
    """What may follow `prompt`, and the state in which `batch` continuations of it begin; None
    where the scheme has no grammar.

    Raises:
        UserError: nothing can follow this prompt.
    """
    if isinstance(tokenizer, AriaTokenizer):
        return make_grammar(tokenizer, prompt), state_after(tokenizer, prompt, batch)
    automaton = tokenizer.grammar()
    if automaton is None:
        return None, None
    error, state = automaton.read(prompt)
    if error >= 0:
        raise UserError(
            f"token {error} of the prompt, {tokenizer.tokens[prompt[error]]!r}, may not stand "
            f"where it does by the rules of {tokenizer.scheme}; switch the grammar off to go "
            "on from it"
        )
    tables = jnp.asarray(automaton.following), jnp.asarray(automaton.class_of)
    grammar = AutomatonGrammar(*tables, pad_id=tokenizer.pad_id)
    return grammar, jnp.full(batch, state, jnp.int32)
