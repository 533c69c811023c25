"""Embeddings: the reference's numbers, batches that change nothing, exports that survive."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

from aria_jax.checkpoints.safetensors import import_model
from aria_jax.config import ComputeConfig, MeshConfig, ModelConfig
from aria_jax.embed.encode import (
    BASELINES,
    baseline_encoder,
    length_bucketed_batches,
    model_encoder,
)
from aria_jax.embed.export import embed_pieces, export
from aria_jax.embed.pieces import Piece, Slicing, midi_slices, open_source
from aria_jax.embed.table import pool_slices, read_embeddings, read_settings
from aria_jax.models.heads import build_model
from aria_jax.sharding import make_mesh
from data_pipeline.errors import UserError
from data_pipeline.midi import read_midi, write_midi
from data_pipeline.shards import TokenShards
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

TOKENIZER = Tokenizer.preset("aria")
CONFIG = ModelConfig(d_model=16, n_heads=2, n_layers=2, head="embedding", emb_size=8)
SHORT = Slicing("aria", 30, 200)
SETTINGS = {"fingerprint": "f", "slice_notes": 300}


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, ComputeConfig(), rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def midis(tmp_path_factory) -> Path:
    """Twelve MIDI files, one of them nested, two of them unusable."""
    folder, rng = tmp_path_factory.mktemp("midis"), np.random.default_rng(0)
    (folder / "sub").mkdir()
    for i in range(10):
        name = f"sub/{i}.mid" if i == 3 else f"{i}.mid"
        write_midi(random_performance(rng, int(rng.integers(20, 150))), folder / name)
    (folder / "bad.mid").write_bytes(b"not MIDI")
    (folder / "cut.mid").write_bytes((folder / "1.mid").read_bytes()[:60])
    rows = [{"path": f"{i}.mid", "composer": "bach"} for i in range(5)]
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


def opened(source, tmp_path, slicing=SHORT):
    return open_source(source, slicing, spool=tmp_path / "spool")


def pieces_of(source):
    sliced = [source.piece(i) for i in range(len(source.paths))]
    return [piece for piece in sliced if isinstance(piece, Piece)]


def counting():
    return baseline_encoder("statistics", TOKENIZER)


def test_how_far_a_part_is_gets_told(midis, tmp_path, monkeypatch):
    source, told = opened(midis, tmp_path), []
    export(source, counting(), tmp_path / "whole.parquet", settings=SETTINGS)
    monkeypatch.setattr("aria_jax.embed.export.TOKENS_AT_ONCE", 500)
    out = tmp_path / "out.parquet"
    export(source, counting(), out, settings=SETTINGS, progress=lambda *n: told.append(n))
    assert sorted(told) == told and told[-1] == (12, 12) and len(set(told)) > 4
    assert {total for _, total in told} == {12}
    whole = read_embeddings(tmp_path / "whole.parquet")
    np.testing.assert_array_equal(read_embeddings(out).embedding, whole.embedding)


# --- the numbers ---


def test_slices_are_pooled_by_their_mean_or_with_their_deviation_too(midis, tmp_path):
    source, out = opened(midis, tmp_path), [tmp_path / f"{i}.parquet" for i in range(3)]
    pieces = pieces_of(source)
    mean, both = (embed_pieces(pieces, counting(), pool=pool) for pool in ("mean", "mean+std"))
    assert both.embedding.shape[1] == 2 * mean.embedding.shape[1]
    np.testing.assert_array_equal(both.embedding[:, :24], mean.embedding)
    for piece, row in zip(pieces, both.embedding, strict=True):
        np.testing.assert_allclose(row[24:], counting()(piece.slices).std(0), atol=1e-6)
    np.testing.assert_array_equal(pool_slices(np.ones((1, 2)), "mean+std"), [1, 1, 0, 0])
    with pytest.raises(UserError, match=r"mean or mean\+std, not by 'median'"):
        embed_pieces(pieces, counting(), pool="median")
    export(source, counting(), out[0], settings=SETTINGS)
    export(source, counting(), out[1], settings=SETTINGS, pool="mean+std")
    np.testing.assert_array_equal(read_embeddings(out[1]).embedding, both.embedding)
    assert "pool_slices" not in read_settings(out[0])  # as files of versions without the setting
    assert read_settings(out[1])["pool_slices"] == "mean+std"
    with pytest.raises(UserError, match="pool_slices"):
        export(source, counting(), out[1], settings=SETTINGS)


def test_whole_files_as_the_reference_embeds_them(golden, golden_midi):
    case = json.loads((golden / "model" / "file_embeddings.json").read_text())
    model = import_model(golden / "model" / "emb.safetensors", n_heads=4)
    encode = model_encoder(model, TOKENIZER.pad_id)
    slicing = Slicing("aria", case["notes_per_chunk"], case["max_seq_len"])
    for path, expected in case["embeddings"].items():
        performance = read_midi(golden_midi / path, compat="aria-utils")
        found = encode(midi_slices(performance, slicing)).mean(0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_batches_equal_one_slice_at_a_time(corpus, tmp_path, model, pooling):
    slices = [ids for piece in pieces_of(opened(corpus, tmp_path)) for ids in piece.slices]
    slices = slices[::7]
    together = model_encoder(model, TOKENIZER.pad_id, pooling)(slices)
    for i in range(0, len(slices), 11):
        ids, eos = slices[i][None].astype(np.int32), np.array([len(slices[i]) - 1])
        one = model.pooled(ids, eos, pooling)[0]
        np.testing.assert_allclose(together[i], one, rtol=1e-5, atol=1e-5)


def test_several_devices_equal_one(corpus, tmp_path, model):
    slices = pieces_of(opened(corpus, tmp_path))[0].slices[:5]
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    graph, state = nnx.split(model)
    spread = nnx.merge(graph, jax.device_put(state, jax.NamedSharding(mesh, jax.P())))
    np.testing.assert_allclose(
        model_encoder(spread, TOKENIZER.pad_id, mesh=mesh)(slices),
        model_encoder(model, TOKENIZER.pad_id)(slices),
        rtol=1e-5,
        atol=1e-6,
    )


def test_bfloat16_stays_near(corpus, tmp_path, model):
    """Eight bits of mantissa through two layers: two digits survive."""
    slices = pieces_of(opened(corpus, tmp_path))[0].slices
    narrow = build_model(CONFIG, ComputeConfig(dtype="bfloat16"), rngs=nnx.Rngs(params=0))
    exact = model_encoder(model, TOKENIZER.pad_id)(slices)
    found = model_encoder(narrow, TOKENIZER.pad_id)(slices)
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())


def test_batches_cover_each_slice_once_and_waste_under_a_tenth():
    """Lengths as slices of 300 notes have them; filler rows are waste too."""
    lengths = np.random.default_rng(0).normal(950, 120, 1500).clip(20, 2048).astype(int)
    slices = [np.ones(n, np.uint16) for n in lengths]
    seen, computed = [], 0
    for chosen, tokens, eos in length_bucketed_batches(slices, TOKENIZER.pad_id, ways=4):
        seen += chosen.tolist()
        computed += tokens.size
        assert all(eos[row] == lengths[i] - 1 for row, i in enumerate(chosen))
        assert len(tokens) % 4 == 0
    assert sorted(seen) == list(range(1500))
    [(_, tokens, _)] = length_bucketed_batches(slices[:5], TOKENIZER.pad_id)
    assert len(tokens) == 8, "one file does not pay for a whole batch"
    assert lengths.sum() / computed > 0.9


def test_real_performances_waste_under_a_tenth(real_midi, tmp_path):
    source = opened(real_midi / "asap", tmp_path, Slicing())
    chosen = range(0, len(source.paths), len(source.paths) // 64)
    slices = [ids for piece in map(source.piece, chosen) for ids in piece.slices]
    batches = length_bucketed_batches(slices, TOKENIZER.pad_id)
    computed = sum(tokens.size for _, tokens, _ in batches)
    assert sum(map(len, slices)) / computed > 0.9


def test_labels_never_reach_the_network(corpus, tmp_path):
    composer = {TOKENIZER.id_of(("prefix", "composer", c)) for c in ("bach", "chopin", "liszt")}
    for piece in pieces_of(opened(corpus, tmp_path)):
        assert piece.labels["composer"] and piece.labels["split"] in ("train", "val")
        assert not composer & {int(i) for ids in piece.slices for i in ids}


def test_slices_of_shards_are_those_of_the_tokens(corpus, tmp_path):
    """The loader's slices, against the tokenizer's of the same piece without its labels."""
    labels = [TOKENIZER.id_of(("prefix", "composer", c)) for c in ("bach", "chopin", "liszt")]
    shards = TokenShards(corpus, "train", TOKENIZER)
    source = opened(corpus, tmp_path)
    by_path = {piece.path: piece for piece in pieces_of(source) if piece.labels["split"] == "train"}
    for record in shards:
        ids, found = record.ids[~np.isin(record.ids, labels)], by_path[record.meta["path"]].slices
        starts = range(0, record.meta["n_notes"], SHORT.slice_notes)
        assert len(found) == len(starts) and all(one[-1] == TOKENIZER.eos_id for one in found)
        for start, one in zip(starts, found, strict=True):
            expected = TOKENIZER.slice_notes(ids, start, start + SHORT.slice_notes)
            np.testing.assert_array_equal(one[:-1], expected[: SHORT.max_tokens][:-1])


def test_a_model_without_embedding_head_is_refused():
    lm = build_model(ModelConfig(16, 2, 1), ComputeConfig(), rngs=nnx.Rngs(params=0))
    with pytest.raises(UserError, match="not an embedding head"):
        model_encoder(lm, TOKENIZER.pad_id)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_finite_and_tell_music_apart(name):
    rng = np.random.default_rng(0)
    ids = [TOKENIZER.encode(random_performance(rng, 80)).astype(np.int64) for _ in range(2)]
    values = [BASELINES[name](i, TOKENIZER) for i in ids]
    assert all(np.isfinite(v).all() for v in values) and not np.allclose(*values)
    nothing = np.array([TOKENIZER.bos_id, TOKENIZER.eos_id])
    assert np.isfinite(BASELINES[name](nothing, TOKENIZER)).all()


def test_statistics_are_finite_where_a_slice_has_lost_its_first_time_token():
    ids = TOKENIZER.encode(random_performance(np.random.default_rng(0), 80)).astype(np.int64)
    first = int(np.flatnonzero(ids == TOKENIZER.time_id)[0])
    assert (np.diff(TOKENIZER.events(np.delete(ids, first))[1]) < -1).any(), "onsets must go back"
    assert np.isfinite(BASELINES["statistics"](np.delete(ids, first), TOKENIZER)).all()


# --- the export ---


def same(one: Path, other: Path) -> bool:
    return pq.read_table(one).equals(pq.read_table(other))


@pytest.fixture(scope="module")
def whole(midis, tmp_path_factory) -> Path:
    """An export in one go."""
    folder = tmp_path_factory.mktemp("whole")
    export(opened(midis, folder), counting(), folder / "e.parquet", settings=SETTINGS,
           files_per_part=3)  # fmt: skip
    return folder / "e.parquet"


def test_an_export_says_what_it_holds(whole, midis, tmp_path):
    table = read_embeddings(whole)
    assert list(table.path) == sorted([f"{i}.mid" for i in range(10) if i != 3] + ["sub/3.mid"])
    assert table.fingerprint == "f" and table.column("composer")[:3] == ["bach"] * 3
    assert (table.n_notes >= 20).all() and (table.duration_ms > 0).all()
    np.testing.assert_array_equal(table.n_slices, -(-table.n_notes // 30))
    lines = whole.with_name("e.parquet.rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in lines} == {"bad.mid", "cut.mid"}
    assert pq.read_schema(whole).field("embedding").type.list_size == table.embedding.shape[1]
    [expected] = [p for p in pieces_of(opened(midis, tmp_path)) if p.path == "7.mid"]
    row = list(table.path).index("7.mid")
    np.testing.assert_allclose(table.embedding[row], counting()(expected.slices).mean(0), rtol=1e-6)


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_an_archive_gives_what_its_folder_gives(whole, midis, tmp_path, kind):
    with tarfile.open(tmp_path / f"m{kind}", "w:gz" if kind.endswith("gz") else "w") as archive:
        for name in midis.rglob("*.*"):
            archive.add(name, str(name.relative_to(midis)))
    source = open_source(tmp_path / f"m{kind}", SHORT, spool=tmp_path / "spool")
    summary = export(source, counting(), tmp_path / "e.parquet", settings=SETTINGS)
    assert (summary.n_rows, summary.n_rejected) == (10, 2)
    assert same(tmp_path / "e.parquet", whole)


def test_stopped_and_run_again_gives_the_same_file(whole, midis, tmp_path):
    out, calls = tmp_path / "e.parquet", []

    def failing(slices):
        calls.append(len(slices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counting()(slices)

    options = {"settings": SETTINGS, "files_per_part": 3}
    with pytest.raises(KeyboardInterrupt):
        export(opened(midis, tmp_path), failing, out, **options)
    assert not out.exists()
    again = export(opened(midis, tmp_path), counting(), out, **options)
    assert again.n_parts_before == 2 and again.complete
    assert same(out, whole) and not (tmp_path / "e.parquet.parts").exists()

    def never(slices):
        raise AssertionError("a finished export is not computed again")

    assert export(opened(midis, tmp_path), never, out, **options).n_rows == 10


def test_a_host_makes_what_no_other_has_made(whole, midis, tmp_path):
    out, seen = tmp_path / "e.parquet", []
    options = {"settings": SETTINGS, "files_per_part": 3, "host_count": 3}

    def embed(host):
        def noting(slices):
            seen.append(host)
            return counting()(slices)

        return export(opened(midis, tmp_path), noting, out, host_index=host, **options)

    done = [embed(host) for host in (2, 0, 1)]
    assert seen == [2] * 4 and same(out, whole)
    assert [one.done_before for one in done] == [False, True, True]


def test_worker_processes_give_the_same_file(whole, midis, tmp_path):
    export(opened(midis, tmp_path), counting(), tmp_path / "e.parquet", settings=SETTINGS,
           files_per_part=3, workers=2)  # fmt: skip
    assert same(tmp_path / "e.parquet", whole)


def test_worker_processes_do_not_load_jax():
    code = "import sys, aria_jax.embed.pieces, data_pipeline.workers; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_parts_of_another_export_are_refused(midis, tmp_path):
    out = tmp_path / "e.parquet"
    export(opened(midis, tmp_path), counting(), out, settings=SETTINGS, helper=True,
           files_per_part=3)  # fmt: skip
    with pytest.raises(UserError, match=r"the beginning of embeddings .*model: f → g.*--overwrite"):
        export(opened(midis, tmp_path), counting(), out, settings={"fingerprint": "g"})


def test_nothing_but_bad_files_is_an_error(tmp_path):
    (tmp_path / "a.mid").write_bytes(b"no")
    with pytest.raises(UserError, match="every file was rejected"):
        export(opened(tmp_path, tmp_path), counting(), tmp_path / "e", settings=SETTINGS)
    assert "a.mid" in (tmp_path / "e.rejected.jsonl").read_text()


def test_slices_are_rows_of_their_own(midis, whole, tmp_path):
    out = tmp_path / "e.parquet"
    export(opened(midis, tmp_path), counting(), out, settings=SETTINGS, per_slice=True)
    slices, files = read_embeddings(out), read_embeddings(whole)
    assert len(slices.path) == files.n_slices.sum()
    mine = [i for i, path in enumerate(slices.path) if path.startswith("0.mid#")]
    np.testing.assert_allclose(slices.embedding[mine].mean(0), files.embedding[0], rtol=1e-5)


_KILLED = """
import sys, time, numpy as np
from pathlib import Path
from aria_jax.embed.export import export
from aria_jax.embed.pieces import Slicing, open_source
def slow(slices):
    time.sleep(0.3)
    return np.stack([[len(s), s.sum(dtype=np.int64)] for s in slices]).astype(np.float32)
if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    source = open_source(folder, Slicing("aria", 30, 200), spool=out.with_suffix(".spool"))
    export(source, slow, out, settings={"fingerprint": "f"}, files_per_part=1)
"""


def test_killed_half_way_and_resumed_gives_the_same_file(midis, tmp_path):
    """SIGKILL, so that nothing can be tidied up."""
    outs = [tmp_path / "killed.parquet", tmp_path / "straight.parquet"]
    environment = {**os.environ, "XLA_FLAGS": ""}

    def start(out):
        return subprocess.Popen([sys.executable, "-c", _KILLED, midis, out], env=environment)

    process, deadline = start(outs[0]), time.monotonic() + 60
    while len(list(tmp_path.glob("killed.parquet.parts/*.jsonl"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not outs[0].exists()
    for out in outs:
        assert start(out).wait(timeout=60) == 0
    assert same(*outs)


# --- other programs' embeddings ---


def test_embeddings_of_other_programs_are_read(tmp_path):
    import pyarrow as pa

    vectors, names = np.arange(12.0).reshape(4, 3), ["a", "b", "a", "b"]
    pq.write_table(
        pa.table({"embedding": vectors.tolist(), "composer": names}), tmp_path / "x.parquet"
    )
    np.savez(tmp_path / "x.npz", embedding=vectors, composer=np.array(names), year=np.arange(4))
    for name in ("x.parquet", "x.npz"):
        table = read_embeddings(tmp_path / name)
        np.testing.assert_array_equal(table.embedding, vectors)
        assert table.column("composer") == names and table.path == ["0", "1", "2", "3"]
        assert table.label_names() == ["composer"]


def test_unusable_embeddings_are_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "x.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "y.npz", features=np.zeros((2, 2)))
    np.savez(tmp_path / "z.npz", embedding=np.full((2, 2), np.nan))
    for name, what in (
        ("x.parquet", "not a Parquet"), ("x.npz", "not an NPZ"), ("y.npz", "embedding"),
        ("z.npz", "finite"), ("w.parquet", "no such file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            read_embeddings(tmp_path / name)


def test_rows_say_where_they_come_from(corpus, tmp_path):
    pieces = pieces_of(opened(corpus, tmp_path))
    table = embed_pieces(pieces, counting())
    assert list(table.path) == [piece.path for piece in pieces]
    assert list(table.n_notes) == [piece.n_notes for piece in pieces]
