"""Building a corpus: killed at any moment, fed with rubbish, from folders and archives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.inspection import inspect
from data_pipeline.midi import midi_bytes, read_midi
from data_pipeline.shards import TokenShards, rejections
from data_pipeline.tokenizer import Tokenizer
from tests.corpora import random_performance


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 pieces of 150 compositions, an exact copy, and files that cannot be used."""
    made, rng, rows = tmp_path_factory.mktemp("midi"), np.random.default_rng(0), []
    for i in range(300):
        path = made / f"set{i % 3}" / f"{i}.{('mid', 'MIDI', 'kar')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(midi_bytes(random_performance(rng, 30)))
        rows.append({"path": str(path.relative_to(made)), "composition": f"work {i // 2}"})
    (made / "zz-copy.mid").write_bytes((made / "set0" / "0.mid").read_bytes())
    (made / "text.mid").write_text("this is no MIDI")
    (made / "cut.mid").write_bytes((made / "set0" / "3.mid").read_bytes()[:60])
    (made / "metadata.json").write_text(json.dumps(rows))
    return made


def contents(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data"
    return out, build(folder, out, workers=2, filters="none", val_fraction=0.2)


def test_every_file_is_a_piece_or_a_named_rejection(built, folder):
    out, summary = built
    assert (summary.n_files, summary.n_accepted, summary.n_rejected) == (303, 300, 3)
    reasons = {row["path"]: row["reason"] for row in rejections(out)}
    assert reasons["text.mid"] == "not-midi" and reasons["cut.mid"] == "truncated"
    tokenizer, seen = Tokenizer.preset("aria"), {}
    for split in ("train", "val"):
        shards = TokenShards(out, split, tokenizer)
        for i in range(len(shards)):
            seen[shards[i].meta["path"]] = shards[i].ids
    assert len(seen) == 300
    for path in list(seen)[::40]:
        np.testing.assert_array_equal(seen[path], tokenizer.encode(read_midi(folder / path)))


def test_no_composition_is_on_both_sides(built):
    out, summary = built
    assert 20 < summary.n_val < 100
    works = []
    for split in ("train", "val"):
        shards = TokenShards(out, split)
        works.append({shards[i].meta["labels"]["composition"] for i in range(len(shards))})
    assert not works[0] & works[1]


def test_killed_at_any_moment_it_ends_with_the_same_bytes(built, folder, tmp_path):
    """SIGKILL to the build's whole process group at twenty random moments, then one last run."""
    code = (
        "import sys\nfrom data_pipeline.build import build\n"
        "import data_pipeline.building.journal as journal\njournal.UNIT_FILES = 16\n"
        "if __name__ == '__main__':\n"
        "    build(sys.argv[1], sys.argv[2], workers=1, filters='none', val_fraction=0.2)\n"
    )
    out, rng, kills = tmp_path / "data", np.random.default_rng(0), 0
    command = [sys.executable, "-c", code, str(folder), str(out)]
    for _ in range(60):
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(float(rng.uniform(0.1, 0.9)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if kills == 20:
            break
        if (out / "manifest.json").exists():
            shutil.rmtree(out)
    subprocess.run(command, check=True)
    assert kills == 20
    assert contents(out) == contents(built[0])


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz")])
def test_an_archive_is_the_folder(built, folder, tmp_path, suffix, mode):
    archive = tmp_path / f"midi{suffix}"
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, arcname=".")
    # Its label table is in the archive, too.
    build(archive, tmp_path / "data", workers=1, filters="none", val_fraction=0.2)
    assert contents(tmp_path / "data") == contents(built[0])


def test_a_finished_build_is_left_alone_and_other_settings_are_refused(built, folder):
    out, summary = built
    before = contents(out)
    assert build(folder, out, filters="none", val_fraction=0.2) == summary
    assert contents(out) == before
    with pytest.raises(UserError, match=r"other settings \(val_fraction\)"):
        build(folder, out, filters="none", val_fraction=0.5)


def test_filters_reject_with_test_and_value(folder, tmp_path):
    summary = build(folder, tmp_path / "data", workers=1, filters="heavy")
    assert summary.n_accepted < 300
    row = next(r for r in rejections(tmp_path / "data") if r["stage"] == "filter")
    assert row["reason"] in row["value"]


def test_inspection_adds_up(built):
    out, summary = built
    found = inspect(out)
    assert sum(s["n_pieces"] for s in found.splits.values()) == 300
    assert sum(s["n_notes"] for s in found.splits.values()) == summary.n_notes
    assert sum(found.rejected.values()) == 3 and len(found.labels["composition"]) == 150
    assert any(line.startswith("piano ") and "onset" in line for line in found.first_lines)
