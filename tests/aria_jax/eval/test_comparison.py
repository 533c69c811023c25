"""Listening tests: the paper's p-values, balanced plans, votes; statistics of pieces known."""

from collections import Counter

import numpy as np
import pytest

from aria_jax.eval.comparison import (
    Trial,
    analyse,
    compare,
    design,
    frechet_distance,
    music_statistics,
    same_prompt,
    summarise,
)
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, Performance

# Wins, ties, losses and p-value as the paper prints them.
PAPER = [
    ("AM Transformer", 38, 0, 6, "9.43e-07"),
    ("Suno 3.5", 18, 9, 21, "7.49e-01"),
    ("MusicGen", 49, 1, 0, "3.55e-15"),
    ("ground truth", 15, 9, 17, "8.60e-01"),
]


@pytest.mark.parametrize(("opponent", "wins", "ties", "losses", "printed"), PAPER)
def test_the_papers_p_values(opponent, wins, ties, losses, printed):
    result = compare(opponent, wins, ties, losses)
    assert f"{result.p_value:.2e}" == printed
    assert result.low < result.win_rate <= result.high


@pytest.mark.parametrize(("opponent", "wins", "ties", "losses", "printed"), PAPER)
def test_the_papers_sums_are_not_its_number_of_participants(opponent, wins, ties, losses, printed):
    with pytest.raises(UserError, match=f"= {wins + ties + losses} judgements, but 46"):
        compare(opponent, wins, ties, losses, n_judgements=46)


def test_interval_and_test_agree_with_arithmetic_by_hand():
    # 5 wins of 5: p = 2 / 2^5; Clopper-Pearson low bound solves x^5 = 0.025.
    result = compare("x", 5, 3, 0, n_judgements=8)
    assert result.p_value == pytest.approx(2 / 32)
    assert result.low == pytest.approx(0.025 ** (1 / 5)) and result.high == 1.0
    all_ties = compare("x", 0, 4, 0)
    assert (all_ties.p_value, all_ties.win_rate) == (1.0, None)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    wins = rng.binomial(30, 0.7, 400)
    covered = [c.low <= 0.7 <= c.high for c in (compare("x", int(w), 0, 30 - int(w)) for w in wins)]
    # Exact intervals cover at least 95%; four standard errors below that would be chance.
    assert np.mean(covered) > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize(("judges", "per_judge"), [(46, 4), (7, 3), (20, 8), (5, 40)])
def test_plans_are_balanced(judges, per_judge):
    opponents = ["a", "b", "c", "d"]
    prompts = [f"p{i}" for i in range(40)]
    trials = design(
        opponents,
        prompts,
        n_judges=judges,
        trials_per_judge=per_judge,
        rng=np.random.default_rng(1),
    )
    assert len({t.id for t in trials}) == len(trials) == judges * per_judge
    by_opponent = Counter(t.opponent for t in trials)
    assert max(by_opponent.values()) - min(by_opponent.values()) <= 1
    for opponent in opponents:
        own = [t for t in trials if t.opponent == opponent]
        first = sum(t.ours_first for t in own)
        assert abs(2 * first - len(own)) <= 1
        used = Counter({p: 0 for p in prompts}) + Counter(t.prompt for t in own)
        counts = [used[p] for p in prompts]
        assert max(counts) - min(counts) <= 2
    for judge in range(judges):
        heard = [t.prompt for t in trials if t.judge == judge]
        assert len(set(heard)) == len(heard) == per_judge


def test_plans_are_reproducible_and_ids_reveal_nothing():
    def plan(seed):
        rng = np.random.default_rng(seed)
        return design(["a", "b"], ["p", "q"], n_judges=30, trials_per_judge=2, rng=rng)

    assert plan(0) == plan(0) != plan(1)
    trials = plan(0)
    numbers = np.array([int(t.id[1:]) for t in trials])
    sides = np.array([t.ours_first for t in trials])
    assert abs(np.corrcoef(numbers, sides)[0, 1]) < 0.4  # 60 trials: three standard errors


TRIALS = [
    Trial("t0", 0, "x", "p", True),
    Trial("t1", 0, "y", "q", False),
    Trial("t2", 1, "x", "q", False),
]


def test_votes_are_counted_for_the_right_side():
    x, y = analyse(TRIALS, {"t0": "first", "t1": "first", "t2": "second"})
    assert (x.opponent, x.wins, x.ties, x.losses) == ("x", 2, 0, 0)
    assert (y.opponent, y.wins, y.ties, y.losses) == ("y", 0, 0, 1)
    x, _ = analyse(TRIALS, {"t0": "tie", "t1": "tie", "t2": "first"})
    assert (x.wins, x.ties, x.losses) == (0, 1, 1)


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ({"t0": "first", "t1": "first"}, "1 judgements, but 2"),
        ({"t0": "first", "t1": "first", "t2": "tie", "t9": "tie"}, "t9"),
        ({"t0": "first", "t1": "left", "t2": "tie"}, "left"),
    ],
)
def test_votes_that_do_not_add_up_are_refused(votes, message):
    with pytest.raises(UserError, match=message):
        analyse(TRIALS, votes)


def test_impossible_studies():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="repeat a prompt"):
        design(["a"], ["p"], n_judges=1, trials_per_judge=2, rng=rng)
    with pytest.raises(UserError, match="needs"):
        design([], ["p"], n_judges=1, trials_per_judge=1, rng=rng)
    with pytest.raises(UserError, match="no judgements"):
        compare("x", 0, 0, 0)


def clip(onsets_ms, pitches):
    notes = np.zeros(len(onsets_ms), NOTE)
    notes["start"], notes["pitch"], notes["velocity"] = onsets_ms, pitches, 70
    notes["end"] = notes["start"] + 100
    return Performance(500, notes[np.argsort(notes["start"], kind="stable")])


def test_prompts_are_the_same_up_to_a_stated_tolerance():
    rng = np.random.default_rng(0)
    onsets = np.sort(rng.integers(0, 15_000, 100))
    pitches = rng.integers(30, 90, 100)
    prompt = clip(onsets, pitches)
    late = clip(np.append(onsets + 3000, 19_000), np.append(pitches, 60))
    assert same_prompt(prompt, late, 15)  # silence before the first note does not count
    rounded = clip(onsets // 10 * 10 + rng.integers(0, 40, 100), pitches)
    assert same_prompt(prompt, rounded, 15)
    beyond = onsets >= 13_500 + onsets[0]
    assert same_prompt(prompt, clip(onsets[~beyond], pitches[~beyond]), 15)
    assert not same_prompt(prompt, clip(onsets[onsets < 12_000], pitches[onsets < 12_000]), 15)
    assert not same_prompt(prompt, clip(onsets, pitches + (np.arange(100) % 10 == 0)), 15)
    assert not same_prompt(prompt, clip(onsets * 11 // 10, pitches), 15)
    assert not same_prompt(prompt, clip(onsets, rng.permutation(pitches)), 15)
    twice = clip(np.concatenate([onsets, onsets]), np.concatenate([pitches, pitches + 1]))
    assert not same_prompt(prompt, twice, 15) and not same_prompt(twice, prompt, 15)
    nothing = clip([], [])
    assert not same_prompt(nothing, nothing, 15)


def piece(starts_ms, pitches, velocities=None):
    notes = np.zeros(len(starts_ms), NOTE)
    notes["start"], notes["pitch"] = starts_ms, pitches
    notes["end"] = notes["start"] + 200
    notes["velocity"] = 70 if velocities is None else velocities
    return Performance(500, notes)


def test_an_even_scale():
    found = music_statistics(piece(np.arange(48) * 250, 60 + np.arange(48) % 12))
    assert found.notes_per_second == pytest.approx(4.0)
    assert found.pitch_class_entropy == pytest.approx(np.log2(12))
    assert found.onset_interval_median == pytest.approx(0.25)
    assert found.onset_interval_spread == 0
    assert (found.pitch_range, found.velocity_deviation) == (11, 0)


def test_chords_count_once_between_onsets_and_one_pitch_has_no_entropy():
    found = music_statistics(piece([0, 10, 20, 1000, 1010, 3000], [60, 72, 48, 60, 72, 60]))
    assert found.pitch_class_entropy == 0
    assert found.onset_interval_median == pytest.approx((0.98 + 1.99) / 2)


def test_self_similarity_tells_repetition_from_change():
    starts = np.arange(80) * 250
    same = music_statistics(piece(starts, np.tile([60, 64, 67, 72], 20)))
    changing = music_statistics(piece(starts, 60 + np.arange(80) // 8))
    assert same.self_similarity == pytest.approx(1.0)
    assert changing.self_similarity == pytest.approx(0.0, abs=0.1)


def test_phrases_that_come_again_and_notes_that_sound_together():
    """Eight notes twice: 5 of 13 phrases have come before. Each sounds 200 ms, then 300 ms not."""
    pitches = [60, 62, 64, 65, 67, 69, 71, 72] * 2
    found = music_statistics(piece(np.arange(16) * 500, pitches))
    assert found.repetition == pytest.approx(5 / 13)
    assert found.polyphony == pytest.approx(1) and found.semitone_clusters == 0
    chords = music_statistics(piece(np.repeat(np.arange(4) * 100, 2), [60, 67] * 4))
    assert chords.polyphony == pytest.approx(8 * 200 / 500)


def test_clusters_are_semitones_struck_together():
    together = music_statistics(
        piece([0, 0, 0, 500, 520, 1000, 1040], [60, 61, 65, 70, 69, 50, 51])
    )
    assert together.semitone_clusters == pytest.approx(4 / 7)
    rng = np.random.default_rng(0)
    starts, pitches = np.sort(rng.integers(0, 2000, 300)), rng.integers(40, 80, 300)
    near = np.abs(starts[:, None] - starts) < 30
    expected = (near & (np.abs(pitches[:, None] - pitches) == 1)).any(1).mean()
    assert music_statistics(piece(starts, pitches)).semitone_clusters == pytest.approx(expected)


def test_what_cannot_be_known_is_nan_and_left_out_of_means():
    one = music_statistics(piece([0], [60]))
    assert np.isnan(one.notes_per_second) and np.isnan(one.self_similarity)
    even = music_statistics(piece([0, 500, 1000], [60, 62, 64]))
    summary = summarise([one, even])
    assert summary["notes_per_second"] == (pytest.approx(2.0), 0.0)
    with pytest.raises(UserError):
        music_statistics(piece([], []))
    with pytest.raises(UserError):
        summarise([])


def test_frechet_distance_of_known_normals():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 5))
    points = (points - points.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points, points + 2) == pytest.approx(5 * 4)
    # Standard deviations 1 and 3 in every direction: (3 - 1)^2 each.
    assert frechet_distance(points, 3 * points) == pytest.approx(5 * 4)
    other = rng.normal(size=(300, 5)) * [1, 2, 3, 4, 5]
    assert frechet_distance(points, other) == pytest.approx(frechet_distance(other, points))


def test_frechet_distance_of_few_wide_embeddings_is_finite():
    rng = np.random.default_rng(1)
    distance = frechet_distance(rng.normal(size=(4, 64)), rng.normal(size=(6, 64)))
    assert np.isfinite(distance) and distance > 0


def test_frechet_mistakes():
    with pytest.raises(UserError, match="two embeddings"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(UserError, match="shapes"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
