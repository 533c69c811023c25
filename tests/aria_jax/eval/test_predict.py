"""Labels of files: the reference's weighting of slices, and which files are scored."""

import numpy as np
import pytest

from aria_jax.eval.predict import Prediction, score_predictions
from aria_jax.losses.classification import file_probabilities


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


def test_only_files_with_a_known_label_are_scored():
    likely = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    labels = ["bach", "bach", "liszt", "satie"]
    predictions = [
        Prediction(f"{i}.mid", str(i), likely[i], {"composer": labels[i]}) for i in range(4)
    ]
    scores = score_predictions(predictions, "composer", ("bach", "liszt"))
    assert (scores.n_scored, scores.accuracy) == (3, pytest.approx(1 / 3))
    assert scores.confusion.tolist() == [[1, 1], [1, 0]]
    assert score_predictions(predictions, "form", ("bach", "liszt")).n_scored == 0
