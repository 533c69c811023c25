"""Samplers keep what the reference keeps and draw in proportion to probability."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.generate import sampler as sampling
from data_pipeline.errors import UserError

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.08, 0.02]]))


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (sampling.Temperature(temperature=1.0), [1, 1, 1, 1, 1]),
        (sampling.MinP(temperature=1.0, p=0.2), [1, 1, 1, 0, 0]),
        (sampling.MinP(temperature=0.5, p=0.2), [1, 1, 0, 0, 0]),
        (sampling.MinP(temperature=1.0, p=1.0), [1, 0, 0, 0, 0]),
        # The token that crosses p is kept: 0.5 + 0.25 = 0.75 < 0.8 < 0.9.
        (sampling.TopP(temperature=1.0, p=0.8), [1, 1, 1, 0, 0]),
        (sampling.TopP(temperature=1.0, p=1.0), [1, 1, 1, 1, 1]),
        (sampling.TopK(temperature=1.0, k=2), [1, 1, 0, 0, 0]),
        (sampling.TopK(temperature=1.0, k=99), [1, 1, 1, 1, 1]),
    ],
)
def test_kept_tokens(sampler, kept):
    np.testing.assert_array_equal(sampler.keep(LOGITS)[0], np.array(kept, bool))


def test_kept_sets_equal_the_references(golden):
    expected = json.loads((golden / "generate.json").read_text())
    with np.load(golden / "sampling_logits.npz") as arrays:
        logits = jnp.asarray(arrays[arrays.files[0]])
    temperature = expected["temperature"]
    min_p = sampling.MinP(temperature=temperature, p=expected["min_p"]).keep(logits)
    for row, ids in zip(np.asarray(min_p), expected["kept_min_p"], strict=True):
        assert np.flatnonzero(row).tolist() == sorted(ids)
    top_p = sampling.TopP(temperature=temperature, p=expected["top_p"]).keep(logits)
    ids = [np.flatnonzero(row) for row in np.asarray(top_p)]
    assert [len(row) for row in ids] == expected["n_kept_top_p"]
    assert [row.sum() for row in ids] == expected["kept_top_p_sum"]


def test_draws_follow_the_renormalised_probabilities():
    n = 20_000
    drawn = sampling.MinP(temperature=1.0, p=0.2).draw(jnp.tile(LOGITS, (n, 1)), keys(n))
    share = np.bincount(drawn, minlength=5) / n
    expected = np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9
    # Four standard errors of a share of 20,000 draws.
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / n))
    assert share[3] == share[4] == 0


def test_draws_among_many_follow_their_weights():
    """Over several blocks, the last one not full, with weights of very different sizes."""
    n, size = 40_000, 2 * sampling.BLOCK + 45
    weights = np.random.default_rng(0).lognormal(0, 3, size)
    weights[:140], weights[-1] = 0, weights.max()
    drawn = sampling.draw_in_proportion(jnp.tile(jnp.asarray(weights)[None], (n, 1)), keys(n))
    shares = weights / weights.sum()
    counted = np.bincount(drawn, minlength=size)
    assert not counted[weights == 0].any()
    # Five standard errors, and one draw for what is too rare to have any.
    np.testing.assert_array_less(abs(counted - n * shares), 5 * np.sqrt(n * shares) + 1)


@settings(deadline=None)  # the first compiles
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.3, 1.0, 1e30]), min_size=1, max_size=300).filter(
        any
    )
)
def test_never_one_without_weight(weights):
    row = np.zeros(300, np.float32)
    row[: len(weights)] = weights
    rows = jnp.tile(jnp.asarray(row), (64, 1))
    assert (row[np.asarray(sampling.draw_in_proportion(rows, keys(64)))] > 0).all()


def test_a_place_behind_rounded_sums_is_in_the_last_weight():
    weights = jnp.array([[0.5, 0.25, 0.0]])
    index, _ = sampling._find(weights, jnp.array([0.75]))
    assert index.tolist() == [1]


def test_forbidden_tokens_are_never_drawn():
    logits = LOGITS.at[0, 0].set(-jnp.inf)
    for sampler in (
        sampling.Greedy(),
        sampling.Temperature(temperature=2.0),
        sampling.MinP(p=0.0),
        sampling.TopP(p=1.0),
        sampling.TopK(k=5),
    ):
        assert 0 not in np.asarray(sampler.draw(jnp.tile(logits, (500, 1)), keys(500)))


def test_a_row_draws_the_same_in_any_batch():
    rows = jax.random.normal(jax.random.key(1), (8, 300))
    sampler = sampling.TopP(temperature=1.3, p=0.9)
    key = jax.random.key(5)
    together = sampler.draw(rows, sampling.step_keys(key, jnp.arange(8), 17))
    alone = [
        sampler.draw(rows[i : i + 1], sampling.step_keys(key, jnp.array([i]), 17))[0]
        for i in range(8)
    ]
    np.testing.assert_array_equal(together, alone)
    other_step = sampler.draw(rows, sampling.step_keys(key, jnp.arange(8), 18))
    assert (np.asarray(other_step) != np.asarray(together)).any()


def test_repetition_penalty_touches_recent_penalisable_tokens_only():
    penalty = sampling.RepetitionPenalty(penalty=2.0, window=3)
    logits = jnp.array([[4.0, -4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    recent = jnp.array([[0, 1, 2], [-1, -1, 3]])
    changed = penalty.apply(logits, recent, jnp.array([True, True, False, True]))
    np.testing.assert_array_equal(changed, [[2.0, -8.0, 4.0, 4.0], [1.0, 1.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: sampling.choose_sampler(-0.1),
        lambda: sampling.choose_sampler(2.5),
        lambda: sampling.choose_sampler(1.0, min_p=1.2),
        lambda: sampling.choose_sampler(1.0, top_p=0.0),
        lambda: sampling.choose_sampler(1.0, top_k=0),
        lambda: sampling.choose_sampler(1.0, top_k=5, min_p=0.1),
        lambda: sampling.RepetitionPenalty(penalty=0.5),
    ],
)
def test_impossible_settings_are_user_errors(make):
    with pytest.raises(UserError):
        make()


def test_temperature_zero_is_greedy():
    assert sampling.choose_sampler(0, min_p=0.035) == sampling.Greedy()
