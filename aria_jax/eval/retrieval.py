"""Do embeddings find what belongs together? Reciprocal rank and hits of exact cosine search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError

CHUNK = 1024
"""Queries compared at a time."""


@dataclass(frozen=True)
class RetrievalResult:
    """How early the first right answer comes.

    Attributes:
        mrr: mean of one over its rank.
        hits: share of queries with a right answer among the first k, by k.
        median_rank: of the first right answer.
        chance_mrr: `mrr` of a random order.
        n_queries, n_candidates: queries that have a right answer, and rows they search.
        n_without: queries without any right answer, left out.
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

    Equally similar wrong answers count as found before the right one, so that a collapsed
    embedding scores nothing.

    Args:
        keys: what belongs together, of each query; None leaves the query out.
        candidates_NxE, candidate_keys: where to search; without, among the queries themselves,
            each but itself.
        apart: candidates with the same `apart` as the query are neither right nor wrong (slices
            of the same file, when other performances are wanted).

    Raises:
        UserError: no query has a right answer.
    """
    one_set = candidates_NxE is None
    queries = _unit(queries_QxE)
    candidates = queries if candidates_NxE is None else _unit(candidates_NxE)
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
        raise UserError("no query has a right answer: every key occurs once only, or is unknown")
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
    """Expected reciprocal rank of the first of r right among r + w answers in random order."""
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


def _unit(x_NxE: np.ndarray) -> np.ndarray:
    x_NxE = np.asarray(x_NxE, np.float32)
    return x_NxE / np.maximum(np.linalg.norm(x_NxE, axis=1, keepdims=True), 1e-12)
