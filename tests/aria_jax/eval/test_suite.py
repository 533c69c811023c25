"""The benchmark suite: which tasks it finds, how they are judged, what the table says."""

import numpy as np
import pytest

from aria_jax.embed.table import Embeddings
from aria_jax.eval import classifiers
from aria_jax.eval.suite import find_tasks, markdown_table, rows_by_path, run_suite
from data_pipeline.errors import UserError


def table(rows):
    n = len(rows)
    return Embeddings(
        path=[path for path, _ in rows],
        sha256=[""] * n,
        embedding=np.random.default_rng(0).normal(size=(n, 6)),
        n_slices=np.ones(n, int),
        n_notes=np.ones(n, int),
        duration_ms=np.ones(n, int),
        labels=[labels for _, labels in rows],
        fingerprint="",
    )


@pytest.fixture
def rows():
    """30 files by two composers of 15 works, 24 by two pianists, one stray composer among them."""
    asap = [
        (f"asap/{i}.mid", {"composer": ("bach", "liszt")[i % 2], "composition": f"w{i // 2}"})
        for i in range(30)
    ]
    pianists = [(f"p8/{i}.mid", {"pianist": ("yiruma", "hancock")[i % 2]}) for i in range(24)]
    pianists[0][1]["composer"] = "bach"
    return asap + pianists


def test_finds_the_tasks_of_each_data_set(rows):
    tasks = find_tasks(table(rows))
    assert [task.name for task in tasks] == ["asap composer", "p8 pianist"]
    assert len(tasks[0].rows) == 30 and tasks[0].groups[:2] == ["w0", "w0"]
    assert tasks[0].splits is None and not tasks[0].notes


def test_folders_that_are_classes_make_one_data_set():
    rows = [
        (f"{who}/{i}.mid", {"pianist": who}) for who in ("yiruma", "hancock") for i in range(12)
    ]
    [task] = find_tasks(table(rows))
    assert task.name == "pianist" and len(task.rows) == 24 and len(set(task.groups)) == 24
    with pytest.raises(UserError, match="no task found"):
        find_tasks(table(rows[:12]))


def test_published_splits_are_kept():
    rows = [
        (
            f"{i}.mid",
            {"form": ("waltz", "fugue")[i % 2], "form_split": "train" if i < 30 else "val"},
        )
        for i in range(50)
    ]
    [task] = find_tasks(table(rows))
    assert task.name == "form" and task.splits is not None
    result = run_suite([task], {"x": table(rows).embedding})["x"]["form"]
    assert (result.n_train, result.n_test) == (30, 20)


def test_an_official_split_in_flat_metadata_is_kept():
    """As MAESTRO and ASAP have it: a label "split" of every file, test and validation apart."""
    splits = ["train"] * 30 + ["validation"] * 8 + ["test"] * 12
    rows = [
        (f"maestro/{i}.mid", {"composer": ("bach", "liszt")[i % 2], "split": splits[i]})
        for i in range(50)
    ]
    [task] = find_tasks(table(rows))
    assert task.splits == splits
    result = run_suite([task], {"x": table(rows).embedding})["x"]["maestro composer"]
    assert (result.split, result.n_train, result.n_test) == ("test", 30, 12)
    [own] = find_tasks(table(rows), published_split=False)
    assert own.splits is None
    [crossed] = find_tasks(table(rows), cross_validate=["maestro"])
    assert crossed.splits is None
    with pytest.raises(UserError, match="no data set 'asap' to cross-validate; there are maestro"):
        find_tasks(table(rows), cross_validate=["asap"])
    some = [(path, {**labels, "split": "train"}) for path, labels in rows]
    assert find_tasks(table(some))[0].splits is None  # nothing to judge on


def test_known_data_sets_are_judged_as_the_field_does():
    """PiJAMA's pianists of 20 pieces or more, the 30 most frequent composers of GiantMIDI."""
    pianists = ["hyman"] * 25 + ["tatum"] * 20 + ["jarrett"] * 19
    rows = [
        (f"pijama/{i}.mid", {"pianist": n, "genre": "jazz", "composition": f"album {n} {i % 2}"})
        for i, n in enumerate(pianists)
    ]
    rows += [
        (f"giantmidi/{c}_{i}.mid", {"composer": f"composer {c:02}", "genre": "classical"})
        for c in range(33)
        for i in range(10 + c)
    ]
    tasks = {task.name: task for task in find_tasks(table(rows))}
    assert set(tasks) == {"giantmidi composer", "pijama pianist", "giantmidi+pijama genre"}
    assert set(tasks["pijama pianist"].labels) == {"hyman", "tatum"}
    assert set(tasks["pijama pianist"].groups) == {f"album {n} {i}" for n in ("hyman", "tatum")
                                                   for i in range(2)}  # fmt: skip
    composers = tasks["giantmidi composer"]
    assert min(composers.labels) == "composer 03" and len(set(composers.labels)) == 30
    assert "the 30 most frequent" in composers.notes
    genre = tasks["giantmidi+pijama genre"]
    assert len(genre.rows) == len(rows) and set(genre.labels) == {"jazz", "classical"}
    assert any("told apart" in note for note in genre.notes)
    assert [tasks[name].quoted for name in sorted(tasks)] == ["GPM30", "genre", "PiJAMA30"]


def test_large_classes_are_sampled_and_the_table_says_so(rows):
    data = table(rows)
    asap, p8 = find_tasks(data, max_per_class=12)
    assert sorted(asap.labels) == ["bach"] * 12 + ["liszt"] * 12 and len(p8.rows) == 24
    assert asap.notes == ("at most 12 of a class: 24 of 30 files, seed 0",)
    assert asap.labels == [rows[i][1]["composer"] for i in asap.rows]
    again, other = (find_tasks(data, max_per_class=12, seed=seed)[0] for seed in (0, 1))
    assert (again.rows == asap.rows).all() and (other.rows != asap.rows).any()
    results = run_suite([asap], {"x": data.embedding}, repeats=2)
    assert "- asap composer: 24 files judged, 2 classes, 5-fold, no composition on both sides, " \
        "mean of 2 seeds; at most 12 of a class" in markdown_table([asap], results)  # fmt: skip
    split = [(p, {**labels, "split": "train" if i < 20 else "val"})
             for i, (p, labels) in enumerate(rows[:30])]  # fmt: skip
    [task] = find_tasks(table(split), max_per_class=5)
    assert task.splits == ["train"] * 10 + ["val"] * 10  # all that are judged, fewer to learn from


def test_a_class_of_one_composition_is_told():
    rows = [(f"p/{i}.mid", {"pianist": "ab"[i % 2], "composition": f"album {i % 2 * (i % 5)}"})
            for i in range(40)]  # fmt: skip
    [task] = find_tasks(table(rows))
    [note] = task.notes
    assert note.startswith("classes that are of one composition or album") and note.endswith(": 1")


def test_seeds_are_averaged_and_progress_counts_fits(rows):
    data, told = table(rows), []
    tasks = find_tasks(data)
    results = run_suite(
        tasks, {"x": data.embedding}, folds=3, repeats=2, classifier="knn",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(n, 12) for n in range(1, 13)]
    assert len(results["x"]["asap composer"].accuracies) == 2


def test_a_forest_that_was_chosen_is_told(rows, monkeypatch):
    monkeypatch.setattr(classifiers, "TREES", 5)
    data = table(rows)
    tasks = find_tasks(data)[:1]
    results = run_suite(tasks, {"x": data.embedding}, classifier="forest")
    assert "- x: asap composer 5/5" in markdown_table(tasks, results)


def test_the_table_holds_ours_and_the_papers_marked(rows):
    data = table(rows)
    told = np.array([[len(labels.get("composer", "")), len(labels.get("pianist", ""))]
                     for _, labels in rows], float)  # fmt: skip
    tasks = find_tasks(data)
    results = run_suite(tasks, {"noise": data.embedding, "told": told})
    assert results["told"]["asap composer"].accuracy == 1.0 > 0.8
    text = markdown_table(tasks, results)
    assert "| told | 100.0 / 100.0 | 100.0 / 100.0 |" in text
    assert "| Aria_Emb (quoted) | 90.50 / 90.49 | 91.57 / 92.38 |" in text
    assert "| majority class |" in text and "not a comparison" in text
    assert "accuracy less" not in text, "there is no baseline among these"
    results = {"statistics": results["noise"], "told": results["told"]}
    gain = 100 * (1 - results["statistics"]["asap composer"].accuracy)
    assert f"| told | {gain:+.1f} (" in markdown_table(tasks, results)
    assert "MAJEPPA, 5 folds x 5 seeds, 2608.11026 (quoted) |  | 86.8 ± 5.2 |" in text
    assert "MidiBERT" not in text, "no task of these is like EMOPIA"
    results |= {"untrained": results["statistics"], "pitch-class": results["statistics"]}
    of_untrained = markdown_table(tasks, results).split("less that of untrained")[1]
    assert f"| told | {gain:+.1f} (" in of_untrained and "pitch-class" not in of_untrained


def test_rows_follow_the_paths(rows):
    data = table(rows)
    wanted = list(data.path)[::-1]
    np.testing.assert_array_equal(rows_by_path(data, wanted, "x"), data.embedding[::-1])
    some = [wanted[0], "nowhere.mid"]
    with pytest.raises(UserError, match="no embedding of 1 of 2 files"):
        rows_by_path(data, some, "MERT")
    assert np.isnan(rows_by_path(data, some, "MERT", needed=[0])[1]).all()


def test_without_labels_there_is_no_task():
    with pytest.raises(UserError, match="no task found"):
        find_tasks(table([(f"{i}.mid", {}) for i in range(30)]))
