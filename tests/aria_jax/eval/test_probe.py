"""The probe: finds what is there, nothing where nothing is, and keeps compositions together."""

import numpy as np
import pytest
import sklearn.metrics

from aria_jax.eval.probe import (
    accuracy,
    confusion_counts,
    f1_per_class,
    few_shot,
    macro_f1,
    paired_difference,
    probe,
)
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


def test_repeats_are_cross_validations_with_other_seeds():
    x, labels = made(signal=1.0)
    works = [f"work {i // 3 % 15}" for i in range(90)]
    options = {"groups": works, "classifier": "knn"}
    three = probe(x, labels, repeats=3, seed=5, **options)
    alone = [probe(x, labels, seed=seed, **options) for seed in (5, 6, 7)]
    assert three.accuracies == tuple(one.accuracy for one in alone)
    assert len(set(three.accuracies)) > 1
    assert three.accuracy == pytest.approx(np.mean(three.accuracies))
    assert three.macro_f1 == pytest.approx(np.mean([one.macro_f1 for one in alone]))
    np.testing.assert_array_equal(three.confusion, sum(one.confusion for one in alone))
    np.testing.assert_allclose(three.correct, np.mean([one.correct for one in alone], axis=0))
    assert three.n_test == 90 and three.per_class["bach"]["n"] == 30
    assert three.chosen == {"knn": 15} and three.summary()["accuracies"] == three.accuracies
    gain = paired_difference(three, probe(0 * x, labels, repeats=3, seed=5, **options))[0]
    assert gain == pytest.approx(three.accuracy - 1 / 3)


def test_intervals_are_bootstrapped_over_compositions():
    """Ten performances of each work say little more than one."""
    x, labels = made(n=60, signal=1.0)
    works = [f"work {i}" for i in range(60)]
    alone = probe(x, labels, groups=works, classifier="knn")
    rows = np.repeat(np.arange(60), 10)
    many = probe(x[rows], [labels[i] for i in rows], groups=[works[i] for i in rows],
                 classifier="knn")  # fmt: skip
    width, of_many = (r.accuracy_ci[1] - r.accuracy_ci[0] for r in (alone, many))
    assert of_many > 0.7 * width


def test_validation_and_test_are_not_one_set():
    x, labels = made()
    x[75:] = 0  # nothing can be read of the test files
    splits = ["train"] * 60 + ["val"] * 15 + ["test"] * 15
    result, val = probe(x, labels, splits=splits), probe(x, labels, splits=splits, judge="val")
    assert (result.split, result.n_test, val.split, val.n_test) == ("test", 15, "val", 15)
    assert val.accuracy > 0.9 > 0.5 > result.accuracy and val.n_train == result.n_train == 60
    with pytest.raises(UserError, match="one side"):
        probe(x, labels, splits=splits, judge="dev")


def test_scores_are_scikit_learns_for_many_resamples_at_once():
    rng = np.random.default_rng(1)
    y_true, y_pred = rng.integers(0, 5, (2, 3, 80))
    y_true[2], y_pred[2] = y_true[2] % 3, y_pred[2] % 3  # two classes that nobody has
    counts = confusion_counts(y_true, y_pred, 5)
    for t, p, c, a, f in zip(
        y_true, y_pred, counts, accuracy(counts), macro_f1(counts), strict=True
    ):
        np.testing.assert_array_equal(c, sklearn.metrics.confusion_matrix(t, p, labels=range(5)))
        assert a == pytest.approx(sklearn.metrics.accuracy_score(t, p))
        assert f == pytest.approx(sklearn.metrics.f1_score(t, p, average="macro"))
    assert np.isnan(f1_per_class(counts)[2, 3:]).all()


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
        (made()[1], {"groups": ["one"] * 90}, "5 folds need 5 compositions"),
    ],
)
def test_what_cannot_be_probed_is_explained(labels, options, message):
    with pytest.raises(UserError, match=message):
        probe(made()[0], labels, **options)


def test_compositions_on_both_sides_of_a_given_split_are_counted():
    x, labels = made()
    splits = ["train" if i < 60 else "val" for i in range(90)]
    works = [f"work {i % 60}" for i in range(90)]  # 30 of them again in the other part
    assert probe(x, labels, splits=splits, groups=works).shared_groups == 30
    assert probe(x, labels, groups=works).shared_groups == 0


def test_rows_without_a_split_are_on_neither_side():
    x, labels = made()
    splits = ["train"] * 60 + ["val"] * 20 + [None] * 10
    result = probe(x, labels, splits=splits)
    assert (result.n_train, result.n_test) == (60, 20)


def test_slices_are_learnt_from_and_files_are_judged():
    """Slices too noisy to tell anything each; ten of a file together tell its class."""
    rng = np.random.default_rng(0)
    files = [f"{i}.mid" for i in range(90) for _ in range(10)]
    labels = [("bach", "chopin")[i % 2] for i in range(90) for _ in range(10)]
    centre = np.array([(1.0, -1.0)[label == "bach"] for label in labels])[:, None]
    x = 0.5 * centre * np.ones((1, 4)) + 2 * rng.normal(size=(900, 4))
    of_files = probe(x, labels, files=files)
    of_slices = probe(x, labels, groups=files)
    assert of_files.n_test == 90 and of_slices.n_test == 900
    assert of_files.accuracy > 0.9 > 0.8 > of_slices.accuracy


def test_more_shots_read_more():
    x, labels = made(n=180, signal=2.0)
    curve = few_shot(x, labels, (1, 4, 30))
    assert [(point.shots, point.fewest) for point in curve] == [(1, 1), (4, 4), (30, 30)]
    assert few_shot(x, labels, (999,), draws=1)[0].fewest < 60
    assert curve[0].accuracy < curve[1].accuracy < curve[2].accuracy
    assert curve[2].accuracy <= probe(x, labels).accuracy + 0.1


def test_per_class_rows_agree_with_the_confusion():
    x, labels = made(signal=1.5)
    result = probe(x, labels)
    for i, name in enumerate(result.classes):
        row = result.per_class[name]
        assert row["n"] == labels.count(name) == result.confusion[i].sum()
        assert row["recall"] == pytest.approx(result.confusion[i, i] / row["n"])


def test_results_on_the_same_files_are_paired():
    x, labels = made(signal=1.5)
    works = [f"work {i // 6}" for i in range(90)]
    better, worse = (probe(f, labels, groups=works, classifier="knn") for f in (x, 0.3 * x))
    noise = probe(
        np.random.default_rng(2).normal(size=x.shape), labels, groups=works, classifier="knn"
    )
    gain, low, high = paired_difference(better, noise)
    assert gain == pytest.approx(better.accuracy - noise.accuracy) and 0 < low < gain < high
    assert paired_difference(better, worse)[0] == 0  # scaled only
    assert paired_difference(better, better) == (0, 0, 0)
    with pytest.raises(ValueError, match="different files"):
        paired_difference(better, probe(x[:60], labels[:60], groups=works[:60], classifier="knn"))


def test_performances_of_one_composition_widen_the_interval():
    """Ten times the same file is no more evidence than one."""
    x, labels = made(n=45, signal=1.0)
    noise = np.random.default_rng(1).normal(size=x.shape)

    def width(repeats):
        works = [f"work {i}" for i in range(45) for _ in range(repeats)]
        both = [
            probe(
                np.repeat(f, repeats, 0),
                np.repeat(labels, repeats).tolist(),
                groups=works,
                classifier="knn",
            )
            for f in (x, noise)
        ]
        _, low, high = paired_difference(*both)
        return high - low

    assert width(10) > 0.8 * width(1)
