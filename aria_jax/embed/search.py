"""The rows of an embeddings file nearest to a query, exact and streaming whatever its size, or by
an index beside it; and whether embeddings find what belongs together: reciprocal rank and hits of
exact cosine search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from aria_jax.embed.index import open_index, unit_rows
from aria_jax.embed.table import Rows, find_embeddings
from data_pipeline.errors import UserError

GROUPS = 32
"""Row groups of which random pairs are drawn."""


@dataclass(frozen=True)
class Hit:
    """A row near the query.

    Attributes:
        score: cosine similarity, at most 1.
        path, sha256, labels: as in the file.
    """

    score: float
    path: str
    sha256: str
    labels: dict[str, str]


class Searcher:
    """Searches one embeddings file or data set many times; see `search`."""

    def __init__(self, embeddings: str | Path, index: Literal["exact", "ivf"] | None = None):
        self._rows, self._name = _open(embeddings), embeddings
        self._ends = np.cumsum(self._rows.sizes)
        self._index = None
        if index is not None:
            self._index = open_index(index, find_embeddings(embeddings), self._rows)

    @property
    def about_index(self) -> str:
        """What the index is, and how good; "" without one."""
        return "" if self._index is None else self._index.about

    def __call__(self, query_E: np.ndarray, k: int = 10) -> list[Hit]:
        """The k nearest rows, best first.

        Raises:
            UserError: rows of another width.
        """
        query = np.asarray(query_E, np.float32)
        query = query / max(float(np.linalg.norm(query)), 1e-12)
        if self._index is None:
            rows, scores = nearest(query, self._blocks(len(query)), k)
        else:
            self._check_width(self._index.width, len(query))
            rows, scores = self._index.nearest(query, min(k, int(self._ends[-1])))
        return self._hits(rows, scores)

    def _blocks(self, width: int) -> Iterator[np.ndarray]:
        for block_NxE in self._rows.blocks():
            self._check_width(block_NxE.shape[1], width)
            yield block_NxE

    def _check_width(self, found: int, wanted: int) -> None:
        if found != wanted:
            raise UserError(f"{self._name}: rows of {found} numbers, the query has {wanted}")

    def _hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        """Reads only the row groups that hold a winner."""
        group_of = np.searchsorted(self._ends, rows, side="right")
        found: dict[int, dict] = {}
        for group in np.unique(group_of).tolist():
            table = self._rows.group(group, ["path", "sha256", "labels"])
            mine = rows[group_of == group]
            picked = table.take(mine - (self._ends[group] - self._rows.sizes[group])).to_pylist()
            found.update(zip(mine.tolist(), picked, strict=True))
        return [
            Hit(float(score), row["path"], row["sha256"], dict(row["labels"] or ()))
            for row, score in ((found[int(r)], s) for r, s in zip(rows, scores, strict=True))
        ]


def search(
    query_E: np.ndarray,
    embeddings: str | Path,
    k: int = 10,
    *,
    index: Literal["exact", "ivf"] | None = None,
) -> list[Hit]:
    """The k nearest rows by cosine similarity, best first; equal scores in the file's order.

    Memory: one block of rows. A million rows of 512 numbers are read and compared in seconds.

    Args:
        index: searches in EMB.index, made once, of which no row is decoded again. "exact" finds the
            same; "ivf" most of it, where there are too many rows to look at each.

    Raises:
        UserError: not embeddings of `aria-jax embed`, or of another width; "ivf" is wanted and
            faiss is not installed.
    """
    return Searcher(embeddings, index)(query_E, k)


def random_similarities(embeddings: str | Path, n: int = 10_000, seed: int = 0) -> np.ndarray:
    """Cosine similarities of `n` random pairs of rows, ascending, float32: the scale of a score.

    Rows are drawn from at most `GROUPS` row groups, so that a large file is not read whole. Empty
    where there are fewer than two rows.
    """
    rows, rng = _open(embeddings), np.random.default_rng(seed)
    groups = sorted(rng.permutation(len(rows.sizes))[:GROUPS].tolist())
    vectors = np.concatenate([rows.vectors(group) for group in groups])
    if len(vectors) < 2:
        return np.zeros(0, np.float32)
    one = rng.integers(0, len(vectors), n)
    other = (one + rng.integers(1, len(vectors), n)) % len(vectors)
    drawn, at = np.unique(np.stack([one, other]), return_inverse=True)
    x_NxE = unit_rows(vectors[drawn])
    first, second = at.reshape(2, -1)
    return np.sort(np.einsum("ne,ne->n", x_NxE[first], x_NxE[second]))


def _open(embeddings: str | Path) -> Rows:
    """The rows, whose columns are checked."""
    import pyarrow as pa

    try:
        rows = Rows(find_embeddings(embeddings))
    except pa.ArrowInvalid as error:
        raise UserError(f"{embeddings}: not a Parquet file ({error})") from None
    if missing := {"embedding", "path", "sha256", "labels"} - set(rows.schema.names):
        raise UserError(
            f"{embeddings}: not made by `aria-jax embed` (no column {', '.join(sorted(missing))})"
        )
    return rows


def nearest(
    query_E: np.ndarray, blocks: Iterator[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and cosine similarities of the k rows nearest to a unit vector, best first."""
    best_rows, best = np.zeros(0, np.int64), np.zeros(0, np.float32)
    offset = 0
    for block_NxE in blocks:
        norms = np.sqrt(np.einsum("ne,ne->n", block_NxE, block_NxE))
        scores = (block_NxE @ query_E) / np.maximum(norms, 1e-12)
        rows = np.concatenate([best_rows, offset + np.arange(len(block_NxE))])
        scores = np.concatenate([best, scores])
        if len(scores) > k:
            least = np.partition(scores, -k)[-k]
            near = np.flatnonzero(scores >= least)
            rows, scores = rows[near], scores[near]
        order = np.lexsort((rows, -scores))[:k]
        best_rows, best = rows[order], scores[order]
        offset += len(block_NxE)
    return best_rows, best


CHUNK = 1024
"""Queries compared at a time."""


@dataclass(frozen=True)
class RetrievalResult:
    """How early the first relevant row comes.

    Attributes:
        mrr: mean of one over its rank.
        hits: share of queries with a relevant row among the first k, by k.
        median_rank: of the first relevant row.
        chance_mrr: `mrr` of a random order.
        n_queries, n_candidates: queries that have a relevant row, and rows they search.
        n_without: queries without any relevant row, left out.
    """

    mrr: float
    hits: dict[int, float]
    median_rank: float
    chance_mrr: float
    n_queries: int
    n_candidates: int
    n_without: int


def retrieval(
    queries_QxE: np.ndarray,
    keys: Sequence[str | None],
    *,
    candidates_NxE: np.ndarray | None = None,
    candidate_keys: Sequence[str | None] | None = None,
    apart: Sequence[str] | None = None,
    candidate_apart: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalResult:
    """Ranks candidates for each query; those of the query's key are right.

    Equally similar rows of other keys count as found before the relevant one, so that a collapsed
    embedding scores nothing.

    Args:
        keys: what belongs together, of each query; None leaves the query out.
        candidates_NxE, candidate_keys: where to search; without, among the queries themselves,
            each but itself.
        apart: candidates with the same `apart` as the query are neither right nor wrong (slices
            of the same file, when other performances are wanted).

    Raises:
        UserError: no query has a relevant row.
    """
    one_set = candidates_NxE is None
    queries = unit_rows(queries_QxE)
    candidates = queries if candidates_NxE is None else unit_rows(candidates_NxE)
    key_q, key_n = _codes(keys, keys if one_set else candidate_keys or ())
    apart_q = apart_n = None
    if apart is not None:
        apart_q, apart_n = _codes(apart, apart if one_set else candidate_apart or ())
    ranks, chances, n_without = [], [], 0
    for start in range(0, len(queries), CHUNK):
        at = slice(start, start + CHUNK)
        similarity = queries[at] @ candidates.T
        right = (key_q[at, None] == key_n) & (key_q[at, None] >= 0)
        skipped = np.zeros_like(right)
        if apart_q is not None and apart_n is not None:
            skipped |= apart_q[at, None] == apart_n
        if one_set:
            rows = np.arange(len(similarity))
            skipped[rows, start + rows] = True
        right &= ~skipped
        wrong = ~right & ~skipped
        asked = right.any(1)
        best = np.where(right, similarity, -np.inf).max(1)
        before = (wrong & (similarity >= best[:, None])).sum(1)
        ranks.append(1 + before[asked])
        chances.append(_chance(right.sum(1)[asked], wrong.sum(1)[asked]))
        n_without += int((~asked).sum())
    rank = np.concatenate(ranks)
    if not len(rank):
        raise UserError("no query has a relevant row: every key occurs once only, or is unknown")
    return RetrievalResult(
        mrr=float((1 / rank).mean()),
        hits={k: float((rank <= k).mean()) for k in ks},
        median_rank=float(np.median(rank)),
        chance_mrr=float(np.concatenate(chances).mean()),
        n_queries=len(rank),
        n_candidates=len(candidates),
        n_without=n_without,
    )


def _chance(n_right: np.ndarray, n_wrong: np.ndarray) -> np.ndarray:
    """Expected reciprocal rank of the first of r relevant among r + w rows in random order."""
    values = {}
    for r, w in set(zip(n_right.tolist(), n_wrong.tolist(), strict=True)):
        ranks = np.arange(1, w + 2)
        # P(rank > t) is the chance that the first t are all wrong.
        log_none = np.concatenate([[0], np.cumsum(np.log1p(-r / (r + w - np.arange(w))))])
        here = np.exp(log_none) * r / (r + w - (ranks - 1))
        values[r, w] = float((here / ranks).sum())
    return np.array([values[key] for key in zip(n_right.tolist(), n_wrong.tolist(), strict=True)])


def _codes(
    keys: Sequence[str | None], others: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Equal numbers for equal keys, over both; -1 for None."""
    known = sorted(key for key in {*keys, *others} if key is not None)
    number: dict[str | None, int] = {key: i for i, key in enumerate(known)}
    one, other = (np.array([number.get(key, -1) for key in side], int) for side in (keys, others))
    return one, other
