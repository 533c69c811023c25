"""An interpolated n-gram over notes, which a language model of music has to beat.

A note is four symbols: the time since the last onset, pitch, velocity, duration. Each is predicted
from the notes before and from the symbols of its own note that precede it, through a list of
features in order of importance (a factored language model, Bilmes and Kirchhoff 2003); an n-gram of
order n looks at the first n - 1 of them. The lists and their quantisation are in `contexts`.

Probabilities are those of absolute discounting (Ney, Essen and Kneser 1994), interpolated over all
orders below:

    p_k(y | f1..fk) = max(c(f1..fk, y) - D_k, 0) / c(f1..fk)
                      + D_k N(f1..fk) / c(f1..fk)  p_k-1(y | f1..fk-1)

with c the counts, N the number of different y seen in a context, D_k = n1 / (n1 + 2 n2) of the
counts of counts, and p_-1 uniform. With continuation counts (Kneser and Ney 1995) c of a lower
order is the number of contexts one longer in which y was seen.

The tokens of a piece and its notes are the same event, each follows from the other: so nats per
note may be compared with those of a model over tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import SEGMENT_MS, STEP_MS, VELOCITY_STEP, Kind

STEPS = SEGMENT_MS // STEP_MS
LONGER, END = STEPS, STEPS + 1
"""Of the time since the last onset: 5 s and more to come; the piece ends."""
MAX_SILENT_STEPS = 12 * STEPS
"""Behind a silence of a minute a piece has ended: cut off at min-p, `LONGER` can be all that may
follow itself, for ever."""
FACTORS = {"time": STEPS + 2, "pitch": 128, "velocity": 13, "duration": STEPS + 1}
"""What is predicted, in order: name -> number of symbols."""
MIN_ORDER, MAX_ORDER = 3, 6
_SYMBOL_BITS = 10
_NONE, _AGAIN = 1023, 1022  # features: there is no such note; behind `LONGER`


@dataclass(frozen=True)
class Notes:
    """Notes in the order of a piece's tokens.

    Attributes:
        step, pitch, velocity, duration: of each note, int64 [N]; steps of 10 ms from the onset
            before (the first: from the piece's beginning), velocity and duration as indices.
    """

    step: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    duration: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    def __add__(self, later: "Notes") -> "Notes":
        """These notes and then others."""
        both = zip(_columns(self), _columns(later), strict=True)
        return Notes(*(np.concatenate(columns) for columns in both))


def notes_of(ids: np.ndarray, tokenizer: Tokenizer) -> Notes:
    """The notes of a piece of solo piano.

    Raises:
        UserError: other instruments, incomplete notes, or notes out of order.
    """
    ids = np.asarray(ids, np.int64)
    at, onset_ms = tokenizer.events(ids)
    kind = tokenizer.kind[ids]
    whole = np.isin(kind, (Kind.NOTE, Kind.DRUM, Kind.PEDAL)).sum() == len(at)
    if not whole or (kind[at] != Kind.NOTE).any() or (tokenizer.instrument[ids[at]] != 0).any():
        raise UserError("the n-gram reads whole notes of solo piano only")
    steps = np.diff(onset_ms // STEP_MS, prepend=0)
    if (steps < 0).any():
        raise UserError("the n-gram reads notes in the order of their onsets only")
    return Notes(
        step=steps,
        pitch=tokenizer.pitch[ids[at]].astype(np.int64),
        velocity=tokenizer.velocity[ids[at]].astype(np.int64) // VELOCITY_STEP,
        duration=tokenizer.dur_ms[ids[at + 2]].astype(np.int64) // STEP_MS,
    )


def ids_of(notes: Notes, header: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """`header` (prefix and `<S>`) and the tokens of notes, int64 [L]; the inverse of `notes_of`."""
    onset = np.cumsum(notes.step)
    segment = onset // STEPS
    n_times = np.diff(segment, prepend=0)
    first = tokenizer.first_note_id
    rows = np.stack(
        [
            first + notes.pitch * 13 + notes.velocity,
            tokenizer.first_onset_id + onset % STEPS,
            tokenizer.first_dur_id + notes.duration,
        ],
        axis=1,
    )
    before = np.repeat(3 * np.arange(len(notes)), n_times)
    body = np.insert(rows.reshape(-1), before, tokenizer.time_id)
    return np.concatenate([header, body]).astype(np.int64)


def _octaves(steps: np.ndarray, per_octave: int) -> np.ndarray:
    """Logarithmic classes of times: 0 for 0, then `per_octave` to a factor of two."""
    return np.where(steps > 0, 1 + np.floor(per_octave * np.log2(np.maximum(steps, 1))), 0).astype(
        np.int64
    )


def _before(values: np.ndarray, n: int) -> np.ndarray:
    """The values n places before, `_NONE` where there are none."""
    return np.concatenate([np.full(min(n, len(values)), _NONE), values[: max(len(values) - n, 0)]])


def contexts(notes: Notes, name: str) -> np.ndarray:
    """Features of one factor, the most telling first, int16 [N, MAX_ORDER - 1]."""
    time, long = _octaves(np.minimum(notes.step, STEPS), 2), _octaves(notes.duration, 2)
    together, height = np.minimum(notes.step, 3), notes.pitch // 6
    pitch, velocity = notes.pitch, notes.velocity
    if name == "time":
        columns = [_before(time, 1), _before(time, 2), _before(time, 3), _before(long, 1),
                   _before(time, 4)]  # fmt: skip
    elif name == "pitch":
        columns = [_before(pitch, 1), together, *(_before(pitch, n) for n in (2, 3, 4))]
    elif name == "velocity":
        columns = [_before(velocity, 1), together, height, *(_before(velocity, n) for n in (2, 3))]
    else:
        columns = [_before(long, 1), time, height, velocity // 2, _before(long, 2)]
    return np.stack(columns, axis=1).astype(np.int16)


def _events_of(notes: Notes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Symbols of one factor, int16 [M], and their features [M, F].

    A time is written as `LONGER` for every 5 s, each with its own first feature, and what is left;
    behind the last note stands `END`.
    """
    if name != "time":
        return getattr(notes, name).astype(np.int16), contexts(notes, name)
    silent = Notes(*(np.append(column, 0) for column in _columns(notes)))
    features, n_longer = contexts(silent, "time"), silent.step // STEPS
    note = np.repeat(np.arange(len(silent)), n_longer + 1)
    y = np.full(len(note), LONGER, np.int16)
    y[np.cumsum(n_longer + 1) - 1] = np.append(notes.step % STEPS, END)
    features = features[note]
    features[np.flatnonzero(np.diff(note) == 0) + 1, 0] = _AGAIN
    return y, features


def events(pieces: Sequence[Notes], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one factor over all pieces: symbols [M], features [M, F] and the piece of each [M]."""
    found = [_events_of(notes, name) for notes in pieces]
    piece = np.repeat(np.arange(len(pieces)), [len(y) for y, _ in found])
    return np.concatenate([y for y, _ in found]), np.concatenate([x for _, x in found]), piece


def _hashes(features_MxF: np.ndarray) -> Iterator[np.ndarray]:
    """Of the first 0, 1, … F features, uint64 [M] with the low bits free for a symbol.

    54 bits tell contexts apart: of 30 million different ones about 0.03 pairs fall together.
    """
    value = np.zeros(len(features_MxF), np.uint64)
    yield value
    for column in features_MxF.T:
        # splitmix64's finaliser (Steele, Lea and Flood 2014)
        value = (value ^ (column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))) * np.uint64(
            0xBF58476D1CE4E5B9
        )
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
        yield value >> np.uint64(_SYMBOL_BITS) << np.uint64(_SYMBOL_BITS)


@dataclass(frozen=True)
class _Level:
    """Counts of one order.

    Attributes:
        pair, count: of context and symbol, sorted; uint64 and float32 [P].
        context, total, left: contexts sorted, their counts, and what of these is left to lower
            orders [C].
        discount: taken from each count.
    """

    pair: np.ndarray
    count: np.ndarray
    context: np.ndarray
    total: np.ndarray
    left: np.ndarray
    discount: float


@dataclass(frozen=True)
class Backoff:
    """p(symbol | features), interpolated over all orders up to that of `levels`.

    Attributes:
        n_symbols: different ones.
        levels: from the one without context on.
    """

    n_symbols: int
    levels: tuple[_Level, ...]

    @classmethod
    def fit(
        cls,
        y_M: np.ndarray,
        features_MxF: np.ndarray,
        n_symbols: int,
        *,
        continuation: bool = False,
        min_count: int = 1,
    ) -> "Backoff":
        """The n-gram of order F + 1; see `fit_orders`."""
        models = fit_orders(y_M, features_MxF, n_symbols, min_count=min_count)
        return models[features_MxF.shape[1] + 1, continuation]

    def nats(self, y_M: np.ndarray, features_MxF: np.ndarray) -> np.ndarray:
        """-ln p of each symbol, float64 [M]."""
        p = np.full(len(y_M), 1 / self.n_symbols)
        symbol = y_M.astype(np.uint64)
        hashes = _hashes(features_MxF[:, : len(self.levels) - 1])
        for level, hashed in zip(self.levels, hashes, strict=True):
            if not len(level.context):  # every pair is rare: all is left to lower orders
                continue
            at = np.minimum(np.searchsorted(level.context, hashed), len(level.context) - 1)
            known = level.context[at] == hashed
            total, left = level.total[at], level.left[at]
            pair = hashed | symbol
            found = np.minimum(np.searchsorted(level.pair, pair), len(level.pair) - 1)
            hit = level.pair[found] == pair
            own = np.where(hit, level.count[found] - level.discount, 0.0) / total
            p = np.where(known, own + left / total * p, p)
        return -np.log(p)

    def distribution(self, features_F: np.ndarray) -> np.ndarray:
        """p of every symbol in one context, float64 [V]."""
        p = np.full(self.n_symbols, 1 / self.n_symbols)
        hashes = _hashes(features_F[None, : len(self.levels) - 1])
        mask = np.uint64((1 << _SYMBOL_BITS) - 1)
        for level, (hashed,) in zip(self.levels, hashes, strict=True):
            at = np.searchsorted(level.context, hashed)
            if at == len(level.context) or level.context[at] != hashed:
                break  # a longer context of one never seen was never seen
            low, high = np.searchsorted(level.pair, (hashed, hashed + mask + np.uint64(1)))
            p = p * (level.left[at] / level.total[at])
            seen = (level.pair[low:high] & mask).astype(np.int64)
            p[seen] += (level.count[low:high] - level.discount) / level.total[at]
        return p


def fit_orders(
    y_M: np.ndarray, features_MxF: np.ndarray, n_symbols: int, *, min_count: int = 1
) -> dict[tuple[int, bool], Backoff]:
    """N-grams of all orders up to F + 1, by (order, whether lower orders count contexts).

    Args:
        min_count: from order 4 on, rarer pairs are left to lower orders.
    """
    symbol = y_M.astype(np.uint64)
    plain: list[_Level] = []
    of_contexts: list[_Level] = []
    models, before = {}, None
    for number, hashed in enumerate(_hashes(features_MxF)):
        pair = hashed | symbol
        if before is not None:
            # One row for each (context one longer, symbol) that occurs.
            rows = np.unique(pair, return_index=True)[1]
            of_contexts.append(_level(before[rows], 1 if number <= 3 else min_count))
        plain.append(_level(pair, 1 if number < 3 else min_count))
        before = pair
        models[number + 1, False] = Backoff(n_symbols, tuple(plain))
        models[number + 1, True] = Backoff(n_symbols, (*of_contexts, plain[-1]))
    return models


def _level(pair_M: np.ndarray, min_count: int) -> _Level:
    """Counts of pairs; of rarer ones than `min_count` all goes to lower orders."""
    pair, count = np.unique(pair_M, return_counts=True)
    once, twice = (count == 1).sum(), (count == 2).sum()
    # Counts of counts say nothing where no count is small (a level of few contexts).
    discount = float(once / (once + 2 * twice)) if once and twice else 0.5
    context, begin = np.unique(pair >> np.uint64(_SYMBOL_BITS), return_index=True)
    kept = count >= min_count
    some = np.add.reduceat(kept, begin) > 0
    return _Level(
        pair=pair[kept],
        count=count[kept].astype(np.float32),
        context=(context << np.uint64(_SYMBOL_BITS))[some],
        total=np.add.reduceat(count, begin).astype(np.float64)[some],
        left=np.add.reduceat(np.where(kept, discount, count), begin)[some],
        discount=discount,
    )


@dataclass(frozen=True)
class NoteNgram:
    """An n-gram of each factor.

    Attributes:
        factors: name -> its probabilities.
        settings: name -> how it was tuned, for people.
    """

    factors: dict[str, Backoff]
    settings: dict[str, str]

    @classmethod
    def fit(
        cls, train: Sequence[Notes], tune: Sequence[Notes], *, min_count: int = 1
    ) -> "NoteNgram":
        """Counts on `train`; order (3 to 6) and kind of counts are those best on `tune`."""
        factors, settings = {}, {}
        n_notes = sum(map(len, tune))
        for name, n_symbols in FACTORS.items():
            models = fit_orders(*events(train, name)[:2], n_symbols, min_count=min_count)
            held_out = events(tune, name)[:2]
            nats = {
                key: float(model.nats(*held_out).sum()) / n_notes
                for key, model in models.items()
                if key[0] >= MIN_ORDER
            }
            order, continuation = min(nats, key=lambda key: nats[key])
            factors[name] = models[order, continuation]
            counts = "continuation counts" if continuation else "plain counts"
            best = nats[order, continuation]
            settings[name] = f"order {order}, {counts}, {best:.3f} nats per note"
        return cls(factors, settings)

    def nats(self, pieces: Sequence[Notes]) -> np.ndarray:
        """-ln p of each piece from its first note to its end, float64 [number of pieces]."""
        total = np.zeros(len(pieces))
        for name, model in self.factors.items():
            y, features, piece = events(pieces, name)
            total += np.bincount(piece, model.nats(y, features), len(pieces))
        return total

    def continue_notes(
        self,
        prompt: Notes,
        n_notes: int,
        rng: np.random.Generator,
        *,
        temperature: float = 1.0,
        min_p: float = 0.0,
    ) -> Notes:
        """`n_notes` drawn notes, fewer where the piece ends, with the sampler of `generate`."""
        columns = [column.tolist() for column in _columns(prompt)]

        def draw(name: str, features_F: np.ndarray) -> int:
            p = self.factors[name].distribution(features_F) ** (1 / temperature)
            p = np.where(p < min_p * p.max(), 0, p)
            return int(rng.choice(len(p), p=p / p.sum()))

        for _ in range(n_notes):
            recent = Notes(*(np.array([*column[-MAX_ORDER:], 0]) for column in columns))
            features = contexts(recent, "time")[-1]
            symbol = draw("time", features)
            while symbol == LONGER and recent.step[-1] < MAX_SILENT_STEPS:
                recent.step[-1] += STEPS
                features[0] = _AGAIN
                symbol = draw("time", features)
            if symbol in (LONGER, END):
                break
            recent.step[-1] += symbol
            for name in ("pitch", "velocity", "duration"):
                getattr(recent, name)[-1] = draw(name, contexts(recent, name)[-1])
            for column, values in zip(columns, _columns(recent), strict=True):
                column.append(int(values[-1]))
        return Notes(*(np.array(column[len(prompt) :], np.int64) for column in columns))


def _columns(notes: Notes) -> tuple[np.ndarray, ...]:
    return notes.step, notes.pitch, notes.velocity, notes.duration
