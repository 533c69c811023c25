"""The isolated worker: whose fault a death is, and what the parent takes from a process that a
file may have taken over. Real processes, each with one fault built in.
"""

import json
import os
import shutil

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import workers
from data_pipeline.build import build, merge
from data_pipeline.build.journal import read_unit
from data_pipeline.build.sources import Entry
from data_pipeline.build.unit_worker import (
    GarbledError,
    Job,
    Limits,
    pack_result,
    unpack_result,
)
from data_pipeline.cleaning import Cleaning
from data_pipeline.errors import UserError, printable
from data_pipeline.midi import midi_bytes
from data_pipeline.shards import TokenShards, rejections
from data_pipeline.workers import IsolatedWorker
from tests.corpora import random_performance

SETTINGS = {
    "tokenizer_preset": "aria",
    "filters": {},
    "cleaning": dict(vars(Cleaning())),
    "fingerprints": False,
    "reading": "standard",
    "repair": False,
}
FAULTY = """
import os, pickle, sys, time
import data_pipeline.build.unit_worker as worker

FAULT = os.environ["FAULT"]
send, pack_result, process = worker.send_frame, worker.pack_result, worker._process_file
begun = []

def faulty_process(root, entry, labels, maker, limits):
    begun.append(entry.path)
    if entry.path == "exits.mid":
        os._exit(3)
    return process(root, entry, labels, maker, limits)

def faulty_send(connection, data):
    fault = begun[-1] if begun else ""
    if data == b"":
        if FAULT == "idle" and getattr(worker, "started", False):
            os.kill(os.getpid(), 9)
        worker.started = True
    elif fault == "memory.mid":
        raise MemoryError
    elif fault == "huge.mid":
        connection.sendall((1 << 60).to_bytes(8, "big"))
    elif fault == "half.mid":
        connection.sendall((1000).to_bytes(8, "big") + b"half")
        time.sleep(60)
    elif fault == "pickle.mid":
        class Evil:
            def __reduce__(self):
                return (open, (os.environ["EVIL"], "w"))
        data = pickle.dumps(Evil())
    elif fault == "swap.mid":
        data = pack_result("a.mid", {"path": "a.mid", "stage": "", "reason": ""}, b"")
    send(connection, data)
    if fault == "z.mid" and FAULT == "after":
        os.kill(os.getpid(), 9)

worker.send_frame, worker._process_file = faulty_send, faulty_process
worker.main(sys.argv)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, rng = tmp_path_factory.mktemp("midi"), np.random.default_rng(0)
    for name in ("a", "b", "c", "z"):
        (made / f"{name}.mid").write_bytes(midi_bytes(random_performance(rng, 40)))
    return made


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Makes the worker processes of this test faulty."""

    def choose(fault):
        (tmp_path / "faulty_worker.py").write_text(FAULTY)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
        monkeypatch.setattr(workers, "_WORKER", "faulty_worker")

    return choose


def job_of(folder, labels=None, number=0):
    entries = [Entry(path.name, path.stat().st_size) for path in sorted(folder.glob("*.mid"))]
    return Job(number, folder, entries, [labels or {}] * len(entries))


def test_files_that_take_their_worker_over_cost_only_themselves(
    faulty, folder, tmp_path, monkeypatch
):
    reasons = {
        "exits": "worker-died",
        "half": "time-limit",
        "huge": "worker-garbled",
        "memory": "worker-died",
        "pickle": "worker-garbled",
        "swap": "worker-garbled",
    }
    shutil.copytree(folder, tmp_path / "midi")
    for name in reasons:
        shutil.copy(folder / "a.mid", tmp_path / "midi" / f"{name}.mid")
    faulty("by file")
    monkeypatch.setattr(workers, "_DEATHS_TO_QUARANTINE", 1)  # a process less for each
    summary = build(
        tmp_path / "midi", tmp_path / "data", workers=1, filters="none", limits=Limits(wall_s=5)
    )
    rows = [(row["path"], row["stage"], row["reason"]) for row in rejections(tmp_path / "data")]
    assert rows == [(f"{name}.mid", "worker", reason) for name, reason in reasons.items()]
    assert summary.n_accepted == 4 and not (tmp_path / "evil").exists()


def test_a_file_is_set_aside_when_it_killed_two_processes(faulty, folder, tmp_path):
    faulty("by file")
    shutil.copytree(folder, tmp_path / "midi")
    shutil.copy(folder / "a.mid", tmp_path / "midi" / "exits.mid")
    worker, seen = IsolatedWorker(SETTINGS, Limits()), []
    started = worker._start
    worker._start = lambda: (seen.append("start"), started())[1]
    (tmp_path / "unit").write_bytes(
        worker.run(job_of(tmp_path / "midi"), lambda *n: seen.append(n))
    )
    worker.stop()
    done = [summary.get("reason") for summary, _ in read_unit(tmp_path / "unit")]
    assert done == [None, None, None, "worker-died", None]
    assert seen == ["start", (0, 1), (0, 2), (0, 3), "start", "start", (0, 5)], "nothing done twice"


def test_a_death_after_the_last_file_is_no_files_fault(faulty, folder, tmp_path):
    """Every unit's process dies once it is done: nothing is lost, and nothing is done twice."""
    faulty("after")
    worker, seen = IsolatedWorker(SETTINGS, Limits()), []
    for number in range(3):
        data = worker.run(job_of(folder, number=number), lambda *done: seen.append(done))
        (tmp_path / "unit").write_bytes(data)
        assert all("n_tokens" in summary for summary, _ in read_unit(tmp_path / "unit"))
    worker.stop()
    assert seen == [(number, n) for number in range(3) for n in (1, 2, 3, 4)]


def test_processes_that_die_without_a_file_are_given_up(faulty, folder, tmp_path):
    faulty("idle")
    with pytest.raises(UserError, match=r"died 3 times with no file in hand .*SIGKILL"):
        build(folder, tmp_path / "data", workers=2, filters="none")


def test_a_worker_that_cannot_start_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_WORKER", "no_such_module")
    with pytest.raises(UserError, match=r"did not start: .*no_such_module") as error:
        build(folder, tmp_path / "data", workers=1, filters="none")
    assert "\n" not in str(error.value)


def test_labels_and_names_of_any_characters_come_through(folder, tmp_path):
    names = {"composer": "caf\udce9 \ud800", "\udcff": "a\ud83d\ude00b"}
    worker = IsolatedWorker(SETTINGS, Limits())
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    (odd / os.fsdecode(b"\xe9.mid")).write_bytes((folder / "a.mid").read_bytes())
    entry = Entry(os.fsdecode(b"\xe9.mid"), 0)
    (tmp_path / "unit").write_bytes(worker.run(Job(0, odd, [entry], [names])))
    worker.stop()
    [(summary, ids)] = read_unit(tmp_path / "unit")
    assert summary["labels"] == {"composer": "caf\ufffd \ufffd", "\ufffd": "a\U0001f600b"}
    assert summary["path"] == printable(entry.path) and ids
    json.dumps(summary["labels"], ensure_ascii=False).encode()


def test_a_result_that_cannot_be_packed_is_its_files_rejection():
    for summary, reason in (
        ({"path": "x.mid", "n_tokens": 0, "labels": {"a": "\ud800"}}, "error"),
        ({"path": "x.mid", "n_tokens": 1 << 80}, "error"),
        ({"path": "x.mid", "n_tokens": {1, 2}}, "error"),
    ):
        row, ids = unpack_result(pack_result("x.mid", summary, b""), "x.mid")
        assert (row["stage"], row["reason"], ids) == ("worker", reason, b"")


@pytest.mark.parametrize(
    "change",
    [{"n_tokens": 2}, {"n_tokens": -1}, {"path": "y.mid"}, {"labels": {"a": 1}}, {"content": "no"},
     {"n_notes": "3"}, {"n_tokens": True}],
)  # fmt: skip
def test_results_are_checked_before_they_are_kept(change):
    good = {"path": "x.mid", "sha256": "", "duration_ms": 1, "n_notes": 1, "n_tokens": 1,
            "labels": {}, "content": "00"}  # fmt: skip
    assert unpack_result(pack_result("x.mid", good, b"ab"), "x.mid") == (good, b"ab")
    with pytest.raises(GarbledError):
        unpack_result(pack_result("x.mid", {**good, **change}, b"ab"), "x.mid")


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text("ab")
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "n_tokens", "labels", "stage", "content"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | _VALUES.map(msgpack.packb))
def test_no_bytes_are_worse_than_garbled(frame):
    try:
        unpack_result(frame, "x.mid")
    except GarbledError:
        return
    pytest.fail("none of these is a result")


# --- what replaces another corpus ---


def test_overwriting_leaves_nothing_of_the_old_corpus(folder, tmp_path):
    out = tmp_path / "data"
    build(folder, out, workers=1, filters="none", val_fraction=0.5, shards=2)
    (out / "test-00000-of-00001.arrayrecord").write_bytes(b"a split that older versions wrote")
    (out / "test-index.npz").write_bytes(b"")
    (out / "notes.txt").write_text("the user's own")
    build(folder, out, workers=1, filters="none", val_fraction=0, shards=1, overwrite=True)
    build(folder, tmp_path / "fresh", workers=1, filters="none", val_fraction=0, shards=1)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "fresh").iterdir()} | {"notes.txt"}
    assert len(TokenShards(out, "train")) == 4


def test_killed_while_it_replaces_a_corpus_it_ends_with_the_same_bytes(
    folder, tmp_path, monkeypatch
):
    """Killed before each file that the merge puts in its place; an interrupt tidies nothing up."""

    class KilledError(BaseException):
        pass

    def killed_at(n, publish=merge.publish):
        done = []

        def publish_or_die(made, path):
            if len(done) == n:
                raise KilledError
            done.append(path)
            publish(made, path)

        return publish_or_die

    out, settings = tmp_path / "data", {"workers": 1, "filters": "none", "val_fraction": 0.5}
    build(folder, out, shards=2, **settings)
    build(folder, tmp_path / "fresh", shards=1, **settings)
    kills = 0
    for n in range(10):
        monkeypatch.setattr(merge, "publish", killed_at(n))
        try:
            build(folder, out, shards=1, overwrite=n == 0, **settings)
            break
        except KilledError:
            kills += 1
            with pytest.raises(UserError, match="unfinished"):
                TokenShards(out, "train")
    assert kills == 5, "two shards, two indexes, the rejections"
    read = {path.name: path.read_bytes() for path in out.iterdir()}
    assert read == {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}
