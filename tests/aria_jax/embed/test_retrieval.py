"""Retrieval metrics against their definitions on cases small enough to rank by hand."""

import numpy as np
import pytest

from aria_jax.embed import search as module
from aria_jax.embed.search import retrieval
from data_pipeline.errors import UserError


def angles(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def test_ranks_by_hand():
    # a at 0 and 30, b at 10 and 90: 0 sees 10 (b) then 30 (a), 10 sees 0, 30 (a) then 90 (b), …
    result = retrieval(angles(0, 30, 10, 90), ["a", "a", "b", "b"], ks=(1, 2))
    assert result.mrr == pytest.approx(np.mean([1 / 2, 1 / 2, 1 / 3, 1 / 2]))
    assert result.hits == {1: 0.0, 2: 0.75} and result.median_rank == 2


def test_two_sets_and_queries_without_answer():
    result = retrieval(
        angles(0, 50, 70),
        ["a", "b", "c"],
        candidates_NxE=angles(5, 60, 100),
        candidate_keys=["a", "a", "b"],
    )
    # a: found first; b: after both a's; c has no answer.
    assert (result.n_queries, result.n_without, result.n_candidates) == (2, 1, 3)
    assert result.mrr == pytest.approx((1 + 1 / 3) / 2)


def test_slices_of_the_same_file_neither_help_nor_hinder():
    files = ["x", "x", "y", "z"]
    keys = ["a", "a", "a", "b"]
    vectors = angles(0, 1, 20, 15)
    near = retrieval(vectors, keys)
    apart = retrieval(vectors, keys, apart=files)
    assert near.hits[1] == pytest.approx(2 / 3)  # the two slices of x find each other
    assert apart.hits[1] == 0.0 and apart.hits[5] == 1.0


def test_a_collapsed_embedding_scores_nothing():
    result = retrieval(np.ones((20, 4)), ["a"] * 2 + [f"{i}" for i in range(18)])
    assert result.mrr == pytest.approx(1 / 19)


def test_chance_is_what_random_vectors_score():
    rng = np.random.default_rng(0)
    keys = [f"{i // 4}" for i in range(400)]
    found = [retrieval(rng.normal(size=(400, 32)), keys) for _ in range(40)]
    assert np.mean([r.mrr for r in found]) == pytest.approx(found[0].chance_mrr, rel=0.1)


def test_queries_in_chunks_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, keys = rng.normal(size=(50, 8)), [str(i % 7) for i in range(50)]
    whole = retrieval(vectors, keys)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert retrieval(vectors, keys) == whole


def test_nothing_to_find_is_an_error():
    with pytest.raises(UserError, match="no query has a relevant row"):
        retrieval(angles(0, 1), ["a", "b"])
