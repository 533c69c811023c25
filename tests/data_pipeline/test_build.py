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
from data_pipeline.tokenizers import Tokenizer
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
        "import data_pipeline.build.journal as journal\njournal.UNIT_FILES = 16\n"
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
    with pytest.raises(UserError, match=r"val_fraction: 0.2 → 0.5.*--overwrite"):
        build(folder, out, filters="none", val_fraction=0.5)
    assert contents(out) == before


SMALL = {"workers": 1, "filters": "none", "val_fraction": 0.2}


@pytest.fixture(scope="module")
def few_built(folder, tmp_path_factory):
    """Six pieces of `folder`, and the corpus made of them."""
    made = tmp_path_factory.mktemp("few")
    shutil.copytree(folder / "set0", made / "midi", ignore=lambda _, names: sorted(names)[6:])
    build(made / "midi", made / "data", **SMALL)
    return made


@pytest.fixture
def few(few_built, tmp_path):
    """A copy of either that may be changed."""
    for name in ("midi", "data"):
        shutil.copytree(few_built / name, tmp_path / name)
    return tmp_path / "midi", tmp_path / "data"


def _add(midi):
    shutil.copy(midi / "0.mid", midi / "new.mid")


def _change_keeping_size_and_times(midi):
    path = midi / "0.mid"
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-10] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _remove(midi):
    (midi / "0.mid").unlink()


def _label(midi):
    (midi / "metadata.json").write_text('[{"path": "0.mid", "composer": "Clementi"}]')


@pytest.mark.parametrize(
    "change, said",
    [
        (_add, r"files: 1 file more \(first: new.mid\)"),
        (_change_keeping_size_and_times, r"files: 1 file changed \(first: 0.mid\)"),
        (_remove, r"files: 1 file fewer \(first: 0.mid\)"),
        (_label, r"labels: other labels of the same files \(composer of 0.mid none → clementi\)"),
    ],
)
def test_a_source_that_changed_is_refused_until_overwritten(few, change, said):
    midi, out = few
    before = contents(out)
    change(midi)
    with pytest.raises(UserError, match=f"{said}.*choose another output, or --overwrite"):
        build(midi, out, **SMALL)
    assert contents(out) == before and not (out / ".build").exists()


def test_what_is_overwritten_is_then_what_was_asked(few):
    midi, out = few
    before = contents(out)
    _add(midi)
    build(midi, out, **SMALL, overwrite=True)
    after = contents(out)
    assert after != before
    build(midi, out, **SMALL)
    assert contents(out) == after


def test_another_folder_is_another_corpus_and_the_same_files_elsewhere_are_the_same(
    few, folder, tmp_path
):
    midi, out = few
    before = contents(out)
    with pytest.raises(UserError, match=r"files: .* more"):
        build(folder / "set1", out, **SMALL)
    midi.rename(tmp_path / "moved")
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "moved", arcname=".")
    for same in (tmp_path / "moved", tmp_path / "archive.tar.gz"):
        build(same, out, **SMALL)
    assert contents(out) == before


def test_an_unfinished_build_goes_on_with_the_same_files_only(few, folder, tmp_path, monkeypatch):
    midi, out = few
    expected, other = contents(out), tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.merge_units", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            build(midi, other, **SMALL)
    with pytest.raises(UserError, match="holds the beginning of a corpus made otherwise"):
        build(folder / "set1", other, **SMALL)
    build(midi, other, **SMALL)
    assert contents(other) == expected
    assert sorted(p.name for p in other.iterdir()) == sorted(expected)


def test_a_smaller_corpus_leaves_no_shard_of_the_one_it_replaces(few):
    midi, out = few
    build(midi, out, **SMALL, shards=3, overwrite=True)
    build(midi, out, **SMALL, shards=1, overwrite=True)
    assert len(list(out.glob("*.arrayrecord"))) == 2


def test_a_corpus_that_does_not_say_what_it_was_made_of_is_refused(few):
    midi, out = few
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["identity"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"earlier version.*--overwrite"):
        build(midi, out, **SMALL)


@pytest.mark.parametrize("inside", ["", "tokens", "a/b"])
def test_nothing_is_written_into_the_source(few, inside):
    midi, _ = few
    before = sorted(midi.rglob("*"))
    with pytest.raises(UserError, match="nothing is written into the folder of your MIDI files"):
        build(midi, midi / inside, **SMALL)
    assert sorted(midi.rglob("*")) == before


def test_a_build_that_cannot_begin_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, settings in (
        (tmp_path / "nowhere", {}),
        (tmp_path / "empty", {}),
        (tmp_path / "empty", {"metadata": tmp_path / "no.json"}),
    ):
        with pytest.raises(UserError):
            build(source, tmp_path / "a" / "data", **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_filters_reject_with_test_and_value(folder, tmp_path):
    with pytest.raises(UserError, match="none of 303 files became a piece"):
        build(folder, tmp_path / "data", workers=1, filters="heavy")
    row = next(r for r in rejections(tmp_path / "data") if r["stage"] == "filter")
    assert row["reason"] in row["value"]


def test_inspection_adds_up(built):
    out, summary = built
    found = inspect(out)
    assert sum(s["n_pieces"] for s in found.splits.values()) == 300
    assert sum(s["n_notes"] for s in found.splits.values()) == summary.n_notes
    assert sum(found.rejected.values()) == 3 and len(found.labels["composition"]) == 150
    assert any(line.startswith("piano ") and "onset" in line for line in found.first_lines)
