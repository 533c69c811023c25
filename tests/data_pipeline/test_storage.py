"""Places, and what comes from and goes to a bucket over a network that fails."""

import asyncio
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline import storage
from data_pipeline.errors import UserError, printable
from data_pipeline.storage import buckets
from tests.buckets import Fault
from tests.marks import slow_among


def test_a_path_without_scheme_is_itself(tmp_path):
    for path in ("a/b.mid", str(tmp_path), "a:b", "./x:/y"):
        assert storage.place(path) == Path(path)
        assert not storage.is_remote(storage.place(path))
    assert storage.local(tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize("path", ["gs://b/a/x.mid", "s3://b/a/x.mid", "gs://b", "s3://b/run/"])
def test_a_place_has_its_url_back(path, monkeypatch, tmp_path):
    monkeypatch.setenv("ARIA_JAX_CACHE", str(tmp_path))
    found = storage.place(path)
    assert found.is_relative_to(tmp_path)
    assert storage.url(found) == path.rstrip("/")
    assert storage.place(Path(path)) == found  # of which pathlib has taken a slash
    assert printable(f"{found}/y: no such file") == f"{path.rstrip('/')}/y: no such file"


@pytest.mark.parametrize(
    "path, said",
    [
        ("az://b/x", "gs:// or s3://"),
        ("gcs://b/x", "did you mean 'gs'"),
        ("http://b/x", "gs:// or s3://"),
        ("gs://", "names no bucket"),
        ("gs://b/../x", "empty"),
        ("gs://b/a//x", "empty"),
    ],
)
def test_what_no_place_can_be_is_refused_by_name(path, said):
    with pytest.raises(UserError, match=said):
        storage.place(path)


@pytest.fixture
def folder(tmp_path):
    """Files of several sizes, also none, below a folder."""
    made = tmp_path / "made"
    for i, name in enumerate(("a.bin", "sub/b.bin", "sub/deep/Schöne Müllerin.mid", "empty")):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        content = bytes(range(256)) * 900 + b"\r\n--\r\n" if i else b"x"
        (made / name).write_bytes(b"" if name == "empty" else content * i or b"x")
    return made


def files_below(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def test_what_is_sent_comes_back_the_same(bucket, folder, tmp_path, monkeypatch):
    bucket.put("deep/in", folder)
    found = storage.local(f"{bucket.url}/deep/in")
    assert files_below(found) == files_below(folder)
    assert storage.local(f"{bucket.url}/deep/in/a.bin").read_bytes() == b"x"
    assert not storage.local(f"{bucket.url}/deep/i").exists()  # a beginning of a name is no folder

    # Nothing is asked of the bucket but whether all is as it was.
    bucket.network.requests.clear()
    storage.local(f"{bucket.url}/deep/in")
    assert bucket.network.requests.total() == 1

    # What changes there changes here, and what goes there goes here.
    bucket.put("deep/in/a.bin", folder / "sub/b.bin")
    buckets.delete(f"{bucket.url}/deep/in/sub/b.bin")
    storage.fetch(found)
    assert (found / "a.bin").read_bytes() == (folder / "sub/b.bin").read_bytes()
    assert not (found / "sub/b.bin").exists()


def test_what_is_made_in_the_mirror_is_sent_once_and_last_things_last(bucket, folder):
    out = storage.place(f"{bucket.url}/out")
    for name, content in files_below(folder).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (out / ".hidden").mkdir()
    (out / ".hidden/x").write_text("stays here")
    assert storage.upload(out, last="a.bin") == 4
    assert bucket.names() == {f"out/{name}" for name in files_below(folder)}
    assert storage.upload(out, last="a.bin") == 0
    with (out / "a.bin").open("ab") as file:
        file.write(b"more")
    storage.fetch(out)  # does not undo what was done here
    assert storage.upload(out) == 1
    assert bucket.read("out/a.bin") == b"xmore"
    storage.move(out / "sub", out / "bus")
    assert files_below(out / "bus").keys() == {"b.bin", "deep/Schöne Müllerin.mid"}
    storage.remove(out)
    assert not bucket.names() and not out.exists()


def test_what_is_removed_while_it_is_looked_at_is_not_sent(monkeypatch, tmp_path):
    """As a checkpoint is, of which only what lies beside it is sent."""
    monkeypatch.setenv("ARIA_JAX_CACHE", str(tmp_path))
    run, sent, ended = storage.place("gs://bucket/run"), [], threading.Event()
    monkeypatch.setattr(storage, "listing", lambda path: {})
    monkeypatch.setattr(storage, "_send", lambda path: sent.append(path.name))
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}")

    def checkpoints_come_and_go():
        while not ended.is_set():
            for step in range(8):
                (run / f"checkpoints/{step}/params/d").mkdir(parents=True)
            for step in range(8):
                shutil.rmtree(run / f"checkpoints/{step}")

    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(checkpoints_come_and_go)
        try:
            for _ in range(200):
                storage.upload(run, only=lambda name: "checkpoints" not in name)
        finally:
            ended.set()
        going.result()
    assert sent == ["metrics.jsonl"] * 200


@pytest.fixture
def hurried(monkeypatch):
    """gcsfs waits a second and more before it asks again."""
    sleep = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
    monkeypatch.setattr("gcsfs.retry.asyncio", sleep)


@pytest.mark.parametrize("kind", slow_among([429, 500, "slow", "cut", "drop"], {429, "drop"}))
@pytest.mark.usefixtures("hurried")
def test_a_failing_network_costs_time_and_nothing_else(bucket, folder, kind):
    bucket.put("in", folder)
    for method, n in (("GET", 2), ("PUT", 1), ("POST", 1)):
        bucket.network.faults.append(Fault(kind, method=method, times=n, seconds=0.1))
    found = storage.local(f"{bucket.url}/in")
    assert files_below(found) == files_below(folder)
    (found / "new").write_bytes(b"1" * 1000)
    storage.upload(found / "new")
    assert bucket.read("in/new") == b"1" * 1000
    assert bucket.network.n_faults >= 3


@pytest.mark.usefixtures("hurried")
def test_a_server_that_dies_and_comes_back_is_waited_for(bucket, folder):
    bucket.put("in", folder)
    bucket.network.down()
    threading.Timer(1.0, bucket.network.up).start()
    began = time.monotonic()
    assert files_below(storage.local(f"{bucket.url}/in")) == files_below(folder)
    assert time.monotonic() - began > 0.9


@pytest.mark.usefixtures("hurried")
def test_a_server_that_stays_away_is_given_up_with_a_word(bucket, monkeypatch):
    monkeypatch.setenv("ARIA_JAX_STORAGE_PATIENCE_S", "0.5")
    bucket.network.faults.append(Fault(503, times=1000))
    with pytest.raises(UserError, match=r"listing failed for .* run the same command again"):
        storage.local(f"{bucket.url}/in")


def test_missing_rights_are_named_with_call_and_credential(bucket, folder):
    bucket.put("in", folder)
    body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    fault = Fault(403, method="GET", times=100, body=body if bucket.url[0] == "s" else b"{}")
    bucket.network.faults.append(fault)
    who = "access key AKIATEST" if bucket.url[0] == "s" else "Google credentials"
    with pytest.raises(UserError, match=f"listing is not allowed for .*{who}"):
        storage.local(f"{bucket.url}/in")
    fault.times = 0
    bucket.network.faults.append(Fault(403, method="P", times=100, body=fault.body))
    bucket.network.faults[-1].method = "PUT" if bucket.url[0] == "s" else "POST"
    out = storage.place(f"{bucket.url}/out")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("x")
    with pytest.raises(UserError, match=f"{bucket.url}/out: writing is not allowed for .*{who}"):
        storage.upload(out)


def test_a_bucket_that_is_not_there_is_named(bucket):
    gone = f"{bucket.url}-gone"
    with pytest.raises(UserError, match=f"there is no bucket {gone}"):
        storage.local(f"{gone}/in")
    out = storage.place(f"{gone}/out")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("x")
    with pytest.raises(UserError, match="there is no bucket"):
        storage.upload(out)


def test_the_mirror_is_bounded_by_letting_go_of_what_was_not_used(bucket, folder, monkeypatch):
    for i in range(4):
        bucket.put(f"in/{i}", folder / "sub/b.bin")
    size = (folder / "sub/b.bin").stat().st_size
    monkeypatch.setenv("ARIA_JAX_CACHE_GB", str(2.5 * size / 1e9))
    found = [storage.local(f"{bucket.url}/in/{i}") for i in (0, 1)]
    os.utime(storage._known(found[1]), ns=(0, 0))
    third = storage.local(f"{bucket.url}/in/2")
    assert [p.exists() for p in (*found, third)] == [True, False, True]
    with pytest.raises(UserError, match="ARIA_JAX_CACHE_GB"):
        storage.local(f"{bucket.url}/in")


def test_large_objects_are_left_for_their_readers(bucket, folder):
    big = ("run/checkpoints/12/params/d/x", "run/checkpoints/12/record/metadata",
           "run/checkpoints/12/commit_success.txt", "corpus/train.arrayrecord")  # fmt: skip
    for name in big:
        bucket.put(name, folder / "a.bin")
    found = storage.local(bucket.url)
    assert set(files_below(found)) == set(big[1:3])
    objects = storage.listing(found)
    storage.read_ahead(found, {big[3]: objects[big[3]]})
    storage.fetch(found / big[3], lazily=False)
    storage.fetch(found / "run/checkpoints/12", lazily=False)
    assert set(files_below(found)) == set(big)
