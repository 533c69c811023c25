"""The sample corpus: labelled, playable, and not rendered twice."""

import json
from importlib.util import find_spec

import pytest

from data_pipeline.midi import read_midi
from data_pipeline.sample import COMPOSERS, sample

pytestmark = pytest.mark.skipif(find_spec("music21") is None, reason="needs the demo extra")


@pytest.mark.slow
def test_scores_become_labelled_midi_once(tmp_path):
    summary = sample(tmp_path, per_composer=1, workers=1)
    assert set(summary.per_composer) == set(COMPOSERS.values()) and not summary.failed
    rows = json.loads((tmp_path / "metadata.json").read_text())
    assert len(rows) == summary.n_pieces == len(COMPOSERS)
    for row in rows:
        performance = read_midi(tmp_path / row["path"])
        rate = len(performance.notes) / (performance.duration_ms / 1000)
        assert 0.5 < rate < 40, row
        assert row["composition"].startswith(row["composer"])
    times = {row["path"]: (tmp_path / row["path"]).stat().st_mtime_ns for row in rows}
    sample(tmp_path, per_composer=1, workers=1)
    assert times == {row["path"]: (tmp_path / row["path"]).stat().st_mtime_ns for row in rows}
