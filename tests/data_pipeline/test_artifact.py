"""An artefact knows what it was made of; what is there is replaced only when that was said."""

import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.artifact import (
    Identity,
    There,
    atomic,
    hashed,
    listing_difference,
    look,
    new_folder,
    refuse_inside,
    rows_digest,
    write_atomically,
)
from data_pipeline.errors import UserError

values = st.one_of(st.none(), st.integers(2, 9), st.floats(0.1, 0.9), st.text("ab", max_size=3))
settings = st.dictionaries(st.sampled_from("abc"), st.one_of(values, st.lists(values, max_size=2)))
inputs = st.dictionaries(st.sampled_from("xyz"), st.one_of(st.none(), st.sampled_from("123")))
identities = st.builds(Identity, st.sampled_from(["k", "l"]), st.integers(1, 2), inputs, settings)


@given(identities, identities)
def test_identities_are_equal_where_nothing_differs(one, other):
    assert (one == other) == (not one.differences(other)) == (one.digest == other.digest)
    assert Identity.from_json(json.loads(json.dumps(one.to_json()))) == one


@given(identities, st.one_of(st.none(), identities), st.one_of(st.none(), identities))
def test_only_the_same_goes_on_and_only_overwriting_replaces(asked, finished, begun):
    try:
        there = look("out", asked, finished=finished, unfinished=begun)
    except UserError as error:
        other = finished or begun
        assert other is not None and other != asked
        assert "out" in str(error) and "--overwrite" in str(error) and "another" in str(error)
    else:
        assert there is (
            There.DONE
            if finished == asked
            else There.RESUME
            if finished is None and begun == asked
            else There.FRESH
        )
        assert there is not There.FRESH or (finished is None and begun is None)
    assert look("out", asked, finished=finished, unfinished=begun, overwrite=True) is (
        There.RESUME if begun == asked else There.FRESH
    )


def test_a_refusal_names_each_difference():
    before = Identity("a corpus", 1, {"files": "a" * 64, "labels": None}, {"val": 0.1, "n": (1,)})
    now = Identity("a corpus", 1, {"files": "b" * 64, "labels": None}, {"val": 0.2, "n": [1]})
    assert now.differences(before) == [
        "files: aaaaaaaaaaaa → bbbbbbbbbbbb", "val: 0.1 → 0.2"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"3 files more; val: 0\.1 → 0\.2"):
        look("out", now, finished=before, details=lambda _: {"files": "3 files more"})


def test_a_refusal_names_three_differences_at_most_in_the_words_of_the_settings():
    many = {"filters": {"silence": {"max_s": 20, "n": 1}}, "a": 1, "b": 1, "tokenizer_hash": "1"}
    other = {"filters": {"silence": {"max_s": 30, "n": 1}}, "a": 2, "b": 2, "tokenizer_hash": "2"}
    before, now = Identity("a corpus", 1, {"x": "1"}, many), Identity("a corpus", 1, {}, other)
    with pytest.raises(UserError, match=r"\(x: 1 → none; a: 1 → 2; b: 1 → 2; and 1 more diff"):
        look("out", now, finished=before)
    with pytest.raises(UserError, match=r"a: 1 → 2; b: 1 → 2; filters\.silence\.max_s: 20 → 30\)"):
        look("out", now, finished=before, details=lambda _: {"x": ""})
    assert now.differences(now) == []


listings = st.dictionaries(st.text("ab/\udc80é", max_size=3), st.sampled_from("12"), max_size=6)


@given(listings, listings)
def test_listings_are_told_apart(before, now):
    def rows(files):
        return sorted(files.items(), key=lambda row: os.fsencode(row[0]))

    said = listing_difference(rows(before), rows(now))
    expected = {
        "more": len(now.keys() - before.keys()),
        "fewer": len(before.keys() - now.keys()),
        "changed": sum(before[path] != now[path] for path in before.keys() & now.keys()),
    }
    assert (said == "the same files") == (not any(expected.values())) == (before == now)
    for kind, n in expected.items():
        unit = "file" if n == 1 else "files"
        assert not n or f"{n} {kind}" in said or f"{n} {unit} {kind}" in said
    assert (rows_digest(rows(before)) == rows_digest(rows(now))) == (before == now)
    said.encode()  # printable whatever the paths' bytes are


def test_hashing_keeps_the_order():
    assert list(hashed(iter(range(5000)), str)) == [(i, str(i)) for i in range(5000)]


def test_a_write_is_all_or_nothing_and_is_flushed(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle)), real(handle)))
    write_atomically(tmp_path / "a", "one")
    assert len(synced) == 2, "the file and its folder"
    with pytest.raises(RuntimeError), atomic(tmp_path / "a") as partial:
        partial.write_text("tw")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_many_may_write_one_file_at_once(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    threads = [
        threading.Thread(target=lambda t=text: [write_atomically(tmp_path / "a", t)] * 5)
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "work").touch()
        raise RuntimeError
    assert (tmp_path / "a" / "b" / "work").exists(), "what was done is kept"
    with pytest.raises(UserError, match="a file is where a folder"), new_folder(folder / "work"):
        pass


def test_what_lies_in_the_source_is_refused_through_links_too(tmp_path):
    (tmp_path / "midi" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "midi")
    for out in ("midi", "midi/new", "link/new", "link/sub/../x"):
        with pytest.raises(UserError, match="nothing is written into your files"):
            refuse_inside(tmp_path / out, tmp_path / "midi", "your files")
    refuse_inside(tmp_path / "midi-data", tmp_path / "midi", "your files")
    refuse_inside(tmp_path, tmp_path / "midi", "your files")
