"""Hosts that share an export: who makes which part, whoever of them is slow or dead."""

import json
import os
import shutil
import threading
import time
from importlib.util import find_spec

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from aria_jax.cli.main import main
from aria_jax.embed import parts
from aria_jax.embed.export import export
from aria_jax.embed.parts import Claims, count_changes
from aria_jax.embed.pieces import Slicing, open_source
from aria_jax.embed.search import search
from aria_jax.embed.table import SUMMARY, Rows, read_embeddings, read_settings, write_embeddings
from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.midi import midi_bytes
from tests.aria_jax.embed.test_search import table
from tests.corpora import random_performance

SETTINGS = {"fingerprint": "f", "slice_notes": 30}


def encode(slices):
    return np.stack([[len(s), s.sum(dtype=np.int64) % 1000, 1] for s in slices]).astype(np.float32)


@pytest.fixture
def midis(tmp_path):
    folder, rng = tmp_path / "midis", np.random.default_rng(0)
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.mid").write_bytes(midi_bytes(random_performance(rng, 30 + 20 * i)))
    (folder / "bad.mid").write_bytes(b"no MIDI")
    return folder


def run(midis, out, encode=encode, **options):
    source = open_source(midis, Slicing("aria", 30, 200), spool=midis.with_name("spool"))
    options = {"settings": SETTINGS, "files_per_part": 2, **options}
    return export(source, encode, out, **options)


@pytest.fixture
def whole(midis, tmp_path):
    run(midis, tmp_path / "whole.parquet")
    return pq.read_table(tmp_path / "whole.parquet")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# --- claims ---


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "identity.json").write_text("{}")
    return tmp_path


def test_each_part_is_claimed_once_until_it_is_done(folder):
    one, other = Claims(folder, machine="a"), Claims(folder, machine="b")
    assert one.take("xyz") == "x" and one.take("xyz") == "y" and other.take("xyz") == "z"
    assert one.take("xyz") is None and other.take("xyz") is None
    (folder / "x.jsonl").touch()
    one.release("x")
    other.release("z", done=False)
    assert other.take("xyz") == "z" and other.take("xyz") is None


def test_a_claim_of_another_machine_is_good_for_as_long_as_the_slowest_part_took(folder):
    clock = Clock()
    mine, other = Claims(folder, clock, "a"), Claims(folder, machine="b")
    assert other.take("x") == "x" and mine.take("xy") == "y"
    clock.now = 50.0
    mine.release("y")  # took 50 s
    assert mine.take("x") is None
    clock.now = 149.0  # the claim was first seen at 0
    assert mine.take("x") is None
    clock.now = 151
    assert mine.take("xy") == "y", "what nobody is at work on comes first"
    assert mine.take("x") == "x"
    late = Claims(folder, clock, "c")
    assert late.take("x") is None, "it sees both claims for the first time"


def test_a_process_of_this_machine_is_never_given_up_while_it_lives_and_at_once_when_not(folder):
    clock = Clock()
    mine, slow = Claims(folder, clock), Claims(folder)
    assert slow.take("x") == "x"
    assert mine.take("x") is None
    clock.now = 1e9
    assert mine.take("x") is None
    os.close(slow._held.pop("x")[0])  # as the system does when a process dies
    assert mine.take("x") == "x"


def test_a_finished_export_has_no_parts_to_claim(folder):
    claims = Claims(folder)
    (folder / "identity.json").unlink()
    with pytest.raises(FileNotFoundError):
        claims.take("x")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        claims.take("x")


# --- hosts ---


def test_a_dead_host_holds_nobody_up(midis, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE_S", 0.0)
    out, calls = tmp_path / "e.parquet", []

    def dying(slices):
        calls.append(len(slices))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(slices)

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(parts.Claims.__init__, "__defaults__", (time.monotonic, "elsewhere"))
        elsewhere.setattr(parts.Parts, "close", lambda _: None)  # it says no goodbye
        with pytest.raises(KeyboardInterrupt):
            run(midis, out, dying)
    left = [p.name for p in (tmp_path / "e.parquet.parts").glob("*.by-elsewhere-*")]
    assert left == [f"part-00001.by-elsewhere-{os.getpid()}"]
    summary = run(midis, out)
    assert summary.n_parts_before == 1 and summary.complete
    assert pq.read_table(out).equals(whole) and not (tmp_path / "e.parquet.parts").exists()


def test_a_slow_host_holds_nobody_up_and_spoils_nothing(midis, tmp_path, whole, monkeypatch):
    """It is in the middle of a part while another makes all of the export."""
    monkeypatch.setattr(parts, "PATIENCE_S", 0.0)
    out, begun, go_on = tmp_path / "e.parquet", threading.Event(), threading.Event()
    found = []

    def slow(slices):
        begun.set()
        assert go_on.wait(60)
        return encode(slices)

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(parts.Claims.__init__, "__defaults__", (time.monotonic, "elsewhere"))
        host = threading.Thread(target=lambda: found.append(run(midis, out, slow)))
        host.start()
        assert begun.wait(60)
    assert run(midis, out).complete and pq.read_table(out).equals(whole)
    go_on.set()
    host.join()
    assert found[0].complete and found[0].n_rows == 8
    assert pq.read_table(out).equals(whole)
    assert {p.name for p in tmp_path.iterdir()} == {
        "midis", "whole.parquet", "whole.parquet.rejected.jsonl", "e.parquet",
        "e.parquet.rejected.jsonl",
    }  # fmt: skip


def test_helpers_make_the_parts_and_one_process_joins_them(midis, tmp_path, whole):
    out, summaries = tmp_path / "e.parquet", []

    def help_once():
        if not summaries:
            summaries.append(run(midis, out, helper=True, host_index=1, host_count=2))

    def never(slices):
        raise AssertionError("the helpers do this")

    summary = run(midis, out, never, helped_by=help_once)
    assert not summaries[0].complete and summaries[0].n_embedded == 8
    assert summary.complete and summary.n_embedded == 0 and pq.read_table(out).equals(whole)


def test_progress_counts_what_others_have_done(midis, tmp_path):
    seen = []
    run(midis, tmp_path / "e.parquet", progress=lambda *n: seen.append(n))
    assert seen[0] == (0, 9) and seen[-1] == (9, 9) and seen == sorted(seen)


@pytest.mark.slow
def test_hosts_share_an_export_in_a_bucket(bucket, midis, tmp_path, whole, monkeypatch):
    """Each with a disk of its own; the first is killed with a part in hand."""
    monkeypatch.setattr(parts, "PATIENCE_S", 0.0)
    out, calls = f"{bucket.url}/e.parquet", []

    def dying(slices):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(slices)

    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("ARIA_JAX_CACHE", str(tmp_path / "another disk"))
        elsewhere.setattr(parts.Claims.__init__, "__defaults__", (time.monotonic, "elsewhere"))
        elsewhere.setattr(parts.Parts, "close", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            run(midis, out, dying, host_index=0)
    assert sum(name.endswith(".jsonl") for name in bucket.names()) == 1
    summary = run(midis, out)
    assert summary.n_parts_before == 1 and pq.read_table(storage.place(out)).equals(whole)
    assert bucket.names() == {"e.parquet", "e.parquet.rejected.jsonl"}
    assert run(midis, f"{bucket.url}/set", as_dataset=True).complete
    shutil.rmtree(storage.mirror())
    assert read_embeddings(f"{bucket.url}/set").path == whole["path"].to_pylist()
    assert search(np.ones(3), f"{bucket.url}/set", 1, index="exact")
    assert storage.upload(storage.place(bucket.url)) == 0, "an index stays on this disk"


# --- what is made ---


def test_a_data_set_holds_what_a_file_holds(midis, tmp_path, whole):
    out = tmp_path / "set"
    run(midis, out, as_dataset=True)
    files = sorted(out.glob("part-*.parquet"))
    assert len(files) == 4 and {p.name for p in out.iterdir()} == {
        *(f.name for f in files),
        SUMMARY,
    }
    other = pyarrow.dataset.dataset(out).to_table()
    assert other.replace_schema_metadata().equals(whole.replace_schema_metadata())
    read, one = read_embeddings(out), read_embeddings(tmp_path / "whole.parquet")
    np.testing.assert_array_equal(read.embedding, one.embedding)
    assert (read.path, read.labels, read.fingerprint) == (one.path, one.labels, "f")
    assert read_settings(out)["slice_notes"] == 30
    query = read.embedding[3]
    assert search(query, out, 4) == search(query, tmp_path / "whole.parquet", 4)
    assert run(midis, out, as_dataset=True).done_before


def test_a_data_set_is_brought_up_to_date(midis, tmp_path):
    out = tmp_path / "set"
    run(midis, out, as_dataset=True)
    before = {path.name for path in out.iterdir()}
    shutil.copy(midis / "1.mid", midis / "0.mid")
    (midis / "7.mid").unlink()
    summary = run(midis, out, as_dataset=True)
    assert summary.changes == {"new": 0, "changed": 1, "renamed": 0, "gone": 1, "kept": 6}
    assert summary.n_embedded == 0, "the vectors of 1.mid are known"
    run(midis, tmp_path / "fresh.parquet")
    assert read_embeddings(out).embedding.tolist() == (
        read_embeddings(tmp_path / "fresh.parquet").embedding.tolist()
    )
    assert {path.name for path in out.iterdir()} & before == {SUMMARY}, "old parts are gone"


def test_an_unfinished_data_set_says_so(midis, tmp_path):
    out = tmp_path / "set"

    def failing(slices):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(midis, out, failing, as_dataset=True)
    with pytest.raises(UserError, match="a folder is here"):
        read_embeddings(out)
    assert run(midis, out, as_dataset=True).complete and len(read_embeddings(out).path) == 8


def test_a_folder_of_other_things_is_no_data_set(midis, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="does not say what it was made of"):
        run(midis, out, as_dataset=True)
    with pytest.raises(UserError, match="is a folder; name a file"):
        run(midis, out)
    run(midis, tmp_path / "e.parquet")
    with pytest.raises(UserError, match="is a file; name a folder"):
        run(midis, tmp_path / "e.parquet", as_dataset=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_float16_is_the_nearest_of_its_numbers(midis, tmp_path, whole):
    out = tmp_path / "half.parquet"
    run(midis, out, lambda slices: encode(slices) / 7, float16=True)
    run(midis, tmp_path / "e.parquet", lambda slices: encode(slices) / 7)
    full, half = read_embeddings(tmp_path / "e.parquet"), read_embeddings(out)
    assert str(pq.read_schema(out).field("embedding").type.value_type) == "halffloat"
    assert half.embedding.dtype == np.float32
    np.testing.assert_array_equal(half.embedding, full.embedding.astype(np.float16))
    assert [h.path for h in search(full.embedding[0], out, 3)] == [
        h.path for h in search(full.embedding[0], tmp_path / "e.parquet", 3)
    ]
    (midis / "0.mid").unlink()
    assert run(midis, out, float16=True).n_kept == 7
    np.testing.assert_array_equal(read_embeddings(out).embedding, half.embedding[1:])
    with pytest.raises(UserError, match='numbers: "float16" → not said'):
        run(midis, out)


def test_numbers_too_large_for_float16_are_refused(tmp_path):
    with pytest.raises(UserError, match="beyond 65,504"):
        write_embeddings(table(np.full((1, 2), 7e4)), tmp_path / "e.parquet", float16=True)
    assert not list(tmp_path.iterdir())


def test_changes_are_counted_by_path_and_content(tmp_path):
    def rows(name, files):
        made = table(np.ones((len(files), 2)))
        object.__setattr__(made, "path", [path for path, _ in files])
        object.__setattr__(made, "sha256", [sha256 for _, sha256 in files])
        write_embeddings(made, tmp_path / name)
        return Rows(tmp_path / name)

    before = rows("1", [("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"), ("e", "4")])
    after = [rows("2", [("a", "1"), ("b", "9"), ("x", "3")]), rows("3", [("y", "4"), ("z", "7")])]
    assert count_changes(before, after) == {
        "new": 1, "changed": 1, "renamed": 2, "gone": 1, "kept": 1
    }  # fmt: skip
    slices = rows("4", [("a#0", "1"), ("a#1", "1"), ("b#0", "5")])
    assert count_changes(slices, [rows("5", [("a#0", "1"), ("a#1", "1")])])["gone"] == 1


# --- as a user runs it ---


def test_the_command_says_what_has_changed(midis, tmp_path, capsys):
    out = str(tmp_path / "set")
    command = ["embed", str(midis), out, "--baseline", "pitch-class", "--workers", "0"]
    assert main([*command, "--parts", "--float16"]) == 0
    (midis / "new.mid").write_bytes(midi_bytes(random_performance(np.random.default_rng(9), 40)))
    (midis / "1.mid").unlink()
    shutil.copy(midis / "new.mid", midis / "2.mid")
    capsys.readouterr()
    assert main([*command, "--float16"]) == 0, "a data set stays one"
    said = capsys.readouterr().out
    assert "8 rows" in said and "1 new, 1 changed, 1 gone, 6 kept; 1 files rejected" in said
    assert main([*command, "--float16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] is None


@pytest.mark.parametrize("more, said", [
    (["--parts"], "e.parquet is a file, or named like one"),
    (["--runner", "ray", "--host-index", "1"], "leave out --host-index"),
])  # fmt: skip
def test_options_that_do_not_go_together(midis, tmp_path, capsys, more, said):
    command = ["embed", str(midis), str(tmp_path / "e.parquet"), "--baseline", "pitch-class"]
    assert main([*command, *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is not None, reason="the ray extra is installed")
def test_without_ray_the_extra_is_named(midis, tmp_path, capsys):
    command = ["embed", str(midis), str(tmp_path / "e.parquet"), "--baseline", "pitch-class"]
    assert main([*command, "--runner", "ray"]) == 2
    assert "pip install 'aria-jax[ray]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the ray extra")
@pytest.mark.slow
def test_a_ray_node_that_dies_changes_nothing(tiny_models, midis, tmp_path, monkeypatch, capsys):
    """Three nodes of one cluster, each with an actor that holds the model; one is killed."""
    import ray
    from ray.cluster_utils import Cluster

    for i in range(40):
        shutil.copy(midis / f"{i % 8}.mid", midis / f"more-{i}.mid")
    command = ["embed", str(midis), "--checkpoint", str(tiny_models["encoder"]), "--workers", "0"]
    monkeypatch.setattr(export, "__kwdefaults__", {**export.__kwdefaults__, "files_per_part": 2})
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        victim, log = next(iter(cluster.worker_nodes)), tmp_path / "log"
        log.mkdir()
        prepare, victim_id = module_prepare(log, victim.node_id), victim.node_id

        def kill():
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and not list(log.glob(f"{victim_id}-*")):
                time.sleep(0.05)
            cluster.remove_node(victim, allow_graceful=False)

        monkeypatch.setattr("aria_jax.cli.embed._prepare", prepare)
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        assert (
            main([*command[:2], str(tmp_path / "ray.parquet"), *command[2:], "--runner", "ray"])
            == 0
        )
        killer.join()
        deadline = time.monotonic() + 60
        while all(node["Alive"] for node in ray.nodes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sorted(node["Alive"] for node in ray.nodes()) == [False, True, True]
    finally:
        ray.shutdown()
        cluster.shutdown()
    at_work = {path.name.rpartition("-")[0] for path in log.iterdir()}
    assert len(at_work) == 3, "each node embedded"
    assert main([*command[:2], str(tmp_path / "here.parquet"), *command[2:]]) == 0
    one, other = (read_embeddings(tmp_path / f"{name}.parquet") for name in ("ray", "here"))
    assert one.path == other.path and len(one.path) == 48
    np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-5, atol=1e-6)


def module_prepare(log, victim_id):
    """`_prepare` whose actors note each of their batches; on the victim's node they stay in it."""
    pause = time.sleep

    def prepare(args):  # a closure: Ray's workers cannot import this file
        import ray

        from aria_jax.cli import embed
        from aria_jax.embed import export

        export.export.__kwdefaults__["files_per_part"] = 2
        node, load = ray.get_runtime_context().get_node_id(), embed._encoder

        def noting(args):
            encode, settings = load(args)

            def noted(slices):
                (log / f"{node}-{time.monotonic_ns()}").touch()
                if node == victim_id:
                    pause(300)  # killed in here
                while not list(log.glob(f"{victim_id}-*")):
                    pause(0.05)  # the others leave it some work
                return encode(slices)

            return noted, settings

        embed._encoder = noting
        return embed._prepare(args)

    return prepare
