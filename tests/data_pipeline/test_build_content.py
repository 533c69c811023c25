"""What ends up in a corpus: one piece for each performance, labelled, cleaned, filtered."""

import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.build.merge import DEDUP
from data_pipeline.cleaning import Cleaning
from data_pipeline.errors import UserError
from data_pipeline.inspection import inspect
from data_pipeline.midi import NOTE, PEDAL, PROGRAM, Performance, midi_bytes, read_midi
from data_pipeline.shards import TokenShards, load_manifest, rejections
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance
from tests.smf import midi_file, track

ALL = {"workers": 1, "filters": "none", "val_fraction": 0.0}


def pieces(out):
    """Record of each path of the training split."""
    shards = TokenShards(out, "train")
    records = [shards[i] for i in range(len(shards))]
    return {record.meta["path"]: record for record in records}


def rejected(out):
    return {row["path"]: (row["reason"], row["value"]) for row in rejections(out)}


def altered(performance, semitones, factor):
    notes = performance.notes.copy()
    notes["pitch"] += np.uint8(semitones)
    for side in ("start", "end"):
        notes[side] = np.rint(notes[side] * factor)
    return replace(performance, notes=notes)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Four performances; of the first an exact, a transposed and a trimmed, stretched copy."""
    folder, rng = tmp_path_factory.mktemp("copies"), np.random.default_rng(0)
    originals = [random_performance(rng, 300) for _ in range(4)]
    files = {f"original-{i}": p for i, p in enumerate(originals)}
    files["a-cut"] = altered(originals[0].slice_notes(20, 280), 0, 1.1)
    files["transposed"] = altered(originals[0], 3, 1.0)
    files["zz-same"] = replace(originals[0], ticks_per_beat=500)
    for name, performance in files.items():
        (folder / f"{name}.mid").write_bytes(midi_bytes(performance))
    return folder


@pytest.mark.parametrize("dedup", DEDUP)
def test_copies_go_as_far_as_asked(copies, tmp_path, dedup):
    build(copies, tmp_path / "data", dedup=dedup, **ALL)
    gone = rejected(tmp_path / "data")
    assert len(pieces(tmp_path / "data")) + len(gone) == 7
    if dedup == "none":
        assert not gone
    elif dedup == "exact":
        assert gone == {"zz-same.mid": ("exact-duplicate", "original-0.mid")}
    else:
        assert {name for name, _ in gone.values()} <= {"exact-duplicate", "near-duplicate"}
        kept = set(pieces(tmp_path / "data"))
        # The longest is kept, here three of one length: the one with the smallest hash.
        (kept_one,) = kept - {"original-1.mid", "original-2.mid", "original-3.mid"}
        assert kept_one != "a-cut.mid"
        assert {value for _, value in gone.values()} == {kept_one}


def test_near_duplicates_do_not_depend_on_units_or_a_second_run(copies, tmp_path, monkeypatch):
    import data_pipeline.build.journal as journal

    build(copies, tmp_path / "a", dedup="near", **ALL)
    monkeypatch.setattr(journal, "UNIT_FILES", 2)
    build(copies, tmp_path / "b", dedup="near", **ALL)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_composition_has_at_most_so_many_performances(copies, tmp_path):
    rows = [{"path": f"original-{i}.mid", "composition": f"work {i // 3}"} for i in range(4)]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    settings = {**ALL, "metadata": tmp_path / "m.json"}
    build(copies, tmp_path / "data", max_per_composition=2, **settings)
    capped = [p for p, why in rejected(tmp_path / "data").items() if why[0] == "composition-cap"]
    assert len(capped) == 1 and capped[0] in {f"original-{i}.mid" for i in range(3)}
    assert rejected(tmp_path / "data")[capped[0]][1] == "work 0"


def text(words: str) -> bytes:
    return b"\x00\xff\x01" + bytes([len(words)]) + words.encode("latin1")


@pytest.fixture
def texts(tmp_path):
    """Files whose text events name a composer or a form; one is also in the table."""
    folder = tmp_path / "texts"
    folder.mkdir()
    note = (b"\x00\x90\x3c\x40", b"\x60\x3c\x00")
    for name, words in (
        ("1", "Nocturne by Frederic Chopin"),
        ("2", "Mozart: sonata"),
        ("3", "Bach or Liszt"),
        ("haydn-4", "Mozart"),
    ):
        (folder / f"{name}.mid").write_bytes(midi_file(track(text(words), *note)))
    (folder / "metadata.json").write_text('[{"path": "2.mid", "composer": "Salieri"}]')
    return folder


def test_texts_name_what_tables_and_file_names_do_not(texts, tmp_path):
    build(texts, tmp_path / "data", **{**ALL, "dedup": "none"})
    labels = {path: record.meta["labels"] for path, record in pieces(tmp_path / "data").items()}
    assert labels == {
        "1.mid": {"composer": "chopin", "form": "nocturne"},
        "2.mid": {"composer": "salieri", "form": "sonata"},
        "3.mid": {},
        "haydn-4.mid": {"composer": "haydn"},
    }
    tokenizer = Tokenizer.preset("aria")
    prefix = pieces(tmp_path / "data")["1.mid"].ids[:3].tolist()
    assert tokenizer.id_of(("prefix", "composer", "chopin")) in prefix


def paths_of(out):
    """Paths of each split."""
    shards = {split: TokenShards(out, split) for split in load_manifest(out)["splits"]}
    return {name: {s[i].meta["path"] for i in range(len(s))} for name, s in shards.items()}


@pytest.fixture
def official(copies, tmp_path):
    """Builds the originals with the split that their table gives them."""
    folder = tmp_path / "midi"
    folder.mkdir()
    for i in range(4):
        shutil.copy(copies / f"original-{i}.mid", folder / f"{i}.mid")

    def run(splits, **settings):
        rows = [{"path": f"{i}.mid", "split": split} for i, split in enumerate(splits) if split]
        (folder / "metadata.json").write_text(json.dumps(rows))
        out = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        return build(folder, out, workers=1, filters="none", **settings), paths_of(out)

    return run


def test_a_published_split_is_followed(official):
    summary, found = official(["Train", "test", "VALIDATION", "dev"])
    assert found == {"train": {"0.mid"}, "val": {"2.mid", "3.mid"}, "test": {"1.mid"}}
    assert (summary.n_train, summary.n_val, summary.n_test, summary.warnings) == (1, 2, 1, [])
    _, found = official(["train", "train", "train", "val"])
    assert found == {"train": {"0.mid", "1.mid", "2.mid"}, "val": {"3.mid"}}


def test_without_validation_pieces_some_training_pieces_validate(official):
    summary, found = official(["train", "test", "train", "train"], val_fraction=0.4)
    assert found["test"] == {"1.mid"} and summary.n_val and not summary.warnings
    assert found["train"] | found["val"] == {"0.mid", "2.mid", "3.mid"}


def test_a_split_that_some_pieces_have_only_keeps_its_test_pieces_apart(official):
    splits = ["test", "val", "val", None]
    summary, found = official(splits, val_fraction=0.0)
    assert found == {"train": {"1.mid", "2.mid", "3.mid"}, "val": set(), "test": {"0.mid"}}
    assert "3 of 4 pieces have a published split, so it is not followed" in summary.warnings[0]
    summary, found = official(splits, val_fraction=0.0, split_column="split")
    assert found == {"train": {"3.mid"}, "val": {"1.mid", "2.mid"}, "test": {"0.mid"}}
    assert "the others are divided by composition" in summary.warnings[0]
    summary, found = official(splits, val_fraction=0.0, split_column="none")
    assert found == {"train": {f"{i}.mid" for i in range(4)}, "val": set()}
    assert not summary.warnings


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_what_stands_for_a_test_piece_is_not_trained_on(copies, tmp_path, dedup):
    """Of equal pieces the first by path is kept; here the other one belongs to the test set."""
    rows = [{"path": f"{path.stem}.mid", "split": "train"} for path in copies.glob("*.mid")]
    for row in rows:
        row["split"] = "test" if row["path"] == "zz-same.mid" else "train"
    (tmp_path / "m.json").write_text(json.dumps(rows))
    build(copies, tmp_path / "d", metadata=tmp_path / "m.json", **{**ALL, "dedup": dedup})
    found = paths_of(tmp_path / "d")
    assert len(found["test"]) == 1 and not found["test"] & found["train"]
    assert rejected(tmp_path / "d").get("zz-same.mid", ("", *found["test"]))[1] in found["test"]


def test_maestro_as_it_ships(copies, tmp_path):
    root = tmp_path / "maestro-v3.0.0"
    for i in range(4):
        (root / f"{2004 + i}").mkdir(parents=True)
        shutil.copy(copies / f"original-{i}.mid", root / f"{2004 + i}" / "a.midi")
    rows = {
        "canonical_composer": ["Frédéric Chopin"] * 4,
        "canonical_title": [f"Étude {i}" for i in range(4)],
        "split": ["train", "validation", "test", "train"],
        "year": [2004, 2005, 2006, 2007],
        "midi_filename": [f"{2004 + i}/a.midi" for i in range(4)],
        "duration": [9.5] * 4,
    }
    numbered = {name: dict(enumerate(column)) for name, column in rows.items()}
    (root / "maestro-v3.0.0.json").write_text(json.dumps(numbered))
    build(root, tmp_path / "here", workers=1, filters="none", dedup="none")
    found = paths_of(tmp_path / "here")
    assert found["test"] == {"2006/a.midi"} and found["val"] == {"2005/a.midi"}
    test = TokenShards(tmp_path / "here", "test")[0].meta["labels"]
    assert (test["composer"], test["title"], test["year"]) == ("chopin", "Étude 2", "2006")
    assert inspect(tmp_path / "here").splits["test"]["n_pieces"] == 1


def test_a_table_that_names_no_file_is_told_in_the_summary(texts, tmp_path):
    (texts / "metadata.json").write_text('[{"path": "/music/2.mid", "composer": "Salieri"}]')
    for _ in range(2):  # also where the corpus is finished
        summary = build(texts, tmp_path / "data", **ALL)
        assert "/music/2.mid; the files are 1.mid, 2.mid, 3.mid" in summary.warnings[0]


def test_another_table_beside_the_files_is_another_corpus(texts, tmp_path):
    build(texts, tmp_path / "data", **ALL)
    build(texts, tmp_path / "data", **ALL)  # nothing to do
    (texts / "metadata.json").write_text('[{"path": "2.mid", "composer": "Clementi"}]')
    with pytest.raises(UserError, match="labels: other labels"):
        build(texts, tmp_path / "data", **ALL)


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz")])
def test_the_table_inside_an_archive_is_read(texts, tmp_path, suffix, mode):
    """As Aria-MIDI ships: one folder with metadata.json and data/aa/000017_0.mid."""
    with tarfile.open(tmp_path / f"midi{suffix}", mode) as archive:
        archive.add(texts, arcname="corpus")
    build(tmp_path / f"midi{suffix}", tmp_path / "data", **{**ALL, "dedup": "none"})
    labels = pieces(tmp_path / "data")["corpus/2.mid"].meta["labels"]
    assert labels["composer"] == "salieri"


def band():
    """Piano with a useless pedal press and an overlap, strings, and drums."""
    notes = np.array(
        [(60, 64, 0, 0, 500), (60, 64, 0, 200, 400), (62, 64, 1, 0, 100), (40, 64, 9, 0, 9)], NOTE
    )
    programs = np.array([(0, 0, 0), (0, 40, 1)], PROGRAM)
    pedals = np.array([(600, 127, 0), (700, 0, 0)], PEDAL)
    notes = notes[np.argsort(notes["start"], kind="stable")]
    return Performance(500, notes, pedals, programs=programs)


@pytest.mark.parametrize(
    "cleaning, changed",
    [
        (Cleaning(), set()),
        (Cleaning(solo_piano=True), {"strings", "drums"}),
        (Cleaning(remove_instruments=("strings",)), {"strings"}),
        (Cleaning(remove_redundant_pedals=True), {"pedal"}),
        (Cleaning(resolve_overlaps=True), {"overlap"}),
    ],
)
def test_cleaning_takes_out_what_it_names(cleaning, changed):
    cleaned = cleaning.clean(band())
    found = set()
    channels = set(cleaned.notes["channel"].tolist())
    found |= {"strings"} - ({"strings"} if 1 in channels else set())
    found |= {"drums"} - ({"drums"} if 9 in channels else set())
    found |= set() if len(cleaned.pedals) else {"pedal"}
    piano = cleaned.notes[cleaned.notes["channel"] == 0]
    found |= {"overlap"} if piano["end"].max() < 500 else set()
    assert found == changed


def test_an_instrument_that_does_not_exist_is_explained():
    with pytest.raises(UserError, match="no instrument violin; there are piano, "):
        Cleaning(remove_instruments=("violin",))


def test_ensembles_are_kept_or_become_solo_piano(real_midi, tmp_path):
    song = next(iter(sorted((real_midi / "multitrack").glob("pop909*.mid"))))
    performance = read_midi(song)
    programs = np.array([(0, 73, 0), (0, 0, 1), (0, 0, 2)], PROGRAM)  # a flute plays the melody
    midi = tmp_path / "midi"
    midi.mkdir()
    (midi / "flute.mid").write_bytes(midi_bytes(replace(performance, programs=programs)))
    (midi / "pop.mid").write_bytes((real_midi / "multitrack" / "pop.mid").read_bytes())
    build(midi, tmp_path / "all", **ALL)
    build(midi, tmp_path / "solo", cleaning=Cleaning(solo_piano=True), **ALL)
    assert instruments(pieces(tmp_path / "all")["flute.mid"]) == {"piano", "pipe"}
    assert {"drum", "reed", "guitar"} < instruments(pieces(tmp_path / "all")["pop.mid"])
    solo = pieces(tmp_path / "solo")
    assert set(solo) == {"flute.mid"} and instruments(solo["flute.mid"]) == {"piano"}
    pianos = read_midi(midi / "flute.mid").notes["channel"] > 0
    assert solo["flute.mid"].meta["n_notes"] == pianos.sum() < len(pianos)
    assert rejected(tmp_path / "solo")["pop.mid"][0] == "no-notes"


def instruments(record):
    """Named in the prefix, and the same as those that play."""
    tokenizer = Tokenizer.preset("aria")
    tokens = [tokenizer.tokens[i] for i in record.ids]
    named = {token[2] for token in tokens if token[:2] == ("prefix", "instrument")}
    assert named == {t[0] for t in tokens if t[0] == "drum" or t[0] in named}
    return named


def test_a_build_rejects_what_the_references_filters_reject_and_nothing_else(
    golden, golden_midi, tmp_path
):
    outcomes = json.loads((golden / "filters.json").read_text())["results"]
    midi = tmp_path / "midi"
    for path in outcomes:
        (midi / path).parent.mkdir(parents=True, exist_ok=True)
        (midi / path).write_bytes((golden_midi / path).read_bytes())
    failed = {p: {n for n, r in tests.items() if r[0] is not True} for p, tests in outcomes.items()}
    build(midi, tmp_path / "heavy", **{**ALL, "filters": "heavy"})
    expected = {path for path, names in failed.items() if names}
    assert expected and set(rejected(tmp_path / "heavy")) == expected
    for path, (reason, values) in rejected(tmp_path / "heavy").items():
        assert reason in failed[path] and set(values) == failed[path]
    build(midi, tmp_path / "light", **{**ALL, "filters": "light"})
    assert not rejected(tmp_path / "light")


@pytest.mark.slow
@pytest.mark.parametrize("filters", ["none", "light"])
def test_nothing_of_the_development_data_is_lost(real_midi, tmp_path, filters):
    summary = build(real_midi, tmp_path / "data", filters=filters)
    # A test piece of seven pitches is all that the light filters object to.
    lost = {} if filters == "none" else {"misc/basic.mid": "unique_pitch_count"}
    assert {path: why[0] for path, why in rejected(tmp_path / "data").items()} == lost
    assert summary.n_files == sum(1 for _ in real_midi.rglob("*.mid"))


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_what_is_like_an_excluded_file_is_left_out(copies, tmp_path, dedup, monkeypatch):
    """Also where the excluded file is the shorter one, or one of several units."""
    monkeypatch.setattr("data_pipeline.build.journal.UNIT_FILES", 2)
    other, empty = tmp_path / "eval", tmp_path / "other.tar"
    other.mkdir()
    source = "a-cut" if dedup == "near" else "zz-same"
    shutil.copy(copies / f"{source}.mid", other)
    with tarfile.open(empty, "w") as archive:
        archive.add(copies / "original-2.mid", "x/two.mid")
    summary = build(
        copies,
        tmp_path / "data",
        dedup=dedup,
        exclude=[other, empty],
        **ALL,
    )
    gone = rejected(tmp_path / "data")
    group = {"original-0.mid", "zz-same.mid"}
    group |= {"a-cut.mid", "transposed.mid"} if dedup == "near" else set()
    assert {
        path for path, why in gone.items() if why == ("excluded", f"eval/{source}.mid")
    } == group
    assert gone["original-2.mid"] == ("excluded", "other.tar/x/two.mid")
    assert summary.n_files == 7 and set(gone) == group | {"original-2.mid"}
    again = build(copies, tmp_path / "data", dedup=dedup, exclude=[other, empty], **ALL)
    assert again.done_before
    with pytest.raises(UserError, match="exclude"):
        build(copies, tmp_path / "data", dedup=dedup, exclude=[other], **ALL)


def test_nothing_can_be_excluded_without_a_comparison(copies, tmp_path):
    with pytest.raises(UserError, match="compares as dedup says"):
        build(copies, tmp_path / "data", dedup="none", exclude=[copies], **ALL)
