"""How a corpus's files were read: chosen, recorded, and the same for whoever comes back to it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.inspection import inspect
from data_pipeline.midi import TEMPO, midi_bytes, read_midi
from data_pipeline.shards import MANIFEST, TokenShards, load_manifest, reading_of, rejections
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

ARIA = Tokenizer.preset("aria")
SETTINGS = {"workers": 1, "filters": "none", "val_fraction": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of two tempi, an ordinary one, and one of which a third is missing."""
    made = tmp_path_factory.mktemp("midi")
    performance = random_performance(np.random.default_rng(1), 50)
    middle = int(performance.notes["start"][25]) + 17
    tempi = np.array([(0, 500_000), (middle, 900_000)], TEMPO)
    (made / "tempi.mid").write_bytes(midi_bytes(replace(performance, tempi=tempi)))
    whole = midi_bytes(random_performance(np.random.default_rng(0), 60))
    (made / "whole.mid").write_bytes(whole)
    (made / "cut.mid").write_bytes(whole[: 2 * len(whole) // 3])
    return made


def pieces(out):
    shards = TokenShards(out, "train", ARIA)
    return {shards[i].meta["path"]: shards[i] for i in range(len(shards))}


@pytest.mark.parametrize("compat, reading", [(None, "standard"), ("aria-utils", "aria-utils")])
def test_a_corpus_holds_what_its_reading_reads_and_says_so(folder, tmp_path, compat, reading):
    summary = build(folder, tmp_path / "data", compat=compat, **SETTINGS)
    assert (summary.n_accepted, summary.n_rejected, summary.n_repaired) == (2, 1, 0)
    for path, record in pieces(tmp_path / "data").items():
        expected = ARIA.encode(read_midi(folder / path, compat=compat))
        np.testing.assert_array_equal(record.ids, expected)
    assert load_manifest(tmp_path / "data")["reading"] == reading
    assert inspect(tmp_path / "data").reading == reading
    other = None if compat else "aria-utils"
    with pytest.raises(UserError, match=r"made otherwise .reading: "):
        build(folder, tmp_path / "data", compat=other, **SETTINGS)


def test_the_two_readings_of_this_folder_differ(folder):
    one, other = (
        ARIA.encode(read_midi(folder / "tempi.mid", compat=c)) for c in (None, "aria-utils")
    )
    assert one.tolist() != other.tolist()


def test_a_corpus_that_does_not_say_was_read_as_aria_utils_reads(folder, tmp_path):
    out = tmp_path / "data"
    build(folder, out, compat="aria-utils", **SETTINGS)
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["reading"], manifest["n_repaired"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    found = inspect(out)
    assert reading_of(load_manifest(out)) == found.reading == "aria-utils"
    assert found.n_repaired == 0


def test_an_unknown_reading_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="aria-utils"):
        build(folder, tmp_path / "data", compat="mido", **SETTINGS)
    assert not (tmp_path / "data").exists()


def test_a_cut_file_is_repaired_where_asked_to(folder, tmp_path):
    refused = build(folder, tmp_path / "refused", **SETTINGS)
    assert refused.rejected == {"parse/truncated": 1}
    summary = build(folder, tmp_path / "data", repair=True, **SETTINGS)
    assert (summary.n_accepted, summary.n_rejected, summary.n_repaired) == (3, 0, 1)
    found = pieces(tmp_path / "data")
    assert [path for path, record in found.items() if "repaired" in record.meta] == ["cut.mid"]
    performance = read_midi(folder / "cut.mid", repair=True)
    assert found["cut.mid"].meta["repaired"] == performance.repaired != ""
    assert 20 < found["cut.mid"].meta["n_notes"] == len(performance.notes) < 60
    manifest = load_manifest(tmp_path / "data")
    assert manifest["n_repaired"] == inspect(tmp_path / "data").n_repaired == 1
    assert not list(rejections(tmp_path / "data"))
    with pytest.raises(UserError, match=r"made otherwise .repair: true"):
        build(folder, tmp_path / "data", **SETTINGS)
