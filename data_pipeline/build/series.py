"""Parquet files that hold no MIDI as a source: scores with their performances, and event series,
(series, time, channel, value), with the vocabulary that is learnt of them.

    series    text or a whole number: which series an event belongs to
    time      a number, or a date (then in seconds): rows may stand in any order
    channel   text or a whole number: on which channel it happens
    value     a number or a boolean

All other columns of text, whole numbers and booleans are labels of the series, the same in all of
its rows. Nothing of a file stops a build: a series with rows that cannot be read is rejected by
name, and with `repair` taken without them.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from data_pipeline import storage
from data_pipeline.build.sources import Row, is_parquet, parquet_files, walk_folder
from data_pipeline.errors import UserError, check_file
from data_pipeline.settings import Range, problems_of
from data_pipeline.shards import MANIFEST, load_manifest
from data_pipeline.tokenizers import render
from data_pipeline.tokenizers.events import (
    MAX_IDS,
    SCHEME,
    Channel,
    EventTokenizer,
    nearest_of,
    read_series,
    series_bytes,
)
from data_pipeline.tokenizers.render import pair_bytes

COLUMNS = ("series", "time", "channel", "value")
PAIRS = render.COLUMNS
TABLES = {SCHEME: COLUMNS, render.SCHEME: PAIRS}
"""Columns of Parquet files that are no MIDI, by the tokenizer that they are for."""
_CALLED = {SCHEME: "event series", render.SCHEME: "scores with performances"}
_DIGITS = 9  # of a wait: what arithmetic adds to a regular clock is no wait of its own
_NAMED_ROWS = 5


def table_scheme(file: Path) -> str:
    """The tokenizer that a Parquet file's columns are for: "events", "render" or, of any other
    file, "".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as stream:
            names = set(pq.read_schema(stream).names)
    except (pa.ArrowException, OSError):
        return ""
    return next((scheme for scheme, columns in TABLES.items() if names >= set(columns)), "")


def read_pairs(file: Path) -> Iterator[Row]:
    """Scores with their performances, a row each; see `tokenizers.render`. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as stream:
            table = pq.ParquetFile(stream)
            labels = [f.name for f in table.schema_arrow if pa.types.is_string(f.type)]
            for batch in table.iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    known = {name: row[name] for name in labels if name != "path"}
                    missing = [name for name in PAIRS if row[name] is None or None in row[name]]
                    data = None if missing else pair_bytes(row)
                    why = f"no number in {', '.join(missing)}" if missing else ""
                    yield Row(str(row.get("path") or ""), data, known, "bad-pairs", why)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not readable as score and performance ({text})") from error


def read_rows(file: Path) -> Iterator[Row]:
    """The series of a file by name; all of it is held in memory.

    Raises:
        UserError: not readable, or a column of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as stream:
            table = pq.read_table(stream)
        yield from _rows_of(table, file)
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a readable Parquet file ({text})") from error


def _rows_of(table: Any, file: Path) -> Iterator[Row]:
    columns = {name: table.column(name) for name in COLUMNS}
    names, series = _codes(columns["series"], file, "series")
    channels, channel = _codes(columns["channel"], file, "channel")
    times, values = (_numbers(columns[name], file, name) for name in ("time", "value"))
    labels = {
        name: _codes(table.column(name), file, name)
        for name in table.column_names
        if name not in COLUMNS and _is_label(table.schema.field(name).type)
    }
    wrong = {
        "no channel": channel < 0,
        "no finite time": ~np.isfinite(times),
        "no finite value": ~np.isfinite(values),
    }
    is_bad = np.any([*wrong.values()], axis=0)
    order = np.argsort(series, kind="stable")
    ends = np.searchsorted(series[order], np.arange(-1, len(names)), side="right")
    if ends[0]:
        lost = order[: ends[0]]
        yield Row("", None, {}, "no-series", f"{_listed(lost)} of {file.name}")
    for number, rows in enumerate(np.split(order, ends)[1:-1]):
        own: dict[str, Any] = {}
        differ = []
        for label, (words, codes) in labels.items():
            found = np.unique(codes[rows])
            found = found[found >= 0]
            own |= {label: words[found[0]]} if len(found) == 1 else {}
            if len(found) > 1:
                differ.append(f"{label} is {words[found[0]]} and {words[found[1]]}")
        if differ:
            yield Row(names[number], None, {}, "labels-differ", "; ".join(differ))
            continue
        good = rows[~is_bad[rows]]
        bad = [
            f"{what}: {_listed(at)}" for what, mask in wrong.items() if len(at := rows[mask[rows]])
        ]
        named = [channels[code] for code in channel[good].tolist()]
        yield Row(names[number], series_bytes(times[good], named, values[good], bad), own)


def _listed(rows: np.ndarray) -> str:
    """Numbers of rows for people, the first being 0."""
    named = ", ".join(map(str, rows[:_NAMED_ROWS].tolist()))
    more = f" and {len(rows) - _NAMED_ROWS:,} more" if len(rows) > _NAMED_ROWS else ""
    return f"row{'s' * (len(rows) > 1)} {named}{more}"


def _codes(column: Any, file: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Distinct words of a column in order, and the number of each row's, -1 for none; int64."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if not _is_label(column.type):
        raise UserError(
            f"{file}: column {name} holds {column.type}; expected text or whole numbers"
        )
    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    coded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.combine_chunks() if coded.num_chunks else pa.array([], pa.string())
    words = coded.dictionary.to_pylist()
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    order = sorted(range(len(words)), key=lambda i: words[i])
    place = np.empty(len(words) + 1, np.int64)
    place[[*order, len(words)]] = [*range(len(words)), -1]
    return [words[i] for i in order], place[codes]


def _numbers(column: Any, file: Path, name: str) -> np.ndarray:
    """float64; NaN where there is nothing."""
    import pyarrow as pa
    import pyarrow.types as kinds

    kind, unit = column.type, 1.0
    if kinds.is_timestamp(kind):
        unit = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[kind.unit]
        column = column.cast(pa.int64())
    elif kinds.is_boolean(kind):
        column = column.cast(pa.int8())
    elif not (kinds.is_integer(kind) or kinds.is_floating(kind)):
        wanted = "numbers or dates" if name == "time" else "numbers or booleans"
        raise UserError(f"{file}: column {name} holds {kind}; expected {wanted}")
    filled = column.cast(pa.float64(), safe=False).to_numpy()
    return np.asarray(filled, np.float64) * unit


def _is_label(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    text = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    return any(test(kind) for test in (*text, kinds.is_integer, kinds.is_boolean))


# --- the vocabulary ------------------------------------------------------------------------------


def settle(
    preset: str, source: Path, *, filters: str | Path, others: Mapping[str, bool]
) -> tuple[str, str | Path, dict[str, float | str] | None]:
    """What a build of `source` takes for its preset: that of event series with its vocabulary.

    Args:
        preset: a scheme of music, "render", "events", "events:FILE.json" (see `declared`) or
            "events:DATA", the vocabulary of another corpus.
        filters: as asked for; series have none.
        others: what was asked for of MIDI files only, by name of the option.

    Returns:
        preset, filters, and of series what a round trip loses, see `learn`.

    Raises:
        UserError: the scheme is not for what is there, or something was asked for that is not for
            it; those of `learn`.
    """
    scheme, (found, files) = preset.partition(":")[0], _tables(source)
    if scheme not in TABLES:
        if found:
            raise UserError(f"{source}: {_CALLED[found]} are here; add --tokenizer {found}")
        return preset, filters, None
    if scheme != found:
        raise UserError(
            f"{source}: --tokenizer {scheme} takes a Parquet file, or a folder of them, with "
            f"columns {', '.join(TABLES[scheme])}"
        )
    asked = {**others}
    if scheme == SCHEME:
        asked["filters"] = str(filters) not in ("light", "none")
    if unused := [name for name, given in asked.items() if given]:
        raise UserError(f"cannot build: {', '.join(unused)} is not for {_CALLED[scheme]}")
    if scheme != SCHEME:
        return preset, filters, None
    rows = (row for file in files for row in read_rows(file))
    tokenizer, loss = learn((row.data for row in rows if row.data is not None), preset)
    return tokenizer.preset_name, "none", loss


def check_source(preset: str, source: Path) -> None:
    """Raises `UserError` where a source is not of what a model's tokens are of."""
    scheme, found = preset.partition(":")[0], _tables(source)[0]
    if found != (scheme if scheme in TABLES else ""):
        here, wanted = (_CALLED.get(name, "music") for name in (found, scheme))
        raise UserError(f"{source}: {here} here, and the model's tokens are of {wanted}")


def _tables(source: Path) -> tuple[str, list[Path]]:
    """Which of `TABLES` a source is or holds, and its files; "" where it is none."""
    if source.is_dir():
        files = parquet_files(source) if next(walk_folder(source), None) is None else []
    else:
        files = [source] if source.is_file() and is_parquet(source) else []
    schemes = {table_scheme(file) for file in files}
    return (schemes.pop(), files) if len(schemes) == 1 else ("", [])


def learn(
    series: Iterable[bytes], preset: str = SCHEME
) -> tuple[EventTokenizer, dict[str, float | str]]:
    """The tokenizer of a corpus: as far as it is declared, and of the data where it is not.

    A channel with few values has a token for each, one with many for as many quantiles of them;
    the same of waits, which are spread evenly in the logarithm.

    Args:
        series: the corpus, `series_bytes` each.
        preset: "events", or "events:FILE.json", see `declared`.

    Returns:
        It, and what a round trip loses: "value_mean" and "value_max" as shares of the range of
        their channel, "worst_channel" and its "worst_mean", "wait_mean" and "wait_max" as shares
        of the wait.

    Raises:
        UserError: a file that cannot be read, no events, more ids than there may be.
    """
    at = preset.partition(":")[2]
    of_corpus = at and (storage.local(at) / MANIFEST).is_file()
    wanted = declared("" if of_corpus else at)
    found: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    between = [np.zeros(0)]
    for one, _ in map(read_series, series):
        for number, name in enumerate(one.channels):
            found[name].append(one.notes["value"][one.notes["channel"] == number])
        between.append(np.diff(one.notes["time"]))
    values, gaps = (
        {name: np.concatenate(own) for name, own in found.items()},
        np.concatenate(between),
    )
    gaps = gaps[gaps > 0]
    channels = [
        replace(own, values=own.values or _levels(values.get(own.name, gaps[:0]), wanted.bins))
        for own in wanted.channels or [Channel(name, "", ()) for name in values]
    ]
    waits = wanted.waits or _waits(gaps, wanted.time_steps)
    if of_corpus:
        tokenizer = EventTokenizer.from_preset(load_manifest(at)["tokenizer"]["preset"])
        return tokenizer, _loss(tokenizer, values, gaps)
    tokenizer = EventTokenizer(tuple(sorted(channels, key=lambda one: one.name)), waits)
    if tokenizer.vocab_size > MAX_IDS:
        raise UserError(
            f"{len(channels):,} channels have {tokenizer.vocab_size:,} tokens, of which there may "
            f"be {MAX_IDS:,}: declare fewer bins ({SCHEME}:FILE.json)"
        )
    return tokenizer, _loss(tokenizer, values, gaps)


def _levels(values: np.ndarray, n: int) -> tuple[float, ...]:
    """The values, if there are `n` at most; else the middles of `n` equal shares of them."""
    distinct = np.unique(values)
    if len(distinct) > n:
        distinct = np.unique(np.quantile(values, (np.arange(n) + 0.5) / n))
    return tuple(distinct.tolist())


def _waits(gaps: np.ndarray, n: int) -> tuple[float, ...]:
    """The gaps, if there are `n` at most; else `n` from a short one to the longest, each as many
    times the one before.
    """
    if not len(gaps):
        return (1.0,)
    scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(gaps)))
    distinct = np.unique(np.rint(gaps * scale) / scale)
    if len(distinct) <= n:
        return tuple(distinct.tolist())
    return tuple(np.unique(np.geomspace(np.quantile(gaps, 0.001), gaps.max(), n)).tolist())


def _loss(
    tokenizer: EventTokenizer, values: Mapping[str, np.ndarray], gaps: np.ndarray
) -> dict[str, float | str]:
    """See `learn`."""
    off = {}
    for channel in tokenizer.channels:
        if len(own := values.get(channel.name, gaps[:0])):
            known = np.array(channel.values)[nearest_of(own, channel.values)]
            off[channel.name] = np.abs(known - own) / (float(np.ptp(own)) or 1.0)
    off = off or {"no channel": np.zeros(1)}
    worst = max(off, key=lambda name: float(off[name].mean()))
    every = np.concatenate([*off.values()])
    waits = np.array(tokenizer.waits)
    inside = gaps[(gaps > waits[0] / 2) & (gaps <= waits[-1])]
    late = np.append(np.abs(waits[tokenizer.nearest_waits(inside)] - inside) / inside, 0.0)
    return {
        "value_mean": float(every.mean()), "value_max": float(every.max()),
        "worst_channel": worst, "worst_mean": float(off[worst].mean()),
        "wait_mean": float(late.sum() / max(len(inside), 1)), "wait_max": float(late.max()),
    }  # fmt: skip


@dataclass(frozen=True)
class _Declared:
    bins: Annotated[int, Range(1, 999)] = 16
    time_steps: Annotated[int, Range(1, 999)] = 32
    waits: tuple[float, ...] = ()
    channels: tuple[Channel, ...] = ()


def declared(path: str) -> _Declared:
    """What a file says of a vocabulary; all of it may be left out, and so may the file:

        {"bins": 16, "time_steps": 32, "waits": [0.1, 1, 10],
         "channels": {"TP53": {"values": [0, 1], "group": "genes"}, "glucose": {}}}

    Where channels are declared, there are no others.

    Raises:
        UserError: no such file, or it says something else.
    """
    if not path:
        return _Declared()
    try:
        said = json.loads(check_file(path, "a vocabulary of events (JSON)").read_text())
        if not isinstance(said, dict):
            raise TypeError("a JSON object is wanted")
        channels = tuple(_channel(name, **own) for name, own in said.pop("channels", {}).items())
        found = _Declared(**{**said, "waits": tuple(said.get("waits", ())), "channels": channels})
        problems = [text for name, text in problems_of(found).items() if name != "channels"]
    except (ValueError, TypeError, AttributeError) as error:
        problems = [str(error)]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; see docs/tokenizers.md")
    return found


def _channel(name: str, *, values: Sequence[float] = (), group: str = "") -> Channel:
    return Channel(name, group, tuple(values))
