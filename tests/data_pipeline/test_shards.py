"""Shards give back what was written, the index agrees with the records, misuse is explained."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.artifact import write_atomically
from data_pipeline.build.journal import pack_unit, rejection
from data_pipeline.build.merge import MergeSettings, composition_key, in_validation, merge_units
from data_pipeline.errors import UserError
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.shards import FORMAT_VERSION, MANIFEST, TokenShards, rejections

HOW = MergeSettings(val_fraction=0.3, dedup="exact", max_per_composition=None, shards=3)


def _pieces(n, seed=0):
    """n made-up pieces: (summary, ids), three to a composition, every fifth without labels."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        ids = rng.integers(0, 17727, size=int(rng.integers(5, 400)), dtype=np.uint16)
        labels = {} if i % 5 == 0 else {"composition": f"work {i // 3}", "composer": f"c{i % 4}"}
        yield (
            {
                "path": f"a/{i:03d} é.mid",
                "sha256": f"{i:064x}",
                "duration_ms": 1000 * i,
                "n_notes": len(ids) // 3,
                "n_tokens": len(ids),
                "labels": labels,
                "content": f"{i:032x}" + "0" * 32,
            },
            ids,
        )


def _write_units(folder, results, size=7):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(results), size):
        part = results[start : start + size]
        path = folder / f"unit-{start:04d}"
        blobs = [ids.astype("<u2").tobytes() for _, ids in part]
        write_atomically(path, pack_unit([summary for summary, _ in part], blobs))
        paths.append(path)
    return paths


def _corpus(tmp_path, results, how=HOW, tokenizer_hash="a" * 64):
    out = tmp_path / "out"
    out.mkdir(parents=True)
    counts = merge_units(_write_units(tmp_path / "units", results), out / "final", out, how)
    tokenizer = {"preset": "aria", "hash": tokenizer_hash}
    manifest = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer, **counts}
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out, counts


def test_every_piece_comes_back_once_with_its_meta_and_index(tmp_path):
    results = list(_pieces(40))
    out, counts = _corpus(tmp_path, results)
    want = {summary["path"]: (summary, ids) for summary, ids in results}
    for split in ("train", "val"):
        shards = TokenShards(out, split)
        for i in range(len(shards)):
            record = shards[i]
            summary, ids = want.pop(record.meta["path"])
            np.testing.assert_array_equal(record.ids, ids)
            assert record.ids.dtype == np.uint16
            for key in ("sha256", "duration_ms", "n_notes", "labels"):
                assert record.meta[key] == summary[key]
            assert shards.lengths[i] == len(ids)
            assert shards.n_notes[i] == summary["n_notes"]
            for label in ("composer", "composition"):
                codes, values = shards.label_codes(label)
                value = None if codes[i] < 0 else values[codes[i]]
                assert value == summary["labels"].get(label)
    assert not want
    assert counts["n_accepted"] == 40 and counts["n_rejected"] == 0


def test_no_composition_is_in_both_splits(tmp_path):
    out, _ = _corpus(tmp_path, list(_pieces(60)))
    found = {}
    for split in ("train", "val"):
        codes, values = TokenShards(out, split).label_codes("composition")
        found[split] = {values[code] for code in codes if code >= 0}
    assert found["train"] and found["val"] and not found["train"] & found["val"]


def test_shards_differ_by_at_most_one_piece_of_tokens(tmp_path):
    results = list(_pieces(60))
    _, counts = _corpus(tmp_path, results)
    longest = max(summary["n_tokens"] for summary, _ in results)
    tokens = [shard["n_tokens"] for shard in counts["splits"]["train"]["shards"]]
    assert len(tokens) == 3 and max(tokens) - min(tokens) <= longest


def test_duplicates_and_caps_are_recorded_and_the_first_piece_stays(tmp_path):
    results = list(_pieces(9))
    results[4][0]["content"] = results[1][0]["content"]
    results.append((rejection("bad.mid", "parse", "not-midi", "no MThd"), np.zeros(0, np.uint16)))
    how = MergeSettings(val_fraction=0.0, dedup="exact", max_per_composition=2, shards=1)
    out, counts = _corpus(tmp_path, results, how)
    lines = {(line["path"], line["reason"]): line for line in rejections(out)}
    assert lines["a/004 é.mid", "exact-duplicate"]["value"] == "a/001 é.mid"
    # Of "work 2" (6, 7, 8) the two with the smallest content hash stay.
    assert lines["a/008 é.mid", "composition-cap"]["value"] == "work 2"
    assert lines["bad.mid", "not-midi"]["stage"] == "parse"
    assert len(lines) == counts["n_rejected"] == 3 and counts["n_accepted"] == 7


def test_equal_results_give_equal_bytes_even_over_a_half_written_merge(tmp_path):
    results = list(_pieces(30))
    out, _ = _corpus(tmp_path / "a", results)
    again = tmp_path / "b"
    (again / "final").mkdir(parents=True)
    (again / "final" / "train-00000-of-00003.arrayrecord").write_bytes(b"cut short")
    merge_units(_write_units(tmp_path / "units", results, size=4), again / "final", again, HOW)
    made = {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()}
    assert made and made == {name: (out / name).read_bytes() for name in made}


def test_split_by_hash_never_leaves_a_split_empty_and_moves_nothing_as_music_is_added():
    works = np.array([composition_key(f"work {i}") for i in range(200)], np.uint64)

    def sides(n, fraction, kept=None):
        kept = np.ones(n, bool) if kept is None else kept
        return in_validation(works[:n], kept, fraction)

    assert 20 <= sides(200, 0.2).sum() <= 60
    assert sides(200, 0.2)[:150].tolist() == sides(150, 0.2).tolist()
    for fraction in (0.001, 0.999):
        assert 0 < sides(3, fraction).sum() < 3
    assert not sides(200, 0.0).any()
    # What is dropped cannot fill a split.
    kept = ~sides(200, 0.2)
    assert 0 < (sides(200, 0.2, kept) & kept).sum() < kept.sum()


def test_shards_work_in_another_process_or_thread(tmp_path):
    out, _ = _corpus(tmp_path, list(_pieces(20)))
    shards = TokenShards(out, "train")
    first = shards[0]
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy[0].ids, first.ids)
    np.testing.assert_array_equal(copy[-1].ids, shards[len(shards) - 1].ids)
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_misuse_is_explained(tmp_path):
    out, counts = _corpus(tmp_path, list(_pieces(20)))
    with pytest.raises(UserError, match="--tokenizer"):
        TokenShards(out, "train", SimpleNamespace(hash="b" * 64))
    TokenShards(out, "train", SimpleNamespace(hash="a" * 64))
    with pytest.raises(UserError, match="no split 'test'"):
        TokenShards(out, "test")
    with pytest.raises(UserError, match="data build"):
        TokenShards(tmp_path, "train")
    shard = out / counts["splits"]["train"]["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes instead of"):
        TokenShards(out, "train")


def test_a_file_that_may_not_be_read_is_not_called_damaged(corpus, tmp_path, monkeypatch):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    for pattern in ("train-00000*.arrayrecord", "train-index.npz"):
        (path,) = folder.glob(pattern)
        with monkeypatch.context() as patch:  # root may read everything
            patch.setattr(os, "access", lambda file, mode, path=path: str(file) != str(path))
            with pytest.raises(UserError, match=f"{path.name}: may not be read; .*chmod u.r"):
                TokenShards(folder, "train")[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_or_index_is_named_wherever_a_bit_flips(corpus, tmp_path, workers):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    intact = [record.ids.tolist() for record in TokenShards(folder, "train")]
    rng, n_found = np.random.default_rng(0), 0
    for pattern in ("train-00000*.arrayrecord", "train-index.npz"):
        (path,) = folder.glob(pattern)
        data = path.read_bytes()
        used = max(np.flatnonzero(np.frombuffer(data, np.uint8))) + 1
        for at in rng.integers(0, used, 12):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            try:
                read = [record.ids.tolist() for record in TokenShards(folder, "train")]
            except UserError as error:
                n_found += 1
                assert str(path) in str(error) and "damaged" in str(error)
            else:  # headers and padding that no record depends on
                assert read == intact
        path.write_bytes(data)
    assert n_found > 6
    (path,) = folder.glob("train-00000*.arrayrecord")
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[500::977] ^= 0x10
    path.write_bytes(data.tobytes())
    stream = lm_windows(
        folder, split="train", seq_len=64, global_batch=8, seed=0, workers=workers, epochs=1
    )
    with pytest.raises(UserError, match="damaged"):
        list(stream.iterate())
