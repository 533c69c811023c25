"""Search: exactly the best rows of any file, reading as little of it as possible."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from aria_jax.embed import search as module
from aria_jax.embed.search import nearest, search
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
    monkeypatch.setattr(module, "ROWS", 64)
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


@pytest.mark.parametrize("k", [3, 1000])
def test_an_index_finds_the_same(vectors, tmp_path, k):
    pytest.importorskip("faiss", reason="needs the extra `search`")
    path = tmp_path / "e.parquet"
    write_embeddings(table(vectors), path)
    query = np.random.default_rng(1).normal(size=16)
    plain = search(query, path, k)
    for _ in range(2):  # made, then read
        found = search(query, path, k, index=True)
        assert [hit.path for hit in found] == [hit.path for hit in plain]
        np.testing.assert_allclose([h.score for h in found], [h.score for h in plain], atol=1e-5)
    write_embeddings(table(vectors[::-1], 7), path)  # another file: the index is made again
    found, plain = search(query, path, k, index=True), search(query, path, k)
    assert [hit.path for hit in found] == [hit.path for hit in plain]


def test_names_need_not_be_utf8(vectors, tmp_path):
    path = tmp_path / "Caf\udce9" / "e.parquet"
    write_embeddings(table(vectors), path)
    np.testing.assert_array_equal(read_embeddings(path).embedding, vectors.astype(np.float32))
    assert search(vectors[5], path, 1)[0].path == "5.mid"
    pytest.importorskip("faiss", reason="needs the extra `search`")
    with pytest.raises(UserError, match="without --index"):
        search(vectors[5], path, 1, index=True)


def test_an_index_without_faiss_is_explained(vectors, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    write_embeddings(table(vectors), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"aria-jax\[search\]"):
        search(np.ones(16), tmp_path / "e.parquet", index=True)


def test_equal_scores_come_in_the_files_order():
    rows, scores = nearest(np.array([1.0, 0.0]), iter([np.ones((3, 2)), np.ones((4, 2))]), 5)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scores, 2**-0.5)


def test_unusable_files_are_named(vectors, tmp_path):
    write_embeddings(table(vectors), tmp_path / "e.parquet")
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="the query has 8"):
        search(np.ones(8), tmp_path / "e.parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        search(np.ones(16), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no such file"):
        search(np.ones(16), tmp_path / "y.parquet")
