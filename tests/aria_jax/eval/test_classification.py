"""Answers about files: the reference's weighting, and scores against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from aria_jax.eval.classification import (
    accuracy,
    confusion_counts,
    f1_per_class,
    file_probabilities,
    macro_f1,
)


def test_long_slices_outweigh_short_ones_and_fillers_do_not_count():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.0, 1.0], [1.0, 0.0]])
    pieces, mean = file_probabilities(
        probabilities, np.array([100, 900, 10, 500]), np.array([7, 7, 3, -1])
    )
    assert pieces.tolist() == [3, 7]
    np.testing.assert_allclose(mean, [[0, 1], [0.27, 0.73]])


def test_order_of_slices_does_not_matter():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 50)
    n_tokens, pieces = rng.integers(1, 900, 50), rng.integers(0, 9, 50)
    order = rng.permutation(50)
    one = file_probabilities(probabilities, n_tokens, pieces)
    other = file_probabilities(probabilities[order], n_tokens[order], pieces[order])
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1])
    np.testing.assert_allclose(one[1].sum(1), 1)


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(1)
    truth, answer = rng.integers(0, 5, (2, 80))
    counts = confusion_counts(truth, answer, 5)
    np.testing.assert_array_equal(counts, confusion_matrix(truth, answer))
    assert accuracy(counts) == pytest.approx(accuracy_score(truth, answer))
    assert f1_per_class(counts).mean() == pytest.approx(f1_score(truth, answer, average="macro"))
    few = confusion_counts(truth % 3, answer % 3, 5)  # two classes that nobody has
    assert macro_f1(few) == pytest.approx(f1_score(truth % 3, answer % 3, average="macro"))
