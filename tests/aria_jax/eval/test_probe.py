"""The probe: finds what is there, nothing where nothing is, and keeps compositions together."""

import numpy as np
import pytest

from aria_jax.eval.probe import probe
from data_pipeline.errors import UserError


def made(n=90, signal=3.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = [("bach", "chopin", "liszt")[i % 3] for i in range(n)]
    centres = np.eye(3, 8) * signal
    x = np.stack([centres[i % 3] + rng.normal(size=8) for i in range(n)])
    return x, labels


def test_reads_a_linear_signal_and_reports_consistent_numbers():
    x, labels = made()
    result = probe(x, labels)
    assert result.accuracy > 0.9 and result.confusion.sum() == result.n_test == 90
    assert result.accuracy == pytest.approx(np.trace(result.confusion) / 90)
    assert result.accuracy_ci[0] <= result.accuracy <= result.accuracy_ci[1]
    assert result.macro_f1 == pytest.approx(np.mean(list(result.per_class_f1.values())))


def test_reads_nothing_from_noise():
    x, labels = made(signal=0.0)
    assert probe(x, labels).accuracy < 0.55


def test_a_composition_is_never_on_both_sides():
    # Features that identify the composition and nothing else: leaking would score 1.
    rng = np.random.default_rng(0)
    compositions = [f"work {i // 3}" for i in range(90)]
    of_work = rng.normal(size=(30, 16))
    x = np.repeat(of_work, 3, axis=0)
    labels = [("bach", "chopin")[rng.integers(2)] for _ in range(30) for _ in range(3)]
    labels = [labels[i // 3 * 3] for i in range(90)]
    leaked, grouped = probe(x, labels), probe(x, labels, groups=compositions)
    assert leaked.accuracy > 0.9 > 0.75 > grouped.accuracy


def test_a_given_split_is_kept():
    x, labels = made()
    splits = ["train" if i < 60 else "val" for i in range(90)]
    result = probe(x, labels, splits=splits)
    assert (result.n_train, result.n_test) == (60, 30)


def test_small_classes_are_left_out_and_named():
    x, labels = made()
    labels[:2] = ["satie", "satie"]
    result = probe(x, labels)
    assert result.left_out == {"satie": 2} and result.n_test == 88


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (["bach"] * 90, {}, "two classes"),
        ([None] * 90, {}, "no labels"),
        (made()[1], {"splits": ["train"] * 90}, "all files on one side"),
        (made()[1], {"groups": ["one"] * 90}, "needs 5 compositions"),
    ],
)
def test_what_cannot_be_probed_is_explained(labels, options, message):
    with pytest.raises(UserError, match=message):
        probe(made()[0], labels, **options)
