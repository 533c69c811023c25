"""Filters: the reference's outcomes, and what users can get wrong."""

import json

import numpy as np
import pytest

from data_pipeline import filters
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, Performance, read_midi


def flat(value):
    return np.ravel(np.array(value, float))


def test_every_outcome_is_the_references(golden, golden_midi):
    case = json.loads((golden / "filters.json").read_text())
    n_compared = 0
    for path, outcomes in case["results"].items():
        performance = read_midi(golden_midi / path, compat="aria-utils")
        for name, expected in outcomes.items():
            if expected[0] == "error":
                continue
            passed, value = filters.TESTS[name](performance, **case["args"][name])
            assert passed == expected[0], (path, name)
            np.testing.assert_allclose(flat(value), flat(expected[1]), rtol=1e-9, err_msg=name)
            n_compared += 1
    assert n_compared > 100


def test_light_rejects_nothing_that_heavy_accepts(real_midi):
    looser = filters.PRESETS["light"]
    assert set(looser) <= set(filters.PRESETS["heavy"])
    for path in sorted(real_midi.rglob("*.mid"))[::9]:
        performance = read_midi(path)
        failed = {name for name, _ in filters.check(performance, filters.PRESETS["heavy"])}
        assert {name for name, _ in filters.check(performance, looser)} <= failed, path


@pytest.mark.parametrize("seed", range(5))
def test_windows_count_what_begins_inside_them(seed):
    from data_pipeline._kernels import window_counts

    rng = np.random.default_rng(seed)
    times = np.sort(rng.choice(np.arange(0, 60, 0.5), 80))  # ties, edges, stretches of silence
    times[times > 40] += 30
    pitches = rng.integers(60, 66, 80).astype(np.uint8)
    starts, window = np.arange(times[0], 95.0), float(rng.choice([1, 3, 7.5]))
    totals, unique, most_of_one = window_counts(times, pitches, starts, window)
    inside = [pitches[(times >= s) & (times <= s + window)] for s in starts]
    assert totals.tolist() == [len(p) for p in inside]
    assert unique.tolist() == [len(set(p)) for p in inside]
    assert most_of_one == max(np.bincount(p, minlength=1).max() for p in inside)


def test_a_test_of_a_performance_without_notes_fails_and_does_not_raise():
    empty = Performance(480, np.zeros(0, NOTE))
    failed = {name for name, _ in filters.check(empty, filters.PRESETS["heavy"])}
    assert {"length", "silent_interval", "note_pitch_entropy"} <= failed


@pytest.mark.parametrize(
    "content, message",
    [("{", "not a JSON object"), ('{"lenght": {}}', "no test lenght"),
     ('{"length": {"min": 1}}', "length takes max_length_s, min_length_s")],
)  # fmt: skip
def test_a_wrong_threshold_file_is_explained(tmp_path, content, message):
    path = tmp_path / "filters.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        filters.load(path)
