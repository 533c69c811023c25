"""Series of events as tokens: anything that happens on named channels over time.

An event is one token, (channel, value); a token before it says how long after the last event that
was, where time has passed. Values and waits are written as the nearest of a list, which is declared
or learnt from the data: a vocabulary that belongs to a corpus, so that its preset holds all of it:

    events:{"channels": [["TP53", "", [0.0, 1.0]], …], "waits": [0.5, 1.0, …]}

Each wait is measured from where the event before it comes out, so that errors do not add up: no
event is off by more than half a step of the longest wait, however long the series. Times are in
seconds, or in any unit that stands for one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgpack
import numpy as np

from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import Performance
from data_pipeline.settings import AugmentConfig
from data_pipeline.tokenizers.base import COMMON_SPECIAL, Tokenizer
from data_pipeline.vocabulary import Kind

SCHEME = "events"
EVENT = np.dtype([("time", "f8"), ("channel", "i4"), ("value", "f8")])
MAX_IDS = 1 << 16
_MAX_WAITS = 1000  # of the longest wait in a row
_DIGITS = 9  # of a wait: what arithmetic adds to a regular clock is no wait of its own


@dataclass(frozen=True, eq=False)
class Series(Performance):
    """Events where music has notes.

    Attributes:
        notes: `EVENT` [N] sorted by time (stable); channel is a number of `channels`.
        channels: their names.
    """

    channels: tuple[str, ...] = ()

    @cached_property
    def duration_ms(self) -> int:
        """From the first event to the last, a second of time being 1000."""
        times = self.notes["time"]
        return round(float(times[-1] - times[0]) * 1000) if len(times) else 0


def series_bytes(
    times: np.ndarray, channels: Sequence[str], values: np.ndarray, bad: Sequence[str] = ()
) -> bytes:
    """A series as `EventTokenizer.read` takes it.

    Args:
        times, values: float [N], finite; channels: name of each event's.
        bad: what is wrong with rows that are not among them.
    """
    names = sorted(set(channels))
    number = {name: i for i, name in enumerate(names)}
    codes = np.array([number[name] for name in channels], "<i4")
    columns = [np.asarray(times, "<f8").tobytes(), codes.tobytes()]
    return msgpack.packb([names, *columns, np.asarray(values, "<f8").tobytes(), list(bad)])


def read_series(data: bytes) -> tuple[Series, list[str]]:
    """Inverse of `series_bytes`: the series, and what is wrong with rows that were left out."""
    try:
        names, times, codes, values, bad = msgpack.unpackb(data)
        events = np.zeros(len(times) // 8, EVENT)
        for column, raw, kind in (
            ("time", times, "<f8"),
            ("channel", codes, "<i4"),
            ("value", values, "<f8"),
        ):
            events[column] = np.frombuffer(raw, kind)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidMidi("no-series", f"not the bytes of a series ({error})") from error
    order = np.argsort(events["time"], kind="stable")
    return Series(1, events[order], channels=tuple(names)), bad


@dataclass(frozen=True)
class Channel:
    """Attributes: name; group: channels that may stand for each other, "" for none; values:
    ascending, what its events are written as.
    """

    name: str
    group: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class EventTokenizer(Tokenizer):
    """Tokens of event series.

    Attributes:
        channels: sorted by name.
        waits: ascending, positive.
    """

    channels: tuple[Channel, ...]
    waits: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.channels:
            raise UserError("a vocabulary of events needs channels, and there are no events")
        lists = {"waits": self.waits, **{f"values of {c.name}": c.values for c in self.channels}}
        for name, numbers in lists.items():
            array = np.array(numbers, float)
            ascending = np.isfinite(array).all() and (np.diff(array) > 0).all()
            if not len(array) or not ascending or (name == "waits" and array[0] <= 0):
                raise UserError(
                    f"{name} must be numbers in ascending order, waits above 0; not {list(numbers)}"
                )

    augmentations = frozenset(("tempo", "jitter", "channel_dropout", "channel_permutation"))
    first_wait_id = len(COMMON_SPECIAL)
    slices_tokens = True

    @staticmethod
    def from_preset(name: str) -> "EventTokenizer":
        """The tokenizer that a preset holds; UserError where it holds none."""
        try:
            held = json.loads(name.partition(":")[2])
            channels = tuple(Channel(n, g, tuple(map(float, v))) for n, g, v in held["channels"])
            return EventTokenizer(channels, tuple(map(float, held["waits"])))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"tokenizer {SCHEME} has a vocabulary of its own for every corpus: `aria-jax data "
                f"build SERIES.parquet OUT --tokenizer {SCHEME}` makes one"
            ) from error

    @cached_property
    def preset_name(self) -> str:  # type: ignore[override]
        """The whole vocabulary as text, from which `Tokenizer.preset` makes it again."""
        channels = [[c.name, c.group, list(c.values)] for c in self.channels]
        return f"{SCHEME}:" + json.dumps({"channels": channels, "waits": list(self.waits)})

    @cached_property
    def tokens(self) -> tuple:
        """See `Tokenizer.tokens`."""
        values = ((channel.name, value) for channel in self.channels for value in channel.values)
        return (*COMMON_SPECIAL, *(("wait", wait) for wait in self.waits), *values)

    @cached_property
    def kind(self) -> np.ndarray:
        """See `Tokenizer.kind`: an event is a NOTE."""
        kind = np.full(self.vocab_size, Kind.NOTE, np.uint8)
        kind[: self.first_wait_id + len(self.waits)] = Kind.TIME
        kind[: self.first_wait_id] = Kind.SPECIAL
        return kind

    @cached_property
    def _first_ids(self) -> np.ndarray:
        """Of each channel the id of its least value; of one more, the number of ids; int64."""
        sizes = [len(channel.values) for channel in self.channels]
        return self.first_wait_id + len(self.waits) + np.cumsum([0, *sizes])

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {channel.name: i for i, channel in enumerate(self.channels)}

    def read(self, data: bytes, *, compat: str | None = None, repair: bool = False) -> Performance:
        """See `Tokenizer.read`: of `series_bytes`.

        Raises:
            InvalidMidi: rows that cannot be read, or of a channel without tokens; with `repair`
                they are left out.
        """
        del compat
        series, bad = read_series(data)
        known = np.array([name in self._number_of for name in series.channels], bool)
        named = known[series.notes["channel"]]
        if not named.all():
            unknown = sorted(np.array(series.channels)[~known].tolist())
            bad = [*bad, f"{int((~named).sum())} of channel {', '.join(unknown)}, without tokens"]
        if bad and not repair:
            raise InvalidMidi("bad-rows", f"{'; '.join(bad)} (--repair leaves such rows out)")
        events = series.notes[named]
        return Series(1, events, channels=series.channels, repaired="; ".join(bad))

    def content_hash(self, performance: Performance) -> str:
        """See `Tokenizer.content_hash`: of channels, values and times from the first event."""
        performance = _series(performance)
        events = performance.notes
        names = [performance.channels[i] for i in events["channel"].tolist()]
        sha = hashlib.sha256(json.dumps(names).encode())
        sha.update((events["time"] - events["time"][:1]).tobytes() + events["value"].tobytes())
        return sha.hexdigest()

    def with_tokens(self, performance: Performance) -> Performance:
        """See `Tokenizer.with_tokens`."""
        if not len(_series(performance).notes):
            raise InvalidMidi("no-events", "no events")
        return performance

    def encode(
        self,
        performance: Performance,
        *,
        labels: Mapping[str, str] | None = None,
        add_eos: bool = True,
    ) -> np.ndarray:
        """See `Tokenizer.encode`: of a `Series`; there are no tokens for labels.

        Raises:
            UserError: music.
            InvalidMidi: no events, or a gap of over a thousand times the longest wait.
        """
        del labels
        events = self.with_tokens(performance).notes
        body: list[int] = []
        clock, waits = float(events["time"][0]), self.waits
        rows = zip(events["time"].tolist(), self._event_ids(performance).tolist(), strict=True)
        for time, event in rows:
            gap = time - clock
            if gap > _MAX_WAITS * waits[-1]:
                raise InvalidMidi("long-gap", f"{gap:g} pass without an event, where {waits[-1]:g} "
                                  "is the longest wait that has a token")  # fmt: skip
            while gap > waits[0] / 2:
                step = len(waits) - 1 if gap > waits[-1] else int(self.nearest_waits(gap))
                body.append(self.first_wait_id + step)
                clock += waits[step]
                gap = time - clock if gap > waits[-1] else 0.0
            body.append(event)
        ending = [self.eos_id] if add_eos else []
        return np.array([self.bos_id, *body, *ending], np.uint16)

    def nearest_waits(self, gaps: np.ndarray | float) -> np.ndarray:
        """Number of the wait that is nearest in the logarithm, int64 as `gaps`."""
        return np.searchsorted(self._between_waits, gaps)

    @cached_property
    def _between_waits(self) -> np.ndarray:
        return np.sqrt(np.multiply(self.waits[:-1], self.waits[1:]))

    def _event_ids(self, performance: Performance) -> np.ndarray:
        """The token of each event, int64 [N]."""
        series = _series(performance)
        out = np.zeros(len(series.notes), np.int64)
        for number in np.unique(series.notes["channel"]).tolist():
            here = series.notes["channel"] == number
            own = self._number_of.get(series.channels[number])
            if own is None:
                raise InvalidMidi("bad-rows", f"channel {series.channels[number]} has no tokens")
            nearest = nearest_of(series.notes["value"][here], self.channels[own].values)
            out[here] = self._first_ids[own] + nearest
        return out

    def decode(self, ids: np.ndarray) -> Series:
        """See `Tokenizer.decode`: a `Series` whose first event, or wait, is at 0."""
        ids = self.check_ids(ids)
        at = np.flatnonzero(self.kind[ids] == Kind.NOTE)
        events = np.zeros(len(at), EVENT)
        events["time"] = self._times(ids)[at]
        events["channel"] = np.searchsorted(self._first_ids, ids[at], side="right") - 1
        values = np.concatenate([[0.0], *(channel.values for channel in self.channels)])[1:]
        events["value"] = values[ids[at] - self._first_ids[0]]
        return Series(1, events, channels=tuple(channel.name for channel in self.channels))

    def _times(self, ids: np.ndarray) -> np.ndarray:
        is_wait = self.kind[ids] == Kind.TIME
        waits = np.array(self.waits)
        return np.cumsum(np.where(is_wait, waits[(ids - self.first_wait_id) * is_wait], 0.0))

    def events(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.events`."""
        ids = np.asarray(ids, np.int64)
        at = np.flatnonzero(self.kind[ids] == Kind.NOTE)
        return at, np.rint(self._times(ids)[at] * 1000).astype(np.int64)

    def slice_ids(self, ids: np.ndarray, note_at: np.ndarray, start: int, stop: int) -> np.ndarray:
        """See `Tokenizer.slice_ids`."""
        part = note_at[start:stop]
        body = ids[part[0] : part[-1] + 1] if len(part) else ids[:0]
        return np.concatenate([[self.bos_id], body, [self.eos_id]]).astype(np.uint16)

    def start(self, instrument: str = "piano") -> np.ndarray:
        """Raises UserError: nothing is generated of series."""
        raise UserError(f"tokenizer {SCHEME}: what is generated is music, these are event series")

    def _part_augmented(
        self, ids: np.ndarray, config: AugmentConfig, rng: np.random.Generator
    ) -> np.ndarray:
        """All gaps by one factor (tempo), each by one of its own (jitter); some channels left out;
        those of a group in each other's place, each value the nearest one.
        """
        series = self.decode(ids)
        events = series.notes
        if not len(events):
            return ids
        gaps = np.diff(events["time"], prepend=events["time"][0])
        gaps *= rng.uniform(1 - config.tempo, 1 + config.tempo)
        gaps *= rng.uniform(1 - config.jitter, 1 + config.jitter, len(gaps))
        events["time"] = np.cumsum(gaps)
        kept = rng.random(len(self.channels)) >= config.channel_dropout
        left = kept[events["channel"]]
        if config.channel_permutation:
            events["channel"] = self._permutation(rng)[events["channel"]]
        events = events[left] if left.any() else events
        changed = self.encode(
            Series(1, events, channels=series.channels), add_eos=bool(ids[-1] == self.eos_id)
        )
        return changed if ids[0] == self.bos_id else changed[1:]

    def _permutation(self, rng: np.random.Generator) -> np.ndarray:
        """The channel in whose place each one comes, int64."""
        out = np.arange(len(self.channels))
        groups = np.array([channel.group for channel in self.channels])
        for group in sorted(set(groups.tolist()) - {""}):
            members = np.flatnonzero(groups == group)
            out[members] = rng.permutation(members)
        return out


def _series(performance: Performance) -> Series:
    if isinstance(performance, Series):
        return performance
    raise UserError(
        f"tokenizer {SCHEME} takes series of events (a Parquet of series, time, channel, value), "
        "not music"
    )


def nearest_of(values: np.ndarray, known: Sequence[float]) -> np.ndarray:
    """Number of the nearest of `known` (ascending), int64 as long as `values`."""
    middle = (np.array(known[:-1]) + np.array(known[1:])) / 2
    return np.searchsorted(middle, values)
