"""A hostile file costs itself only: it is named with its reason, all others are built."""

import os
import shutil

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.build.unit_worker import Limits
from data_pipeline.midi import midi_bytes
from data_pipeline.shards import rejections
from tests.corpora import random_performance

HEADER = b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0"


def one_track(body):
    return HEADER + b"MTrk" + len(body).to_bytes(4, "big") + body


GOOD = midi_bytes(random_performance(np.random.default_rng(0), 300))
MANY_NOTES = one_track(b"\x00\x90\x3c\x40" + b"\x01\x3c\x00\x00\x3c\x40" * 1_000_000)
HOSTILE = {
    "empty": (b"", "not-midi"),
    "truncated": (GOOD[:200], "truncated"),
    "two-gigabytes-declared": (HEADER + b"MTrk\x7f\xff\xff\xff", "truncated"),
    "more-tracks-than-there-are": (HEADER[:10] + b"\x7f\xff" + GOOD[12:], "truncated"),
    "zero-division": (GOOD[:12] + b"\x00\x00" + GOOD[14:], "no-ticks-per-beat"),
    "ten-million-notes": (
        one_track(b"\x00\x90\x3c\x40" + b"\x01\x3c\x00\x00\x3c\x40" * 10_000_000), "too-large"),
    "status-bytes-only": (one_track(b"\x00\xf7" * 50_000), None),
    "running-status": (one_track(b"\x00\x3c\x40" * 1000), "running-status-without-status"),
    "huge-delta-times": (
        one_track(b"\x00\x90\x3c\x40" + b"\xff\xff\xff\x7f\x3c\x00\x00\x3c\x40" * 1000),
        "too-long"),
    "noise": (np.random.default_rng(1).bytes(100_000), "not-midi"),
    "noise-in-a-track": (one_track(np.random.default_rng(2).bytes(100_000)), None),
}  # fmt: skip


def folder_of(files, folder):
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.mid").write_bytes(data)
    return folder


def test_every_hostile_file_is_quarantined_with_its_reason(midi_corpus, tmp_path):
    folder = folder_of({name: data for name, (data, _) in HOSTILE.items()}, tmp_path / "midi")
    shutil.copytree(midi_corpus, folder / "good")
    os.symlink(folder / "nowhere.mid", folder / "dangling.mid")
    summary = build(folder, tmp_path / "data", workers=2, filters="none")
    reasons = {row["path"]: row["reason"] for row in rejections(tmp_path / "data")}
    assert not [path for path in reasons if path.startswith("good/")]
    assert summary.n_files == 10 + len(HOSTILE) + 1
    assert reasons["dangling.mid"] == "broken-link"
    assert summary.n_accepted + summary.n_rejected == summary.n_files
    for name, (_, reason) in HOSTILE.items():
        if reason is not None:
            assert reasons[f"{name}.mid"] == reason
    assert "error" not in reasons.values(), "every rejection here was foreseen"


@pytest.mark.parametrize(
    "limits, reason",
    [
        (Limits(file_bytes=1 << 20), {"too-large"}),
        # Enough for a piece of music, not for a million notes.
        (Limits(memory_bytes=200 << 20), {"memory-limit", "worker-died"}),
        (Limits(cpu_s=0.15), {"time-limit"}),
    ],
)
def test_a_file_over_a_limit_costs_only_itself(midi_corpus, tmp_path, limits, reason):
    folder = folder_of({"many-notes": MANY_NOTES}, tmp_path / "midi")
    for number, path in enumerate(sorted(midi_corpus.glob("*.mid"))[:3]):
        shutil.copy(path, folder / f"{'az'[number % 2]}-{path.name}")
    summary = build(folder, tmp_path / "data", workers=1, filters="none", limits=limits)
    rows = list(rejections(tmp_path / "data"))
    assert [row["path"] for row in rows] == ["many-notes.mid"]
    assert rows[0]["reason"] in reason and summary.n_accepted == 3
