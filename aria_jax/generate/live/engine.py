"""The compiled programs of live sessions, and the keys and values that belong to each.

Everything is compiled when the engine is made (`warm`): a program that is called with other shapes
is an error, not a pause in the music. Sessions have a row each. Rows are stepped together in one
program whose shape never changes, so that what a row draws does not depend on its neighbours.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.generate.cache import LayerCache, decode_rows, empty_cache, extend_cache
from aria_jax.generate.grammar import Grammar, GrammarState, make_grammar, state_after
from aria_jax.generate.sampler import draw_min_p
from aria_jax.generate.weights import DecoderWeights
from aria_jax.models.transformer import row_table
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import AriaTokenizer, Tokenizer, of_aria
from data_pipeline.vocabulary import SEGMENT_MS, Kind

CHUNKS = (16, 128)
"""Ids read at a time: what a player plays in a second or two, and what must be caught up on."""
STEPS = 24
"""Most tokens that one call generates: eight notes."""
MAX_SLOTS = 2048
"""Of a session's context, where the model would see more: memory is per player."""
MIN_SLOTS = 512
MAX_EMPTY = 1
"""`<T>` in a row that a model may play: a partner that is silent for longer seems broken."""
Cache = tuple[LayerCache, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a player may change at any time.

    Attributes:
        temperature, min_p: of the sampler.
        density: above 0 more notes, below fewer; see `Controls`.
        length_ms: of an answer; 0 plays on until it is taken over.
        silence_ms: a player silent for so long hands over; 0 never.
    """

    temperature: float = 0.98
    min_p: float = 0.035
    density: float = 0.0
    length_ms: int = 0
    silence_ms: int = 0

    def changed(self, event: Mapping[str, Any]) -> "Settings":
        """With the fields that the event names.

        Raises:
            UserError: one is out of range.
        """
        changed = {name: event[name] for name in _LIMITS if name in event}
        for name, value in changed.items():
            low, high = _LIMITS[name]
            if not low <= value <= high:
                raise UserError(f"{name} {value} must lie in {low}..{high}")
        return dataclasses.replace(self, **changed)


_LIMITS = {
    "temperature": (0.1, 2.0), "min_p": (0.0, 1.0), "density": (-10.0, 10.0),
    "length_ms": (0, 600_000), "silence_ms": (0, 60_000),
}  # fmt: skip


@flax.struct.dataclass
class Controls:
    """The settings that the sampler reads, a value for each row.

    Attributes:
        temperature_R, min_p_R: float32, as of `MinP`.
        density_R: float32, per second; the probability of an onset is multiplied by
            exp(-density × seconds until it): above 0 more notes come, below fewer.
        seed_Rx3: uint32; seed of the session, number of the turn, number of the take.
    """

    temperature_R: jax.Array
    min_p_R: jax.Array
    density_R: jax.Array
    seed_Rx3: jax.Array


@flax.struct.dataclass
class Words:
    """The part of the vocabulary that a duet is played with, W ids: drawing from few is faster.

    Attributes:
        grammar: its tables and tokens are of the W words.
        embedding_row_W: int32, as of `token_rows`.
    """

    grammar: Grammar
    embedding_row_W: jax.Array


@flax.struct.dataclass
class _Rows:
    """What the loop changes; a value for each row.

    Attributes:
        n_R: tokens of this turn so far, int32; with the seed they decide what is drawn.
        filled_R: tokens in the cache, int32.
        words_RxG: generated in this call.
        logits: of the next token, float32 [rows of the embedding], a row each.
        caches: a row each.
    """

    n_R: jax.Array
    filled_R: jax.Array
    words_RxG: jax.Array
    logits: tuple[jax.Array, ...]
    caches: tuple[Cache, ...]
    grammar: GrammarState


def _tilted(
    logits_RxW: jax.Array, grammar: Grammar, onset_R: jax.Array, density_R: jax.Array
) -> jax.Array:
    """Logits with waiting made less likely, or more; `<T>` waits for the end of the segment."""
    is_onset_W = grammar.onset_V <= grammar.max_onset_ms
    is_time_W = jnp.arange(len(is_onset_W)) == grammar.time_id
    until_W = jnp.where(is_time_W, SEGMENT_MS, grammar.onset_V)
    wait_RxW = jnp.where(is_onset_W | is_time_W, until_W - onset_R[:, None], 0)
    return logits_RxW - density_R[:, None] * wait_RxW / 1000


def _keys(seed_Rx3: jax.Array, n_R: jax.Array) -> jax.Array:
    def key(seed_3: jax.Array, n: jax.Array) -> jax.Array:
        base = jax.random.key(seed_3[0])
        for number in (seed_3[1], seed_3[2], n):
            base = jax.random.fold_in(base, number)
        return base

    return jax.vmap(key)(seed_Rx3, n_R)


def _generate(
    weights: DecoderWeights, rows: _Rows, words: Words, controls: Controls, stop_R: jax.Array
) -> _Rows:
    """Tokens of every row up to `stop_R`, at most `STEPS` of each."""
    first_R, grammar = rows.n_R, words.grammar

    def step(rows: _Rows) -> _Rows:
        active_R = rows.n_R < stop_R
        logits_RxW = jnp.stack(rows.logits)[:, words.embedding_row_W]
        logits_RxW = _tilted(logits_RxW, grammar, rows.grammar.onset_B, controls.density_R)
        allowed_RxW = grammar.allowed(rows.grammar, SEGMENT_MS)
        short_R = rows.grammar.silence_B <= MAX_EMPTY
        allowed_RxW = allowed_RxW.at[:, grammar.time_id].min(short_R)
        word_R = draw_min_p(
            jnp.where(allowed_RxW, logits_RxW, -jnp.inf),
            _keys(controls.seed_Rx3, rows.n_R),
            controls.temperature_R,
            controls.min_p_R,
        )
        row_R = words.embedding_row_W[word_R]
        new_logits, caches = decode_rows(weights, rows.caches, row_R, rows.filled_R, active_R)
        here_RxG = jnp.arange(STEPS) == (rows.n_R - first_R)[:, None]
        return _Rows(
            n_R=rows.n_R + active_R,
            filled_R=rows.filled_R + active_R,
            words_RxG=jnp.where(here_RxG & active_R[:, None], word_R[:, None], rows.words_RxG),
            logits=tuple(
                jnp.where(active_R[row], new_logits[row], old)
                for row, old in enumerate(rows.logits)
            ),
            caches=caches,
            grammar=jax.tree.map(
                lambda new, old: jnp.where(active_R.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                grammar.advance(rows.grammar, word_R),
                rows.grammar,
            ),
        )

    return jax.lax.while_loop(lambda rows: (rows.n_R < stop_R).any(), step, rows)


def duet_words(tokenizer: AriaTokenizer, weights: DecoderWeights) -> tuple[np.ndarray, Words]:
    """The ids of the words, int64 [W], and the words.

    `<E>` and `<D>` are not among them: whoever plays on decides when it ends.
    """
    row_V, known_V = row_table(weights.config)
    whole = make_grammar(tokenizer, opening(tokenizer))
    kind, allowed_V = tokenizer.kind, np.asarray(whole.allowed_SxV).any(0)
    wanted = np.isin(kind, (Kind.NOTE, Kind.ONSET, Kind.DUR, Kind.PEDAL, Kind.TIME))
    ids_W = np.flatnonzero(wanted & allowed_V & known_V)
    if not {Kind.NOTE, Kind.ONSET, Kind.DUR} <= set(kind[ids_W].tolist()):
        raise UserError("this model knows no piano notes, so nothing could be played with it")
    grammar = dataclasses.replace(
        whole,
        allowed_SxV=whole.allowed_SxV[:, ids_W],
        onset_V=whole.onset_V[ids_W],
        begins_V=whole.begins_V[ids_W],
        next_V=whole.next_V[ids_W],
        key_V=whole.key_V[ids_W],
        time_id=int(np.searchsorted(ids_W, tokenizer.time_id)),
        dim_id=len(ids_W),
    )
    return ids_W, Words(grammar, jnp.asarray(row_V[ids_W]))


def opening(tokenizer: AriaTokenizer) -> np.ndarray:
    """The ids that every session begins with, int64."""
    return np.array([tokenizer.id_of(("prefix", "instrument", "piano")), tokenizer.bos_id])


def _host(values: Any, dtype: Any) -> Any:
    """An argument of a compiled program: a NumPy array needs no program of its own to be made."""
    return np.asarray(values, dtype)


@dataclass
class Row:
    """What a session has on the device, and how its next tokens are drawn.

    Attributes:
        cache: keys and values of its context.
        logits: of what follows what was last read; None before.
        grammar: of one row.
        controls: of one row.
        n, filled: see `_Rows`.
        stop: `n` to play to in the next call; not above `n` for a row that waits.
    """

    cache: Cache
    logits: Any = None
    grammar: GrammarState | None = None
    controls: Controls | None = None
    n: int = 0
    filled: int = 0
    stop: int = 0

    def set_controls(self, settings: Settings, seed: tuple[int, int, int]) -> None:
        """From now on the row is drawn so; see `Controls`."""
        self.controls = Controls(
            temperature_R=_host([settings.temperature], np.float32),
            min_p_R=_host([settings.min_p], np.float32),
            density_R=_host([settings.density], np.float32),
            seed_Rx3=_host([seed], np.uint32),
        )


def _not_warm(*args: Any) -> _Rows:
    raise RuntimeError("an engine is warmed before it plays")


class Engine:
    """A model ready to play with several people at once; to be used by one thread at a time.

    Args:
        weights: of a language model that knows piano notes.
        players: most sessions at once.
        width: rows that are stepped in one call. What is drawn depends on it in the last bits, so
            that a recording is replayed with the width it was made with.
        slots: tokens of a session's context; by default what the model sees, at most `MAX_SLOTS`.

    Raises:
        UserError: a model without piano notes, or with too short a context.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        tokenizer: Tokenizer,
        *,
        players: int = 1,
        width: int = 1,
        slots: int | None = None,
    ) -> None:
        self.weights, self.tokenizer = weights, of_aria(tokenizer, "a duet")
        self.slots = min(slots or MAX_SLOTS, weights.max_seq_len)
        if self.slots < MIN_SLOTS:
            raise UserError(
                f"this model sees {self.slots} tokens at once; a duet needs at least {MIN_SLOTS}"
            )
        self.width = max(1, min(width, players))
        self._ids_W, self._words = duet_words(self.tokenizer, weights)
        n_rows = -(-players // self.width) * self.width
        self.rows = [self._idle_row() for _ in range(n_rows)]
        self._free = list(range(players))
        self._extend: dict[int, Callable] = {}
        self._play: Callable[..., _Rows] = _not_warm

    @property
    def bytes_per_session(self) -> int:
        """A cache, and a second one while the oldest bars are dropped."""
        return 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(self.rows[0].cache))

    def _idle_row(self) -> Row:
        n_logits = self.weights.head.rows_OxI.shape[0]
        idle = Row(self.new_cache(), jnp.zeros(n_logits, jnp.float32))
        self.begin_turn(idle, opening(self.tokenizer), 0)
        idle.set_controls(Settings(), (0, 0, 0))
        return idle

    def new_cache(self) -> Cache:
        """Of one row; a chunk may reach past the last slot."""
        return empty_cache(self.weights, 1, self.slots + CHUNKS[-1])

    def take_row(self) -> Row | None:
        """A row for a session; None where all are taken."""
        return self.rows[self._free.pop(0)] if self._free else None

    def give_back(self, row: Row) -> None:
        """The row of a session that has ended."""
        row.n = row.stop = 0
        self._free.append(next(i for i, mine in enumerate(self.rows) if mine is row))

    # --- programs ---

    def warm(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles and runs everything once, so that nothing is compiled afterwards."""
        total = len(CHUNKS) + 1
        for done, size in enumerate(CHUNKS):
            progress(done, total)
            ids = np.zeros(size, np.int32)
            program = jax.jit(extend_cache, donate_argnames=("cache",))
            args = (self.weights, self.new_cache(), ids, np.int32(0), np.int32(1))
            self._extend[size] = program.lower(*args).compile()
        progress(total - 1, total)
        program = jax.jit(_generate, donate_argnames=("rows",))
        self._play = program.lower(*self._arguments(self.rows[: self.width])).compile()
        for row in self.rows:
            row.logits, row.cache = self.read(row.cache, opening(self.tokenizer), 0, CHUNKS[0])
            row.filled, row.stop = 2, 1
        self.play(self.rows)
        for row in self.rows:
            row.n = row.stop = 0
        progress(total, total)

    def read(self, cache: Cache, ids: np.ndarray, start: int, size: int) -> tuple[jax.Array, Cache]:
        """Reads at most `size` ids at positions from `start` on; `cache` is gone afterwards.

        Args:
            size: one of `CHUNKS`.
        """
        padded = np.zeros(size, np.int32)
        padded[: len(ids)] = ids
        n, at = np.int32(len(ids)), np.int32(start)
        logits, cache = self._extend[size](self.weights, cache, padded, at, n)
        # Not queued: what is most urgent next is decided when this is done.
        return logits.block_until_ready(), cache

    def begin_turn(self, row: Row, ids: np.ndarray, earliest_ms: int) -> None:
        """The grammar's state behind `ids`, where no onset may come before `earliest_ms` of the
        segment that they end in."""
        state = jax.tree.map(np.asarray, state_after(self.tokenizer, ids, 1))
        row.grammar = state.replace(onset_B=np.maximum(state.onset_B, np.int32(earliest_ms)))

    def play(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """New ids of each row, from `n` up to `stop`; rows of one group go together in one call."""
        asked = {id(row): row for row in rows if row.stop > row.n}
        new = {id(row): np.zeros(0, np.int64) for row in rows}
        for first in range(0, len(self.rows), self.width):
            group = self.rows[first : first + self.width]
            if not any(id(row) in asked for row in group):
                continue
            began = [row.n for row in group]
            for row in group:
                row.stop = min(row.stop, row.n + STEPS) if id(row) in asked else row.n
            after = self._play(*self._arguments(group))
            words_RxG, n_R = np.asarray(after.words_RxG), np.asarray(after.n_R)
            grammar = jax.tree.map(np.asarray, after.grammar)
            for i, row in enumerate(group):
                row.cache, row.logits = after.caches[i], after.logits[i]
                row.filled += int(n_R[i]) - row.n
                row.n = int(n_R[i])
                row.grammar = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], grammar)
                if id(row) in new:
                    new[id(row)] = self._ids_W[words_RxG[i, : row.n - began[i]]]
        return [new[id(row)] for row in rows]

    def _arguments(self, group: Sequence[Row]) -> tuple:
        def stacked(values: Sequence[Any]) -> Any:
            return jax.tree.map(lambda *leaves: np.concatenate(leaves), *values)

        last = self.slots + CHUNKS[-1] - 1
        rows = _Rows(
            n_R=_host([row.n for row in group], np.int32),
            # A row that waits is written to as well: where nothing is kept.
            filled_R=_host([r.filled if r.stop > r.n else last for r in group], np.int32),
            words_RxG=_host([[0] * STEPS for _ in group], np.int32),
            logits=tuple(row.logits for row in group),
            caches=tuple(row.cache for row in group),
            grammar=stacked([row.grammar for row in group]),
        )
        controls = stacked([row.controls for row in group])
        stop_R = np.array([row.stop for row in group], np.int32)
        return self.weights, rows, self._words, controls, stop_R
