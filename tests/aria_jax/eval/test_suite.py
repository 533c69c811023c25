"""The benchmark suite: which tasks it finds, how they are judged, what the table says."""

import numpy as np
import pytest

from aria_jax.embed.table import Embeddings
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
    assert "no composition on both sides" in tasks[0].protocol


def test_published_splits_are_kept():
    rows = [
        (
            f"{i}.mid",
            {"form": ("waltz", "fugue")[i % 2], "form_split": "train" if i < 30 else "val"},
        )
        for i in range(50)
    ]
    [task] = find_tasks(table(rows))
    assert task.name == "form" and task.protocol == "published split"
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
    assert task.protocol == "published split" and task.splits == splits
    result = run_suite([task], {"x": table(rows).embedding})["x"]["maestro composer"]
    assert (result.split, result.n_train, result.n_test) == ("test", 30, 12)
    [own] = find_tasks(table(rows), published_split=False)
    assert own.splits is None and "5-fold" in own.protocol
    some = [(path, {**labels, "split": "train"}) for path, labels in rows]
    assert find_tasks(table(some))[0].splits is None  # nothing to judge on


def test_the_table_holds_ours_and_the_papers_marked(rows):
    data = table(rows)
    told = np.array([[len(labels.get("composer", "")), len(labels.get("pianist", ""))]
                     for _, labels in rows], float)  # fmt: skip
    tasks = find_tasks(data)
    results = run_suite(tasks, {"noise": data.embedding, "told": told}, min_per_class=5)
    assert results["told"]["asap composer"].accuracy == 1.0 > 0.8
    text = markdown_table(tasks, results)
    assert "| told | 100.0 / 100.0 | 100.0 / 100.0 |" in text
    assert "| Aria_Emb (quoted) | 90.50 / 90.49 | 91.57 / 92.38 |" in text
    assert "| majority class |" in text and "not a comparison" in text
    assert "accuracy less" not in text, "there is no baseline among these"
    results = {"statistics": results["noise"], "told": results["told"]}
    gain = 100 * (1 - results["statistics"]["asap composer"].accuracy)
    assert f"| told | {gain:+.1f} (" in markdown_table(tasks, results)


def test_rows_follow_the_paths(rows):
    data = table(rows)
    wanted = list(data.path)[::-1]
    np.testing.assert_array_equal(rows_by_path(data, wanted, "x"), data.embedding[::-1])
    with pytest.raises(UserError, match="no embedding of 1 of 2 files"):
        rows_by_path(data, [wanted[0], "nowhere.mid"], "MERT")


def test_without_labels_there_is_no_task():
    with pytest.raises(UserError, match="no task found"):
        find_tasks(table([(f"{i}.mid", {}) for i in range(30)]))
