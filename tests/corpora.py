"""Small self-made corpora for the tests of the data room, and what else is made once a session."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import shards
from data_pipeline.midi import NOTE, Performance, write_midi
from data_pipeline.tokenizers import Tokenizer


def random_performance(rng: np.random.Generator, n_notes: int) -> Performance:
    """A piano performance at 1 tick = 1 ms with chords, rests and every velocity."""
    notes = np.zeros(n_notes, NOTE)
    notes["start"] = np.cumsum(rng.choice([0, 40, 130, 260, 500, 2500], n_notes))
    notes["end"] = notes["start"] + rng.integers(50, 1500, n_notes)
    notes["pitch"] = rng.integers(30, 100, n_notes)
    notes["velocity"] = rng.integers(10, 120, n_notes)
    return Performance(500, notes)


def write_corpus(
    folder: Path, split: str, pieces: list[tuple[np.ndarray, dict[str, str]]], n_shards: int = 2
) -> None:
    """Writes (ids, labels) as token shards of `split`."""
    tokenizer = Tokenizer.preset("aria")
    entries, indexes = [], []
    for number, part in enumerate(np.array_split(np.arange(len(pieces)), n_shards)):
        writer = shards.ShardWriter(folder / shards.shard_name(split, number, n_shards))
        index = shards.IndexWriter()
        for i in part:
            ids, labels = pieces[i]
            n_notes = tokenizer.n_notes(ids)
            meta = {"path": f"{i}.mid", "sha256": "", "duration_ms": 0}
            writer.write(ids, {**meta, "n_notes": n_notes, "labels": labels})
            index.add(len(ids), n_notes, 0, labels)
        entries.append(writer.close())
        indexes.append(index)
    shards.write_index(folder / shards.index_name(split), indexes)
    path = folder / shards.MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {"splits": {}}
    manifest |= {
        "format_version": shards.FORMAT_VERSION,
        "tokenizer": {"preset": "aria", "hash": tokenizer.hash},
    }
    manifest["splits"][split] = {"shards": entries}
    path.write_text(json.dumps(manifest))
    (folder / shards.REJECTED).touch()


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable) -> Path:
    """A folder that `make(folder)` fills, once for all workers of a session. Read only."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder.with_name(f"{name}.done")).exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Token shards of 23 pieces of 12 to 400 notes (train) and 5 (val) by three composers."""
    folder = tmp_path_factory.mktemp("corpus")
    rng, tokenizer = np.random.default_rng(0), Tokenizer.preset("aria")
    for split, count in (("train", 23), ("val", 5)):
        pieces = []
        for i in range(count):
            performance = random_performance(rng, int(rng.integers(12, 400)))
            labels = {
                "composer": ("bach", "chopin", "liszt")[i % 3],
                "composition": f"work {i // 2}",
            }
            pieces.append((tokenizer.encode(performance, labels=labels), labels))
        write_corpus(folder, split, pieces)
    return folder


@pytest.fixture(scope="session")
def midi_corpus(tmp_path_factory) -> Path:
    """Ten MIDI files of 320 notes with metadata.json: two composers, one low and slow, one high
    and fast; long enough for slices of 100 notes and more. Read only.
    """
    return once(tmp_path_factory, "midi-corpus", _write_midi_corpus)


def _write_midi_corpus(folder: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(10):
        composer = ("lento", "presto")[i % 2]
        fast = composer == "presto"
        notes = np.zeros(320, NOTE)
        notes["start"] = np.cumsum(rng.integers(80, 200, 320) * (1 if fast else 3))
        notes["end"] = notes["start"] + 150
        notes["pitch"] = rng.integers(70, 100, 320) if fast else rng.integers(36, 66, 320)
        notes["velocity"] = rng.integers(40, 100, 320)
        write_midi(Performance(500, notes), folder / f"{composer}_{i}.mid")
        composition = f"{composer} work {i // 2}"
        row = {"path": f"{composer}_{i}.mid", "composer": composer, "composition": composition}
        rows.append(row)
    (folder / "metadata.json").write_text(json.dumps(rows))
