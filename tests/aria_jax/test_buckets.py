"""The whole story in a bucket: build, train, stop, go on, embed, search; as on the disk."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aria_jax.checkpoints import newest_step
from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.checkpoints.models import load_model
from aria_jax.cli.main import main
from aria_jax.embed.table import read_embeddings, read_origin
from aria_jax.models.heads import split_model
from data_pipeline import storage
from data_pipeline.storage import buckets
from tests.buckets import Fault

SMALL = ["d_model=16", "n_heads=2", "n_layers=1", "seq_len=128", "global_batch=8", "mesh.data=8",
         "emb_size=8", "eval_every=2", "log_every=1", "checkpoint_every=1"]  # fmt: skip


def aria_jax(*arguments: object) -> None:
    assert main(list(map(str, arguments))) == 0


def train(root: str, steps: int, *more: str) -> list[object]:
    return ["train", "contrastive", "--data", f"{root}/data", "--workdir", f"{root}/run", *SMALL,
            f"steps={steps}", *more]  # fmt: skip


def story(root: str, midi: str) -> None:
    aria_jax("data", "build", midi, f"{root}/data", "--shards", 2, "--workers", 1)
    aria_jax(*train(root, 2))
    aria_jax(*train(root, 3))
    aria_jax("embed", midi, f"{root}/emb.parquet", "--checkpoint", f"{root}/run", "--workers", 0)


@pytest.fixture(scope="module")
def on_the_disk(midi_corpus, tmp_path_factory) -> Path:
    """What the story leaves on the disk."""
    root = tmp_path_factory.mktemp("disk")
    story(str(root), str(midi_corpus))
    return root


def losses(log: Path) -> list[dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    times = ("tokens_per_s", "step_s", "mfu")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def hits(capsys, query: Path, root: str) -> list:
    capsys.readouterr()
    aria_jax("search", query, f"{root}/emb.parquet", "--checkpoint", f"{root}/run", "--json")
    return json.loads(capsys.readouterr().out)["hits"]


def assert_same(root: Path, on_the_disk: Path) -> None:
    """Holds all that the story left at a place against what it leaves on the disk."""
    for file in (on_the_disk / "data").iterdir():
        if file.is_file():
            assert (root / "data" / file.name).read_bytes() == file.read_bytes(), file.name
    assert losses(root / "run/metrics.jsonl") == losses(on_the_disk / "run/metrics.jsonl")
    for model in ("run", "run/best"):
        two = [split_model(load_model(place / model).model)[1] for place in (root, on_the_disk)]
        jax.tree.map(np.testing.assert_array_equal, *two)
    two = [read_embeddings(place / "emb.parquet") for place in (root, on_the_disk)]
    np.testing.assert_array_equal(two[0].embedding, two[1].embedding)
    assert two[0].path == two[1].path and two[0].labels == two[1].labels


@pytest.mark.slow
def test_the_story_in_a_bucket_is_that_on_the_disk(bucket, midi_corpus, on_the_disk, capsys):
    midi = bucket.put("midi", midi_corpus)
    story(bucket.url, midi)
    shown = capsys.readouterr()
    assert storage.mirror().name not in shown.out and f"{bucket.url}/data: 10 of 10" in shown.out
    names = bucket.names()
    assert {"data/manifest.json", "run/metrics.jsonl", "run/config.yaml", "emb.parquet",
            "run/checkpoints/3/commit_success.txt"} <= names  # fmt: skip
    assert not [name for name in names if ".parts" in name or ".build" in name]

    shutil.rmtree(storage.mirror())  # as on another machine
    query = next(midi_corpus.glob("*.mid"))
    assert hits(capsys, query, bucket.url) == hits(capsys, query, str(on_the_disk))
    root = storage.place(bucket.url)
    storage.fetch(root, lazily=False)
    assert_same(root, on_the_disk)

    # The same again does nothing; what is missing is refused by its name.
    before = bucket.names()
    aria_jax("data", "build", midi, f"{bucket.url}/data", "--shards", 2, "--workers", 1)
    aria_jax("embed", midi, f"{bucket.url}/emb.parquet", "--checkpoint", f"{bucket.url}/run")
    assert bucket.names() == before and "nothing to do" in capsys.readouterr().out
    assert main([*map(str, train(bucket.url, 3)), "--data", f"{bucket.url}/none"]) == 2
    assert f"{bucket.url}/none: no such folder" in capsys.readouterr().err


def test_small_verbs_read_from_and_write_to_buckets(bucket, midi_corpus, tmp_path, capsys):
    midi = bucket.put("midi", midi_corpus)
    one = sorted(midi_corpus.glob("*.mid"))[0].name
    aria_jax("tokenize", f"{midi}/{one}", "--json")
    ids = capsys.readouterr().out
    (tmp_path / "ids.json").write_text(ids)
    aria_jax("detokenize", tmp_path / "ids.json", f"{bucket.url}/out/again.mid")
    assert bucket.read("out/again.mid")[:4] == b"MThd"
    assert f"{bucket.url}/out/again.mid" in capsys.readouterr().out
    aria_jax("detokenize", bucket.put("ids.json", tmp_path / "ids.json"), f"{bucket.url}/out/b.mid")
    assert bucket.read("out/b.mid") == bucket.read("out/again.mid")
    shutil.rmtree(storage.mirror())  # the record of what it was made of is in the bucket too
    aria_jax("detokenize", f"{bucket.url}/ids.json", f"{bucket.url}/out/b.mid")
    assert "nothing to do" in capsys.readouterr().err
    assert main(["detokenize", f"{bucket.url}/ids.json", f"{midi}/{one}"]) == 2
    assert f"{midi}/{one}: there already" in capsys.readouterr().err

    counting = ["--baseline", "pitch-class", "--workers", 0]
    aria_jax("embed", midi, f"{bucket.url}/all.parquet", *counting)
    aria_jax("embed", midi_corpus, tmp_path / "all.parquet", *counting)
    two = [read_embeddings(f"{bucket.url}/all.parquet"), read_embeddings(tmp_path / "all.parquet")]
    np.testing.assert_array_equal(two[0].embedding, two[1].embedding)
    assert two[0].labels == two[1].labels and read_origin(
        storage.place(f"{bucket.url}/all.parquet")
    ) == midi  # fmt: skip
    # Of files that are named, the table beside them is found too.
    aria_jax("embed", f"{midi}/{one}", f"{bucket.url}/one.parquet", *counting)
    assert read_embeddings(f"{bucket.url}/one.parquet").labels == [
        row for path, row in zip(two[1].path, two[1].labels, strict=True) if path == one
    ]


@pytest.mark.parametrize("arguments", [
    ["train", "pretrain", "--data", "http://b/x", "--workdir", "w"],
    ["train", "pretrain", "--data", "x", "--workdir", "az://b/w"],
    ["data", "build", "ftp://b/x", "out"],
    ["embed", "x", "gcs://b/emb.parquet", "--baseline", "pitch-class"],
    ["probe", "hdfs://b/emb.parquet", "--label", "x"],
    ["bench-suite", "x", "--embeddings", "other=az://b/emb.parquet"],
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_an_unknown_scheme_is_refused_before_any_work(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "gs:// or s3://" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_checkpoints_in_a_bucket_are_whole_or_not_there(bucket, capsys):
    workdir = f"{bucket.url}/run"
    arrays = {"a": jnp.arange(1000.0), "b": jnp.ones((3, 5))}
    checkpointer = Checkpointer(workdir, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, jax.tree.map(lambda x, step=step: x + step, arrays), {"x": step})
    checkpointer.close()
    shutil.rmtree(storage.mirror(), ignore_errors=True)

    # A kill leaves a beginning; damage is passed over.
    folder = storage.place(workdir) / "checkpoints"
    some = next(n for n in storage.listing(folder / "3") if n.startswith("params/d/"))
    buckets.delete(f"{workdir}/checkpoints/3/{some}")
    bucket.put("run/checkpoints/4/record/metadata", Path(__file__))
    assert newest_step(workdir).name == "3"
    like = jax.eval_shape(lambda: arrays)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        like,
    )
    checkpointer = Checkpointer(workdir, keep=2)
    assert checkpointer.steps() == [2, 3]
    with pytest.warns(UserWarning, match="checkpoint 3 is damaged"):
        step, found = checkpointer.newest(lambda step: checkpointer.restore(step, "params", like))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: x + 2, arrays))
    checkpointer.save(3, arrays, {"x": 3})
    checkpointer.close()
    assert Checkpointer(workdir, read_only=True).steps() == [2, 3]
    folders = {name.split("/")[2] for name in bucket.names()}
    assert {"2", "3", "3.damaged"} <= folders and "1" not in folders


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_an_undisturbed_one_on_the_disk(
    bucket, midi_corpus, tmp_path
):
    """kill -9 while it trains and writes, another machine's empty disk, a network that fails."""
    aria_jax("data", "build", midi_corpus, tmp_path / "data", "--workers", 1)
    bucket.put("data", tmp_path / "data")
    settings = [*SMALL[:6], "steps=40", "checkpoint_every=4", "log_every=1",
                "eval_every=20", "keep_checkpoints=2"]  # fmt: skip
    aria_jax("train", "pretrain", "--data", tmp_path / "data", "--workdir", tmp_path / "run",
             *settings)  # fmt: skip
    command = [sys.executable, "-m", "aria_jax.cli.main", "train", "pretrain", "--data",
               f"{bucket.url}/data", "--workdir", f"{bucket.url}/run", *settings]  # fmt: skip
    workdir = storage.place(f"{bucket.url}/run")

    def committed() -> list[int]:
        names = storage.listing(workdir)
        return [
            int(n.split("/")[1]) for n in names if re.fullmatch(r"checkpoints/\d+/commit_.*", n)
        ]

    env = {**os.environ, "ARIA_JAX_CACHE": str(tmp_path / "one")}
    said = (tmp_path / "stderr").open("w+")
    process = subprocess.Popen(command, env=env, stderr=said)
    until = time.monotonic() + 300
    while max(committed(), default=0) < 8 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert 8 <= max(committed(), default=0) < 40, (tmp_path / "stderr").read_text()[-2000:]

    faults = [Fault(kind, method=method, times=2, seconds=0.5) for kind in (429, 500, "slow", "cut")
              for method in ("GET", "PUT", "POST")]  # fmt: skip
    bucket.network.faults += faults
    threading.Timer(15, bucket.network.die, [2.0]).start()
    env["ARIA_JAX_CACHE"] = str(tmp_path / "two")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming" in done.stderr and bucket.network.n_faults > 4
    two = [split_model(load_model(p).model)[1] for p in (f"{bucket.url}/run", tmp_path / "run")]
    jax.tree.map(np.testing.assert_array_equal, *two)
    root = storage.local(f"{bucket.url}/run")
    here, there = (
        {(line["split"], line["step"]): line["loss"] for line in losses(place / "metrics.jsonl")}
        for place in (tmp_path / "run", root)
    )
    assert there == here
