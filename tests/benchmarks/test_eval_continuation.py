"""The evaluation of continuations: distances that can be told by hand, and a whole run."""

import json
import re

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from aria_jax.cli.main import main as aria
from benchmarks import continuation_page, eval_continuation
from benchmarks.eval_continuation import (
    ELSEWHERE,
    NGRAM,
    distance,
    distances,
    excerpts,
    labels_of,
    opened,
    per_note,
    unlabelled,
)
from benchmarks.ngram import notes_of
from data_pipeline.errors import UserError
from data_pipeline.midi import write_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

TOKENIZER = Tokenizer.preset("aria")


def test_nats_per_note_weigh_pieces_by_their_notes():
    nats, notes = np.array([10.0, 90.0]), np.array([10, 30])
    value, low, high = per_note(nats, notes)
    assert value == 2.5 and (low, high) == (1.0, 3.0)


def test_distance_is_in_deviations_of_the_real_ones():
    rng = np.random.default_rng(0)
    real = rng.normal(size=50)
    assert distance(real[:, None], real) == 0
    some = np.stack([real + 1, np.full(50, np.nan)], axis=1)
    assert distance(some, real, 2.0) == pytest.approx(wasserstein_distance(real + 1, real) / 2)
    assert np.isnan(distance(some, real, 0.0))
    rare = np.zeros((50, 10))  # a statistic that is 0 but for one piece: so it is in most resamples
    rare[7] = 1.0
    far = rare[:, None] + 3 * rare.std(0)
    for row in distances({NGRAM: far, "model": rare[:, None]}, rare)["model"].values():
        assert row[0] == 0 and row[3] == pytest.approx(3) and row[2] < 1


def test_the_nearer_system_is_told_with_an_interval():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 10))
    far, near = (rng.normal(size=(60, 2, 10)) + shift for shift in (2.0, 0.1))
    found = distances({NGRAM: far, "model": near}, real)
    for row in found["model"].values():
        own, low, high, nearer, least, most = row
        assert 0 <= low <= own <= high < 1 and 0 < least < nearer < most
    assert all(row[3] == 0 for row in found[NGRAM].values())


def test_excerpts_are_prompts_and_how_they_go_on():
    rng = np.random.default_rng(0)
    pieces = [TOKENIZER.encode(random_performance(rng, n)) for n in (60, 10, 90)]
    found = excerpts(pieces, ["a", "short", "b"], TOKENIZER, n=5, prompt_notes=20, real_notes=15,
                     seed=0)  # fmt: skip
    assert sorted({place.name for place in found}) == ["a", "b"] and len(found) == 5
    for place in found:
        assert len(place.notes) == TOKENIZER.n_notes(place.prompt) == 20
        assert len(place.real.notes) == 15 and place.prompt[-1] != TOKENIZER.eos_id
        last = TOKENIZER.events(place.prompt)[1][-1]
        assert place.real.notes["start"].min() >= last  # one timeline
    with pytest.raises(UserError, match="no held-out piece has 200 notes"):
        excerpts(pieces, ["a", "short", "b"], TOKENIZER, n=1, prompt_notes=100, real_notes=100,
                 seed=0)  # fmt: skip


def test_labels_of_the_piece_are_left_out():
    ids = TOKENIZER.encode(
        random_performance(np.random.default_rng(0), 20),
        labels={"composer": "bach", "form": "fugue", "genre": "classical"},
    )
    told = [TOKENIZER.tokens[i] for i in ids[:5]]
    left = [TOKENIZER.tokens[i] for i in unlabelled(ids, TOKENIZER)[:3]]
    assert ("prefix", "composer", "bach") in told
    assert left == [("prefix", "instrument", "piano"), ("prefix", "genre", "classical"), "<S>"]


def test_models_are_named_and_opened_by_step(tiny_models):
    assert labels_of(["a/run/best", "a/run@200/"]) == {
        "best": "a/run/best",
        "run@200": "a/run@200/",
    }
    assert list(labels_of(["a/best", "b/best"])) == ["a/best", "b/best"]
    path = str(tiny_models["lm"])
    assert opened(f"{path}@0").fingerprint == opened(path).fingerprint
    with pytest.raises(UserError, match="no checkpoint of step 7; it keeps 0"):
        opened(f"{path}@7")


@pytest.mark.slow
def test_a_run_from_end_to_end(tiny_models, tmp_path, capsys):
    folder, shards, rng = tmp_path / "midi", tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        write_midi(random_performance(rng, 100), folder / f"{i}.mid")
    build = ["data", "build", str(folder), str(shards), "--filters", "none", "--workers", "1"]
    assert aria([*build, "--val-fraction", "0.5"]) == 0
    options = ["--prompts", "2", "--each", "2", "--prompt-notes", "20", "--notes", "25"]
    eval_continuation.main(
        [
            str(shards),
            "--checkpoint",
            str(tiny_models["lm"]),
            "--out",
            str(tmp_path / "out"),
            *options,
        ]
    )
    text = (tmp_path / "out" / "results.md").read_text()
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(result["nats"]) == {NGRAM, "lm"} and set(result["distances"]) == {
        NGRAM,
        "lm",
        ELSEWHERE,
    }
    row = re.search(r"\| lm \| (\S+) \((\S+) to (\S+)\)", text)
    assert row and float(row[2]) <= float(row[1]) <= float(row[3])
    # Random weights know nothing: about ln V for each of three tokens.
    assert float(row[1]) == pytest.approx(3 * np.log(TOKENIZER.vocab_size), rel=0.1)
    page = tmp_path / "page.html"
    continuation_page.main(
        [str(folder), "--checkpoint", str(tiny_models["lm"]), "--out", str(page), "--n", "2",
         "--prompt-notes", "20", "--notes", "10"]
    )  # fmt: skip
    assert page.read_text().count('class="player"') == 2 * 4
    with pytest.raises(UserError, match="12 MIDI files of 30 notes, 13 are needed"):
        continuation_page.main(
            [str(folder), "--checkpoint", str(tiny_models["lm"]), "--n", "13", "--prompt-notes",
             "20", "--notes", "10"]
        )  # fmt: skip


def test_what_the_ngram_is_told_and_what_it_draws_are_of_one_timeline():
    ids = TOKENIZER.encode(random_performance(np.random.default_rng(1), 40)).astype(np.int64)
    whole = notes_of(ids, TOKENIZER)
    both = notes_of(TOKENIZER.slice_notes(ids, 0, 15), TOKENIZER)
    assert len(both + whole) == 55 and (both.pitch == whole.pitch[:15]).all()
