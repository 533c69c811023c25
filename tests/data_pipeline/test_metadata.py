"""Every published layout ends in one table; contradictions are named, not resolved."""

import json
import pickle

import pytest

from data_pipeline.errors import UserError
from data_pipeline.metadata import labels_from_path, labels_from_texts, load_labels

BACH = "asap/Bach/Fugue/bwv_848/Lin04M.mid"
ASAP = [
    {"path": BACH, "composer": "Bach", "title": "Fugue_bwv_848", "split": "train",
     "composition": "Bach_Fugue_bwv_848", "form": "fugue", "period": "Baroque", "valence": 0.3},
]  # fmt: skip
ARIA_MIDI = {
    "17": {
        "metadata": {"composer": "chopin", "genre": "classical", "music_period": "romantic",
                     "opus": 9, "piece_number": 2, "form": None},
        "audio_scores": {"0": 0.98},
    },
}  # fmt: skip
MAESTRO = {
    "canonical_composer": {"0": "Frédéric Chopin", "1": "Franz Schubert / Franz Liszt"},
    "canonical_title": {"0": "Étude Op. 10 No. 4", "1": "Sonata in A"},
    "split": {"0": "validation", "1": "train"},
    "year": {"0": 2018, "1": 2004},
    "midi_filename": {"0": "2018/one.midi", "1": "2004/two.midi"},
    "duration": {"0": 12.5, "1": 99.0},
}
MAESTRO_CSV = (
    "canonical_composer,canonical_title,split,year,midi_filename,duration\n"
    "Frédéric Chopin,Étude Op. 10 No. 4,validation,2018,2018/one.midi,12.5\n"
)
SPLITS = {
    "composer": {
        "train": {"data/aa/000001_0.mid": "Bach"},
        "test": {"data/aa/000002_0.mid": "liszt"},
    },
    "music_period": {
        "train": {"data/aa/000001_0.mid": "baroque", "data/aa/000002_0.mid": "romantic"}
    },
}
OWN = {"songs/a.mid": {"composer": "Ryuichi Sakamoto", "mood": "Calm"}}


def table(tmp_path, content, name="metadata.json"):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load_labels(tmp_path)


def test_list_of_objects(tmp_path):
    labels = table(tmp_path, ASAP).labels_for(BACH)
    assert labels == {
        "composer": "bach", "title": "Fugue_bwv_848", "composition": "Bach_Fugue_bwv_848",
        "form": "fugue", "period": "baroque", "split": "train",
    }  # fmt: skip


def test_aria_midi(tmp_path):
    labels = table(tmp_path, ARIA_MIDI)
    expected = {"composer": "chopin", "genre": "classical", "period": "romantic", "opus": "9",
                "piece_number": "2", "composition": "chopin: opus 9 piece_number 2"}  # fmt: skip
    assert labels.labels_for("data/ab/000017_0.mid") == expected
    assert labels.labels_for("data/ab/000017_3.mid") == expected
    assert labels.labels_for("data/ab/000018_0.mid") == {}


@pytest.mark.parametrize(
    ("content", "name"), [(MAESTRO, "maestro-v3.0.0.json"), (MAESTRO_CSV, "maestro-v3.0.0.csv")]
)
def test_maestro(tmp_path, content, name):
    labels = table(tmp_path, content, name)
    assert labels.labels_for("2018/one.midi") == {
        "composer": "chopin", "title": "Étude Op. 10 No. 4", "form": "etude", "split": "val",
        "year": "2018", "composition": "chopin: etude op. 10 no. 4",
    }  # fmt: skip


def test_two_composers_are_not_one(tmp_path):
    labels = table(tmp_path, MAESTRO).labels_for("2004/two.midi")
    assert labels["composer"] == "franz schubert / franz liszt"


def test_benchmark_splits(tmp_path):
    labels = table(tmp_path, SPLITS)
    assert labels.labels_for("data/aa/000001_0.mid") == {
        "composer": "bach", "composer_split": "train", "period": "baroque",
        "period_split": "train", "split": "train",
    }  # fmt: skip
    second = labels.labels_for("data/aa/000002_0.mid")
    assert second["composer_split"] == "test" and "split" not in second


def test_own_labels_and_explicit_file(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    midi_dir = tmp_path / "midi"
    midi_dir.mkdir()
    labels = load_labels(midi_dir, tmp_path / "mine.json")
    assert labels.labels_for("songs/a.mid") == {"composer": "ryuichi sakamoto", "mood": "calm"}


def test_tables_of_subfolders_speak_for_their_folder(tmp_path):
    (tmp_path / "asap").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "asap" / "metadata.json").write_text(json.dumps(ASAP))
    (tmp_path / "mine" / "metadata.json").write_text(json.dumps(OWN))
    labels = pickle.loads(pickle.dumps(load_labels(tmp_path)))
    assert labels.labels_for(BACH)["period"] == "baroque"
    assert labels.labels_for("mine/songs/a.mid")["mood"] == "calm"
    assert "mood" not in labels.labels_for("songs/a.mid")
    inside = load_labels(tmp_path / "asap")
    assert inside.labels_for(BACH.removeprefix("asap/"))["period"] == "baroque"


def test_names_alone_match_only_rows_without_folder(tmp_path):
    rows = [{"path": "x/one.mid", "mood": "sad"}, {"path": "two.mid", "mood": "glad"}]
    labels = table(tmp_path, rows)
    assert labels.labels_for("elsewhere/one.mid") == {}
    assert labels.labels_for("elsewhere/two.midi") == {"mood": "glad"}


def test_file_names_and_texts_fill_gaps(tmp_path):
    assert labels_from_path("Piano/FRÉDÉRIC-Chopin/nocturne_op9.mid") == {
        "composer": "chopin", "form": "nocturne",
    }  # fmt: skip
    assert labels_from_path("Bach/after_Vivaldi_by_Liszt.mid") == {}  # two composers: none
    assert labels_from_path("Offenbach/barcarolle.mid") == {}
    assert labels_from_texts(["Prélude", "by Claude Debussy"]) == {
        "composer": "debussy", "form": "prelude",
    }  # fmt: skip
    (tmp_path / "metadata.json").write_text(
        json.dumps([{"path": "bach/x.mid", "composer": "Liszt"}])
    )
    labels = load_labels(tmp_path)
    assert labels.labels_for("bach/x.mid", ["Mozart waltz"]) == {
        "composer": "liszt",
        "form": "waltz",
    }
    assert labels.labels_for("bach/y.mid", ["Mozart"]) == {"composer": "bach"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('"text"', "expected a list or an object of files, got str"),
        ([["a.mid"]], "entry 1: expected an object"),
        ([{"path": "a.mid"}, {"composer": "x"}], "entry 2: no file named"),
        ([{"path": 3}], "entry 1: 'path' is not text"),
        ([{"path": "a.mid", "composer": ["x"]}], "'a.mid': 'composer' must be text"),
        ([{"path": "a.mid", "split": "half"}], "'a.mid': split 'half' is none of"),
        ({"a.mid": "bach"}, "'a.mid': expected an object of labels"),
        ('{"a.mid": {}, "a.mid": {}}', "key 'a.mid' twice"),
        ([{"path": "a.mid", "form": "x"}, {"path": "a.mid", "form": "y"}],
         "'a.mid' has two values of 'form' .'x' and 'y'."),
        ([{"path": "a.mid", "period": "x", "music_period": "y"}], "two values of 'period'"),
        ({"composer": {"train": {"a.mid": "x"}, "val": {"a.mid": "x"}}},
         "two values of 'composer_split'"),
        ({"midi_filename": {"0": "a.mid"}, "split": {}}, "column 'split' has not the rows"),
    ],
)  # fmt: skip
def test_unusable_metadata_is_explained(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        table(tmp_path, content)
    assert "metadata.json" in str(error.value)


def test_missing_or_binary_file_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot read the metadata"):
        load_labels(tmp_path, tmp_path / "none.json")
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_labels(tmp_path, tmp_path / "m.json")


def test_the_development_data(real_midi):
    labels = load_labels(real_midi)
    rows = json.loads((real_midi / "asap" / "metadata.json").read_text())
    for row in rows:
        found = labels.labels_for(row["path"])
        assert found["composer"] == row["composer"].lower()
        assert found["composition"] == row["composition"] and found["split"] == row["split"]
    rows = json.loads((real_midi / "vgmidi" / "metadata.json").read_text())
    assert all(labels.labels_for(row["path"])["emotion"] == row["emotion"] for row in rows)
