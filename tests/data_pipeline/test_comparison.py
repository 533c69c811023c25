"""The comparison of schemes: what it counts is what was lost."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.cli.main import main
from data_pipeline.midi import PEDAL, write_midi
from data_pipeline.tokenizers import SCHEMES, Tokenizer
from data_pipeline.tokenizers.comparison import compare, heard, in_order, matched
from tests.data_pipeline.test_tokenizers import band, piano


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_pairs_in_order_cost_least(data):
    times = st.lists(st.integers(0, 60), max_size=6)
    a, b = (np.sort(np.array(data.draw(times), np.int64)) for _ in range(2))
    first, second = in_order(a, b)
    assert len(first) == min(len(a), len(b))
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
    short, long = sorted((a, b), key=len)
    chosen = map(list, combinations(range(len(long)), len(short)))
    costs = [int(np.abs(short - long[one]).sum()) for one in chosen]
    assert np.abs(a[first] - b[second]).sum() == min(costs)


def test_a_performance_is_matched_with_itself_whatever_its_beginning():
    before = heard(band(0, 60))
    after = before.copy()
    after["start"] += 700
    after["end"] += 700
    left, right = matched(before, after)
    assert sorted(left) == sorted(right) == list(range(60))
    assert (before[left] == after[right]).all()


def losses(r):
    return (
        r.missing_percent,
        r.added_percent,
        r.onset_error_ms,
        r.duration_error_ms,
        r.velocity_error,
    )


def test_what_is_changed_is_what_is_counted():
    """Against a scheme that loses known things."""

    class Lossy(type(Tokenizer.preset("musenet"))):
        def decode(self, ids):
            notes = super().decode(ids).notes[1:].copy()
            notes["start"][-5:] += 30
            notes["end"][-5:] += 30
            notes["velocity"] -= 2
            return replace(super().decode(ids), notes=notes)

    performance = piano(4, 50)
    performance.notes["velocity"] = 60
    lossless, lossy = compare([performance], [Tokenizer.preset("musenet"), Lossy()])
    assert losses(lossless) == (0, 0, 0, 0, 0) and lossless.n_notes == 50
    assert losses(lossy) == pytest.approx((2.0, 0, 5 * 30 / 49, 0, 2.0))
    seconds = heard(performance)["end"].max() / 1000
    assert lossless.tokens_per_s == pytest.approx(lossless.tokens_per_note * 50 / seconds)
    assert lossless.context_s == pytest.approx(8192 / lossless.tokens_per_s)


def test_schemes_keep_what_they_say_they_keep():
    several = band(1, 80)
    pedals = np.array([(0, 127, 0), (900, 0, 0)], PEDAL)
    solo = replace(piano(5, 40), pedals=pedals)
    names = ["aria", "pedal", "musenet", "piano-roll"]
    rows = {r.name: r for r in compare([several, solo], [Tokenizer.preset(n) for n in names])}
    assert all(r.missing_percent == r.added_percent == 0 for r in rows.values())
    assert all(rows[n].instruments_kept_percent == 100 for n in ("aria", "musenet", "piano-roll"))
    assert rows["pedal"].n_rejected == 1 and rows["pedal"].pedals == "2 of 2 events"
    assert rows["aria"].pedals == "in the durations"
    assert rows["piano-roll"].onset_error_ms < 25  # half a frame
    assert rows["musenet"].onset_error_ms == 0


def test_the_command_prints_a_row_per_scheme_and_names_what_it_leaves_out(tmp_path, capsys):
    write_midi(piano(6, 30), tmp_path / "a.mid")
    (tmp_path / "b.mid").write_bytes(b"no MIDI")
    names = "aria,musenet,piano-roll"
    command = ["tokenizers", "compare", str(tmp_path), "--tokenizers", names]
    assert main([*command, "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["name"] for row in found["tokenizers"]] == names.split(",")
    assert found["n_files"] == 1 and "b.mid" in found["unreadable"][0] and "b.mid" in err
    assert main(command) == 1
    assert "| musenet | 17,330 | 1 |" in capsys.readouterr().out
    assert main(["tokenizers", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tokenizers"]
    assert [row["name"] for row in rows] == [*SCHEMES, "events"]


@pytest.mark.parametrize(
    "given, said",
    [
        (["--tokenizers", "muse"], "did you mean 'musenet'"),
        (["--max-files", "0"], "expected 1 or more"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, given, said):
    write_midi(piano(6, 5), tmp_path / "a.mid")
    assert main(["tokenizers", "compare", str(tmp_path), *given]) == 2
    assert said in capsys.readouterr().err
    assert main(["tokenizers", "compare", str(tmp_path / "none")]) == 2
