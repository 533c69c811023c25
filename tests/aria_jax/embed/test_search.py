"""Search: exactly the best rows of any file, reading as little of it as possible."""

import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from aria_jax.embed import table as module
from aria_jax.embed.index import recall
from aria_jax.embed.search import Searcher, nearest, search
from aria_jax.embed.table import Embeddings, join_embeddings, read_embeddings, write_embeddings
from data_pipeline.artifact import Identity
from data_pipeline.errors import UserError


def table(vectors, first=0):
    n = len(vectors)
    return Embeddings(
        path=[f"{first + i}.mid" for i in range(n)],
        sha256=[f"{first + i:064x}" for i in range(n)],
        embedding=vectors.astype(np.float32),
        n_slices=np.ones(n, int),
        n_notes=np.ones(n, int),
        duration_ms=np.ones(n, int),
        labels=[{"composer": "bach"}] * n,
        fingerprint="f",
    )


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(500, 16))


def best(vectors, query, k):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit @ (query / np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")[:k]
    return order, scores[order]


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_finds_the_best_of_several_row_groups(vectors, tmp_path, monkeypatch, k):
    monkeypatch.setattr(module, "BLOCK_ROWS", 64)
    parts = []
    for start in range(0, 500, 120):
        parts.append(tmp_path / f"{start}.parquet")
        write_embeddings(table(vectors[start : start + 120], start), parts[-1])
    join_embeddings(
        parts, tmp_path / "e.parquet", Identity("embeddings", 1, {"model": "f"}, {}), ""
    )
    assert pq.ParquetFile(tmp_path / "e.parquet").num_row_groups == 5
    query = np.random.default_rng(1).normal(size=16)
    hits = search(query, tmp_path / "e.parquet", k)
    order, scores = best(vectors, query, k)
    assert [hit.path for hit in hits] == [f"{i}.mid" for i in order]
    assert [int(hit.sha256, 16) for hit in hits] == order.tolist()
    np.testing.assert_allclose([hit.score for hit in hits], scores, rtol=1e-5, atol=1e-6)


def clustered(n, width, rng):
    """Rows close to few directions, as embeddings of music are; some of them the same, one is 0."""
    centres = rng.normal(size=(20, width))
    rows = centres[rng.integers(0, 20, n)] + 0.05 * rng.normal(size=(n, width))
    rows[7:12], rows[13] = rows[7], 0
    return rows


@pytest.mark.parametrize("k", [1, 10, 300, 5000])
@pytest.mark.parametrize("kind", ["spread", "clustered"])
def test_the_exact_index_finds_what_the_whole_file_has(tmp_path, kind, k):
    rng, path = np.random.default_rng(0), tmp_path / "e.parquet"
    rows = rng.normal(size=(3000, 32)) if kind == "spread" else clustered(3000, 32, rng)
    write_embeddings(table(rows), path)
    searcher = Searcher(path, "exact")
    for query in (rows[7], rng.normal(size=32), rows[100] + rows[2000]):
        plain, found = search(query, path, k), searcher(query, k)
        np.testing.assert_allclose(
            [hit.score for hit in found], [hit.score for hit in plain], atol=1e-6
        )
        least = plain[-1].score + 1e-6  # among equals, rounding says who comes last
        assert {h.path for h in found if h.score > least} == (
            {h.path for h in plain if h.score > least}
        )
        assert len({hit.path for hit in found}) == min(k, 3000)


def test_few_rows_are_looked_at_as_they_are(tmp_path):
    """Of random rows, which are the hardest: near to a query as to any other."""
    rng, path = np.random.default_rng(0), tmp_path / "e.parquet"
    write_embeddings(table(rng.normal(size=(20_000, 64))), path)
    searcher = Searcher(path, "exact")
    query = rng.normal(size=64).astype(np.float32)
    rows = searcher._index._candidates(query / np.linalg.norm(query), 10)
    assert 10 <= len(rows) < 200


def test_an_index_of_another_file_is_made_again(vectors, tmp_path):
    path = tmp_path / "e.parquet"
    write_embeddings(table(vectors), path)
    for index in ("exact", "ivf"):
        pytest.importorskip("faiss", reason="needs the extra `search`")
        assert search(vectors[3], path, 1, index=index)[0].path == "3.mid"
    made = sorted((tmp_path / "e.parquet.index").iterdir())
    times = [file.stat().st_mtime_ns for file in made]
    search(vectors[3], path, 1, index="exact")
    assert [file.stat().st_mtime_ns for file in made] == times, "read, not made again"
    write_embeddings(table(vectors[::-1], 7), path)
    for index in ("exact", "ivf"):
        assert search(vectors[3], path, 1, index=index)[0].path == "503.mid"


def test_an_approximate_index_says_how_much_it_finds(tmp_path):
    pytest.importorskip("faiss", reason="needs the extra `search`")
    rng, path = np.random.default_rng(0), tmp_path / "e.parquet"
    rows = clustered(4000, 16, rng)
    write_embeddings(table(rows), path)
    searcher = Searcher(path, "ivf")
    n_lists, n_probed, share = map(
        float, re.search(r"in (\S+) lists, (\S+) of .*finds (\S+)%", searcher.about_index).groups()
    )
    assert n_lists == 62 and 1 <= n_probed <= 62 and share >= 95
    chosen = rng.choice(4000, 50, replace=False)
    found = [{hit.path for hit in searcher(rows[i])} for i in chosen]
    right = [{hit.path for hit in search(rows[i], path)} for i in chosen]
    measured = np.mean([len(f & r) / len(r) for f, r in zip(found, right, strict=True)])
    assert measured > 0.85, "other rows than those it was measured with"
    assert searcher(rows[5], 1)[0].score == pytest.approx(1, abs=2e-3), "of float16 vectors"


def test_recall_is_the_share_of_the_right_rows():
    assert recall(np.array([[1, 2], [5, 6]]), np.array([[2, 3], [6, 5]])) == 0.75


def test_names_need_not_be_utf8(vectors, tmp_path):
    path = tmp_path / "Caf\udce9" / "e.parquet"
    write_embeddings(table(vectors), path)
    np.testing.assert_array_equal(read_embeddings(path).embedding, vectors.astype(np.float32))
    assert search(vectors[5], path, 1)[0].path == "5.mid"
    assert search(vectors[5], path, 1, index="exact")[0].path == "5.mid"
    pytest.importorskip("faiss", reason="needs the extra `search`")
    with pytest.raises(UserError, match="use --index exact"):
        search(vectors[5], path, 1, index="ivf")


def test_an_index_without_faiss_is_explained(vectors, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    write_embeddings(table(vectors), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"aria-jax\[search\]"):
        search(np.ones(16), tmp_path / "e.parquet", index="ivf")


def test_equal_scores_come_in_the_files_order():
    rows, scores = nearest(np.array([1.0, 0.0]), iter([np.ones((3, 2)), np.ones((4, 2))]), 5)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scores, 2**-0.5)


def test_unusable_files_are_named(vectors, tmp_path):
    write_embeddings(table(vectors), tmp_path / "e.parquet")
    (tmp_path / "x.parquet").write_bytes(b"no")
    for index in (None, "exact"):
        with pytest.raises(UserError, match="the query has 8"):
            search(np.ones(8), tmp_path / "e.parquet", index=index)
    with pytest.raises(UserError, match="not a Parquet file"):
        search(np.ones(16), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no such file"):
        search(np.ones(16), tmp_path / "y.parquet")
