"""What is read of single notes, and that no song is on both sides."""

import numpy as np
import pytest

from benchmarks.note_probe import accuracy, own_features, songs
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, Performance


def test_a_note_is_described_beside_those_of_its_onset():
    notes = np.zeros(4, NOTE)
    notes["start"], notes["end"] = [0, 0, 0, 500], [100, 500, 500, 600]
    notes["pitch"] = [72, 60, 48, 50]
    found = own_features(Performance(500, notes))
    assert found[:, 0].tolist() == [72, 60, 48, 50]
    assert found[:, 3].tolist() == [1, 0, 0, 1] and found[:, 4].tolist() == [0, 0, 1, 1]
    assert found[:, 5].tolist() == [3, 3, 3, 1]
    np.testing.assert_allclose(np.expm1(found[:, 2]), [0, 0, 0, 500])


def test_what_only_a_song_tells_is_of_no_use_for_others():
    rng = np.random.default_rng(0)
    song = np.repeat(np.arange(10), 40)
    y = rng.integers(0, 2, 400)
    told = np.stack([y + 0.1 * rng.normal(size=400), rng.normal(size=400)], axis=1)
    assert accuracy(told, y, song) == (1.0, 1.0)
    # A feature that gives the class away within a song, and says nothing of the next one.
    sign = rng.choice([-1, 1], 10)[song]
    assert 0.3 < accuracy((sign * (2 * y - 1))[:, None].astype(float), y, song)[0] < 0.8


def test_a_folder_without_songs_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 files pop909"):
        songs(tmp_path)
