"""Event series: vocabulary, round trip, augmentation, and a Parquet file that becomes shards."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.embed.pieces import Slicing, open_source
from data_pipeline.build import build
from data_pipeline.build.series import learn, read_rows
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.loaders.slice_batches import contrastive_pairs
from data_pipeline.midi import Performance
from data_pipeline.settings import AugmentConfig
from data_pipeline.shards import TokenShards, load_manifest, rejections
from data_pipeline.tokenizers import Tokenizer, augmentations_left_out
from data_pipeline.tokenizers.events import Channel, EventTokenizer, read_series, series_bytes
from data_pipeline.vocabulary import Kind
from tests.data_pipeline.test_tokenizers import piano

GENES = ("A", "B", "C")
TOKENIZER = EventTokenizer(
    tuple(Channel(name, "genes" if name != "C" else "", (0.0, 1.0)) for name in GENES),
    (0.1, 1.0, 10.0),
)


def switches(seed: int, n: int, scale: float = 1.0) -> bytes:
    """Genes that are switched on and off after exponential waits."""
    rng = np.random.default_rng(seed)
    names = rng.choice(GENES, n).tolist()
    return series_bytes(np.cumsum(rng.exponential(scale, n)), names, rng.integers(0, 2, n))


def series_of(data: bytes):
    return read_series(data)[0]


def table(n_series: int = 12, n: int = 30) -> pa.Table:
    """Series of two regimes, each pair of them of one subject; rows in no order."""
    rng = np.random.default_rng(0)
    rows: dict[str, list] = {
        name: [] for name in ("series", "time", "channel", "value", "regime", "composition")
    }
    for i in range(n_series):
        rows["series"] += [f"runs/{i:02d}"] * n
        rows["time"] += np.cumsum(rng.exponential(1 + i % 2, n)).tolist()
        rows["channel"] += rng.choice(GENES, n).tolist()
        rows["value"] += rng.normal(size=n).tolist()
        rows["regime"] += [("fast", "slow")[i % 2]] * n
        rows["composition"] += [f"subject {i // 2}"] * n
    made = pa.table(rows)
    return made.take(rng.permutation(len(made)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Parquet file of `table`."""
    path = tmp_path_factory.mktemp("series") / "runs.parquet"
    pq.write_table(table(), path)
    return path


@pytest.fixture(scope="module")
def corpus(source):
    """Its shards."""
    out = source.with_name("corpus")
    build(source, out, tokenizer_preset="events", workers=1, val_fraction=0.3)
    return out


# --- round trip ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.sampled_from([0.01, 1.0, 50.0]))
def test_channels_values_and_order_come_back_and_times_do_not_drift(seed, n, scale):
    data = switches(seed, n, scale)
    tokenizer, _ = learn([data])
    before, after = series_of(data), tokenizer.decode(tokenizer.encode(series_of(data)))
    names = [[one.channels[i] for i in one.notes["channel"]] for one in (before, after)]
    assert names[0] == names[1]
    assert (before.notes["value"] == after.notes["value"]).all()
    off = np.abs(before.notes["time"] - before.notes["time"][0] - after.notes["time"])
    # Half a step of the wait that is measured from where the event before came out; where that was
    # late by more, the event comes out at the same time.
    waits = np.array(tokenizer.waits)
    step = np.sqrt((waits[1:] / waits[:-1]).max()) - 1 if len(waits) > 1 else 0
    gaps = np.diff(before.notes["time"], prepend=before.notes["time"][0])
    earlier = np.append(0, off[:-1])
    own = np.maximum(gaps + earlier, waits[0]) * step + waits[0] / 2
    assert (off <= np.maximum(own, earlier) + 1e-9).all()


def test_what_is_regular_comes_back_exactly():
    times = np.arange(50) * 0.1  # of which hardly one is a multiple of 0.1 as a float
    data = series_bytes(times, ["x"] * 50, np.tile([1.5, 2.5], 25))
    tokenizer, loss = learn([data])
    assert tokenizer.waits == (0.1,) and tokenizer.channels[0].values == (1.5, 2.5)
    np.testing.assert_allclose(
        tokenizer.decode(tokenizer.encode(series_of(data))).notes["time"], times
    )
    assert loss["value_max"] == 0 and loss["wait_max"] < 1e-12


def test_the_stated_loss_is_what_a_round_trip_loses():
    rng = np.random.default_rng(0)
    values = rng.normal(size=500)
    data = series_bytes(np.arange(500.0), ["x"] * 500, values)
    tokenizer, loss = learn([data])
    back = tokenizer.decode(tokenizer.encode(series_of(data))).notes["value"]
    off = np.abs(back - values) / np.ptp(values)
    assert loss["value_mean"] == pytest.approx(off.mean()) and off.mean() < 0.02
    assert loss["value_max"] == pytest.approx(off.max())
    assert len(tokenizer.channels[0].values) == 16


def test_a_long_gap_is_several_waits_and_an_endless_one_is_refused():
    ids = TOKENIZER.encode(series_of(series_bytes(np.array([0.0, 25.0]), ["A", "A"], np.ones(2))))
    waited = [TOKENIZER.tokens[i] for i in ids if TOKENIZER.kind[i] == Kind.TIME]
    assert waited == [("wait", 10.0), ("wait", 10.0), ("wait", 10.0)]
    with pytest.raises(InvalidMidi, match="1e\\+06 pass without an event"):
        TOKENIZER.encode(series_of(series_bytes(np.array([0.0, 1e6]), ["A", "A"], np.ones(2))))


def test_the_preset_holds_the_vocabulary():
    again = Tokenizer.preset(TOKENIZER.preset_name)
    assert again == TOKENIZER and again.hash == TOKENIZER.hash and again.scheme == "events"
    for broken in ("events", "events:{}", 'events:{"channels": [["A"]], "waits": [1]}'):
        with pytest.raises(UserError, match="has a vocabulary of its own"):
            Tokenizer.preset(broken)


def test_music_is_refused_and_so_is_what_cannot_be_asked_of_series():
    with pytest.raises(UserError, match="takes series of events"):
        TOKENIZER.encode(piano(0, 5))
    with pytest.raises(UserError, match="what is generated is music"):
        TOKENIZER.start()
    with pytest.raises(UserError, match="cannot augment by rubato"):
        augmentations_left_out(TOKENIZER, AugmentConfig(rubato=0.1))
    with pytest.raises(UserError, match="cannot augment by jitter"):
        augmentations_left_out(Tokenizer.preset("aria"), AugmentConfig(jitter=0.1))


# --- slices and augmentation ---------------------------------------------------------------------


def test_a_slice_is_those_events_from_the_first_of_them():
    ids = TOKENIZER.encode(series_of(switches(0, 40)))
    at = TOKENIZER.note_positions(ids)
    whole, part = (
        TOKENIZER.decode(ids).notes,
        TOKENIZER.decode(TOKENIZER.slice_ids(ids, at, 10, 25)).notes,
    )
    np.testing.assert_allclose(part["time"], whole["time"][10:25] - whole["time"][10])
    assert (part["channel"] == whole["channel"][10:25]).all()


def augmented(data: bytes, seed: int, **changes):
    config = AugmentConfig(tempo=0, pitch=0, velocity=0, mixup=False, **changes)
    ids = TOKENIZER.encode(series_of(data))
    return TOKENIZER.decode(TOKENIZER.augment(ids, config, np.random.default_rng(seed))).notes


def test_each_augmentation_changes_what_it_says_and_nothing_else():
    data = switches(1, 60)
    before = augmented(data, 0)
    for seed in range(5):
        jittered = augmented(data, seed, jitter=0.9)
        assert (jittered[["channel", "value"]] == before[["channel", "value"]]).all()
        dropped = augmented(data, seed, channel_dropout=0.5)
        left = np.isin(before["channel"], np.unique(dropped["channel"]))
        assert (dropped[["channel", "value"]] == before[["channel", "value"]][left]).all()
        permuted = augmented(data, seed, channel_permutation=True)
        is_c = before["channel"] == 2
        assert (permuted["channel"][is_c] == 2).all() and (permuted["channel"][~is_c] < 2).all()
        assert (permuted["value"] == before["value"]).all()
    assert any((augmented(data, s, jitter=0.9)["time"] != before["time"]).any() for s in range(5))
    assert {
        len(np.unique(augmented(data, s, channel_dropout=0.5)["channel"])) for s in range(9)
    } > {1}
    swapped = {augmented(data, s, channel_permutation=True)["channel"].tobytes() for s in range(9)}
    assert len(swapped) == 2  # A and B as they are, or in each other's place


# --- a corpus ------------------------------------------------------------------------------------


def test_a_parquet_of_series_becomes_shards_with_labels(source, corpus):
    manifest = load_manifest(corpus)
    preset = json.loads(manifest["tokenizer"]["preset"].partition(":")[2])
    assert [name for name, _, _ in preset["channels"]] == list(GENES)
    found = {}
    for split in ("train", "val"):
        shards = TokenShards(corpus, split, Tokenizer.preset(manifest["tokenizer"]["preset"]))
        for i in range(len(shards)):
            found[shards[i].meta["path"]] = (split, shards[i].meta)
    assert sorted(found) == [f"runs/{i:02d}" for i in range(12)]
    for i in range(12):
        _, meta = found[f"runs/{i:02d}"]
        assert meta["labels"]["regime"] == ("fast", "slow")[i % 2] and meta["n_notes"] == 30
    for i in range(0, 12, 2):  # one subject is never on both sides
        assert found[f"runs/{i:02d}"][0] == found[f"runs/{i + 1:02d}"][0]
    again = build(source, corpus, tokenizer_preset="events", workers=1, val_fraction=0.3)
    assert again.done_before and again.round_trip["worst_channel"] in GENES


def test_pairs_of_slices_are_drawn_and_augmented(corpus):
    stream = contrastive_pairs(
        corpus, split="train", seq_len=64, global_batch=4, seed=0, min_slice_notes=5,
        max_slice_notes=20, augment=AugmentConfig(jitter=0.2, channel_dropout=0.2),
    )  # fmt: skip
    batch = stream[0]
    tokenizer = Tokenizer.preset(load_manifest(corpus)["tokenizer"]["preset"])
    for row, eos in zip(batch["tokens"].reshape(8, -1), batch["eos"].ravel(), strict=True):
        assert row[0] == tokenizer.bos_id and row[eos] == tokenizer.eos_id
        assert 1 <= len(tokenizer.decode(row[: eos + 1]).notes) <= 20


def test_what_is_embedded_is_the_same_of_the_file_and_of_its_shards(source, corpus, tmp_path):
    preset = load_manifest(corpus)["tokenizer"]["preset"]
    slicing = Slicing(tokenizer=preset, slice_notes=12, max_tokens=64)
    found = []
    for where in (source, corpus):
        opened = open_source(where, slicing, spool=tmp_path / "spool")
        pieces = [opened.piece(i) for i in range(len(opened.paths))]
        found.append({piece.path: piece for piece in pieces})
    files, shards = found
    assert files.keys() == shards.keys() and len(files) == 12
    for path, piece in files.items():
        assert [len(ids) for ids in piece.slices] == [len(ids) for ids in shards[path].slices]
        assert piece.labels["regime"] == shards[path].labels["regime"]
        assert (piece.n_notes, piece.sha256) == (30, shards[path].sha256)
        first = piece.slices[0], shards[path].slices[0]
        assert (first[0] == first[1]).all()
    with pytest.raises(UserError, match="event series here, and the model's tokens are of music"):
        open_source(source, Slicing(), spool=tmp_path / "spool")


def test_bad_rows_and_series_are_named_and_the_others_built(tmp_path):
    rows = table(4).to_pydict()
    where = {name: rows["series"].index(name) for name in ("runs/00", "runs/01", "runs/02")}
    rows["value"][where["runs/00"]] = float("inf")
    rows["time"][where["runs/01"]] = None
    rows["regime"][where["runs/02"]] = "unheard of"
    lost = len(rows["series"]) - 1
    assert rows["series"][lost] not in where or lost not in where.values()
    rows["series"][lost] = None
    pq.write_table(pa.table(rows), source := tmp_path / "s.parquet")
    made = build(source, tmp_path / "out", tokenizer_preset="events", workers=1)
    assert made.n_accepted == 1
    said = {row["path"]: f"{row['reason']}: {row['value']}" for row in rejections(tmp_path / "out")}
    assert f"no finite value: row {where['runs/00']}" in said["runs/00"]
    assert f"no finite time: row {where['runs/01']}" in said["runs/01"]
    assert said["runs/02"].startswith("labels-differ: regime is")
    assert f"no-series: row {lost} of s.parquet" in said.values()
    repaired = build(source, tmp_path / "two", tokenizer_preset="events", workers=1, repair=True)
    assert repaired.n_accepted == 3 and repaired.n_repaired == 2


def test_a_vocabulary_can_be_declared_or_taken_from_another_corpus(source, corpus, tmp_path):
    words = {"channels": {"A": {"values": [-1, 1]}, "B": {"group": "g"}, "C": {}}, "bins": 4}
    (tmp_path / "words.json").write_text(json.dumps(words))
    build(source, tmp_path / "a", tokenizer_preset=f"events:{tmp_path / 'words.json'}", workers=1)
    tokenizer = Tokenizer.preset(load_manifest(tmp_path / "a")["tokenizer"]["preset"])
    assert tokenizer.channels[0].values == (-1, 1) and tokenizer.channels[1].group == "g"
    assert len(tokenizer.channels[1].values) == 4
    build(source, tmp_path / "b", tokenizer_preset=f"events:{corpus}", workers=1)
    assert load_manifest(tmp_path / "b")["tokenizer"] == load_manifest(corpus)["tokenizer"]


@pytest.mark.parametrize(
    "said, problem",
    [
        ({"bins": 0}, "bins=0 must lie in"),
        ({"bin": 3}, "unexpected keyword argument 'bin'"),
        ({"waits": [2, 1]}, "waits must be numbers in ascending order"),
        ({"channels": {"A": {"values": [1, 1]}}}, "values of A must be numbers in ascending order"),
        ({"channels": ["A"]}, "no attribute 'items'"),
        (["A"], "a JSON object is wanted"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused(said, problem, tmp_path):
    (path := tmp_path / "words.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=problem):
        learn([switches(0, 20)], f"events:{path}")


def test_scheme_and_source_must_fit(source, midi_corpus, tmp_path):
    with pytest.raises(UserError, match="event series are here; add --tokenizer events"):
        build(source, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="takes a Parquet file, or a folder of them, with columns"):
        build(midi_corpus, tmp_path / "out", tokenizer_preset="events", workers=1)
    with pytest.raises(UserError, match="dedup near, filters is not for event series"):
        build(source, tmp_path / "out", tokenizer_preset="events", filters="heavy", dedup="near")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "column, values, problem",
    [
        ("value", ["high"], "column value holds string; expected numbers or booleans"),
        ("time", ["noon"], "column time holds string; expected numbers or dates"),
        ("channel", [1.5], "column channel holds double; expected text or whole numbers"),
    ],
)
def test_columns_of_another_type_are_refused(column, values, problem, tmp_path):
    rows = {"series": ["s"], "time": [0.0], "channel": ["a"], "value": [1.0], column: values}
    pq.write_table(pa.table(rows), path := tmp_path / "s.parquet")
    with pytest.raises(UserError, match=problem):
        list(read_rows(path))


def test_dates_booleans_and_numbered_channels_are_read(tmp_path):
    times = pa.array([1_000_500, 1_000_000], pa.timestamp("ms"))
    rows = {"series": [7, 7], "time": times, "channel": [1, 0], "value": [True, False]}
    pq.write_table(pa.table(rows), path := tmp_path / "s.parquet")
    (row,) = read_rows(path)
    series = series_of(row.data)
    assert row.name == "7" and series.notes["time"].tolist() == [1000.0, 1000.5]
    assert series.notes["value"].tolist() == [0, 1] and series.channels == ("0", "1")
    assert not isinstance(piano(0, 3), type(series)) and isinstance(series, Performance)
