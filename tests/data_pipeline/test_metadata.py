"""Every published layout ends in one table; contradictions are named, not resolved."""

import json
import pickle
import unicodedata

import pytest

from data_pipeline.errors import UserError
from data_pipeline.metadata import labels_from_path, labels_from_texts, load_labels, read_labels

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


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_csv_is_read_as_csv(tmp_path, delimiter, newline):
    """Byte order mark, quoted delimiters and newlines, and U+2028 as web pages have it."""
    rows = [
        ["path", "title", "composer"],
        ["a.mid", '"No. 1\nin C, ""the; first"""', "Chopin"],
        ["b.mid", "Fugue\u2028No. 2\x85\x0b", "Bach"],
    ]
    (tmp_path / "metadata.csv").write_bytes(
        ("\ufeff" + newline.join(map(delimiter.join, rows[:1] + rows[2:] + rows[1:2]))).encode()
        if delimiter != ","
        else "\ufeff".encode() + newline.join(map(",".join, rows)).encode()
    )
    labels = load_labels(tmp_path)
    assert len(labels) == 2
    assert labels.labels_for("a.mid")["title"] == 'No. 1\nin C, "the; first"'
    assert labels.labels_for("a.mid")["composer"] == "chopin"
    assert labels.labels_for("b.mid")["composer"] == "bach"


@pytest.mark.parametrize(
    "text",
    [
        "Path,Composer\na.mid,Chopin\n",
        "path,composer\na.mid,Chopin\n,\n\n,\n",
        "path,composer\na.mid,Chopin,,\n",
        "path,composer,\na.mid,Chopin,\n",
        "composer;PATH\rChopin;a.mid\r",
    ],
)
def test_a_csv_as_spreadsheets_write_it(tmp_path, text):
    labels = table(tmp_path, text, "metadata.csv")
    assert labels.labels_for("a.mid") == {"composer": "chopin"} and len(labels) == 1


def test_json_lines(tmp_path):
    lines = (
        '{"file_name": "a.mid", "composer": "Bach"}\n\n{"file_name": "b.mid", "title": "\u2028"}\n'
    )
    labels = table(tmp_path, lines, "metadata.jsonl")
    assert labels.labels_for("a.mid") == {"composer": "bach"} and len(labels) == 2


@pytest.mark.parametrize("of_table, of_file", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(tmp_path, of_table, of_file):
    folder, name = "Fauré", "Élégie.mid"
    (tmp_path / unicodedata.normalize(of_file, folder)).mkdir()
    rows = [{"path": f"{folder}/{name}", "composer": "Fauré"}, {"path": name, "mood": "sad"}]
    path = tmp_path / unicodedata.normalize(of_file, folder) / "metadata.json"
    path.write_text(unicodedata.normalize(of_table, json.dumps(rows, ensure_ascii=False)))
    labels = load_labels(tmp_path)
    found = labels.labels_for(unicodedata.normalize(of_file, f"{folder}/{name}"))
    assert found["composer"] == "faure"
    assert labels.labels_for(unicodedata.normalize(of_file, f"{folder}/x/{name}"))["mood"] == "sad"


def test_a_compressed_file_has_the_row_of_the_plain_one(tmp_path):
    labels = table(tmp_path, [{"path": "a/x.mid", "mood": "sad"}, {"path": "y.mid", "mood": "mad"}])
    assert labels.labels_for("a/x.mid.gz") == {"mood": "sad"}
    assert labels.labels_for("b/y.mid.gz") == {"mood": "mad"}


def test_values_of_every_kind(tmp_path):
    """Lone surrogates are replaced; measurements, nothing and nested values are no labels."""
    row = (
        '{"path": "a.mid", "title": "Nocturne \\ud83c", "mo\\udc00od": "\\udcff", "a": NaN, '
        '"b": -Infinity, "c": null, "d": "  ", "e": [1], "f": {"x": 1}, "g": true, '
        f'"h": {"9" * 5000}, "i": 2.5}}'
    )
    labels = table(tmp_path, f"[{row}]").labels_for("a.mid")
    big = labels.pop("h")
    assert big == "9" * 5000
    assert labels == {
        "title": "Nocturne \ufffd", "mo\ufffdod": "\ufffd", "g": "true", "form": "nocturne",
    }  # fmt: skip
    json.dumps(labels, ensure_ascii=False).encode()


def test_another_column_may_be_the_split(tmp_path):
    rows = [{"path": "a.mid", "split": "train", "Fold": "Test"},
            {"path": "b.mid", "split": "train", "Fold": "dev"}]  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(rows))
    (tmp_path / "s.json").write_text(json.dumps(SPLITS))
    tables = [("", tmp_path / "m.json")]
    labels = read_labels(tmp_path, tables, "fold")
    assert [labels.labels_for(name)["split"] for name in ("a.mid", "b.mid")] == ["test", "val"]
    with pytest.raises(UserError, match=r"--split-column none-such: no file has such a label"):
        read_labels(tmp_path, tables, "none-such")
    with pytest.raises(UserError, match=r"'a.mid': split 'A' is none of train, val, test"):
        (tmp_path / "m.json").write_text('[{"path": "a.mid", "x": "A"}]')
        read_labels(tmp_path, tables, "x")
    labels = read_labels(tmp_path, [("", tmp_path / "s.json")], "composer_split")
    assert labels.labels_for("data/aa/000002_0.mid")["split"] == "test"


def test_a_table_that_names_no_file_says_so(tmp_path):
    rows = [{"path": f"/music/{i}.mid", "composer": "Bach"} for i in range(9)]
    labels = table(tmp_path, rows)
    (warning,) = labels.warnings(f"{i}\udce9.mid" for i in range(100, 200))
    assert "metadata.json: not one of its 9 rows names a file here" in warning
    assert "/music/0.mid, /music/1.mid, /music/2.mid;" in warning
    assert warning.endswith("100\ufffd.mid, 101\ufffd.mid, 102\ufffd.mid")
    assert not labels.warnings(["x.mid", "/music/8.mid"])
    (warning,) = table(tmp_path, ARIA_MIDI).warnings(["a.mid"])
    assert "it has 17; the files are a.mid" in warning
    assert not table(tmp_path, {}).warnings(["a.mid"])


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
        ("[" * 20_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("", "not valid JSON"),
        ({"a.mid": ["x" * 1000] * 9}, r"expected an object of labels, got \['xxx.{,100}$"),
    ],
)  # fmt: skip
def test_unusable_metadata_is_explained(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        table(tmp_path, content)
    assert "metadata.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,path\na.mid,b.mid\n", "column 'path' twice"),
        ("path,composer\na.mid,Bach, Johann\n", "line 2: more fields than the header"),
        ("composer\nBach\n", "entry 1: no file named"),
        (f"path,title\na.mid,{'x' * 200_000}\n", "after line 1: not valid CSV"),
        ('path,title\na.mid,"x\nb.mid,y\n', "not valid CSV"),  # b.mid would be in the title
    ],
)
def test_unusable_csv_is_explained(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        table(tmp_path, content, "metadata.csv")


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
