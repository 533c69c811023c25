"""The rows of an embeddings file nearest to a query (exact, streaming, whatever its size), and
whether embeddings find what belongs together: reciprocal rank and hits of exact cosine search.

For many searches in one large file a vector index lies beside it (extra `search`). It is flat:
exact, the unit vectors themselves, mapped into memory instead of decoded. It is EMB.faiss, and is
made again where EMB is newer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aria_jax.embed.table import open_parquet
from data_pipeline.artifact import atomic
from data_pipeline.errors import UserError, check_file

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS = 65_536
"""Rows compared at a time: 128 MiB at 512 numbers each."""
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


def search(
    query_E: np.ndarray, embeddings: str | Path, k: int = 10, *, index: bool = False
) -> list[Hit]:
    """The k nearest rows by cosine similarity, best first; equal scores in the file's order.

    Memory: one block of rows. A million rows of 512 numbers are read and compared in seconds.

    Args:
        index: search in EMB.faiss, made once: no row is decoded again.

    Raises:
        UserError: not an embeddings file of `aria-jax embed`, or of another width; an index is
            wanted and faiss is not installed.
    """
    file = _open(embeddings)
    query = np.asarray(query_E, np.float32)
    query = query / max(float(np.linalg.norm(query)), 1e-12)
    blocks = partial(_blocks, file, len(query), embeddings)
    if index:
        made = current_index(Path(embeddings), file.metadata.num_rows, len(query), blocks)
        rows, scores = nearest_in(made, query, k)
    else:
        rows, scores = nearest(query, blocks(), k)
    return _hits(file, rows, scores)


def random_similarities(embeddings: str | Path, n: int = 10_000, seed: int = 0) -> np.ndarray:
    """Cosine similarities of `n` random pairs of rows, ascending, float32: the scale of a score.

    Rows are drawn from at most `GROUPS` row groups, so that a large file is not read whole. Empty
    where there are fewer than two rows.
    """
    file, rng = _open(embeddings), np.random.default_rng(seed)
    groups = rng.permutation(file.num_row_groups)[:GROUPS].tolist()
    column = file.read_row_groups(sorted(groups), columns=["embedding"]).column(0).combine_chunks()
    if len(column) < 2:
        return np.zeros(0, np.float32)
    one = rng.integers(0, len(column), n)
    other = (one + rng.integers(1, len(column), n)) % len(column)
    rows, at = np.unique(np.stack([one, other]), return_inverse=True)
    x_NxE = np.stack(column.take(rows).to_numpy(zero_copy_only=False)).astype(np.float32)
    x_NxE /= np.maximum(np.linalg.norm(x_NxE, axis=1, keepdims=True), 1e-12)
    first, second = at.reshape(2, -1)
    return np.sort(np.einsum("ne,ne->n", x_NxE[first], x_NxE[second]))


def _open(embeddings: str | Path) -> "ParquetFile":
    """The Parquet file, whose columns are checked."""
    import pyarrow as pa

    check_file(embeddings, "an embeddings file of `aria-jax embed`")
    try:
        file = open_parquet(embeddings)
    except pa.ArrowInvalid as error:
        raise UserError(f"{embeddings}: not a Parquet file ({error})") from None
    if missing := {"embedding", "path", "sha256", "labels"} - set(file.schema_arrow.names):
        raise UserError(
            f"{embeddings}: not made by `aria-jax embed` (no column {', '.join(sorted(missing))})"
        )
    return file


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


def _blocks(file: "ParquetFile", width: int, name: str | Path) -> Iterator[np.ndarray]:
    for batch in file.iter_batches(ROWS, columns=["embedding"]):
        column = batch.column(0)
        found = getattr(column.type, "list_size", None)
        if found != width:
            raise UserError(f"{name}: rows of {found} numbers, the query has {width}")
        yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _hits(file: "ParquetFile", rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
    """Reads only the row groups that hold a winner."""
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    group_of = np.searchsorted(ends, rows, side="right")
    found: dict[int, dict] = {}
    for group in np.unique(group_of):
        table = file.read_row_group(int(group), columns=["path", "sha256", "labels"])
        mine = rows[group_of == group]
        picked = table.take(mine - (ends[group] - sizes[group])).to_pylist()
        found.update(zip(mine.tolist(), picked, strict=True))
    return [
        Hit(float(score), row["path"], row["sha256"], dict(row["labels"] or ()))
        for row, score in ((found[int(r)], s) for r, s in zip(rows, scores, strict=True))
    ]


def index_path(embeddings: Path) -> Path:
    """Where the index of an embeddings file lies."""
    return embeddings.with_name(embeddings.name + ".faiss")


def current_index(
    embeddings: Path, n_rows: int, width: int, blocks: Callable[[], Iterator[np.ndarray]]
) -> Any:
    """The index of `embeddings`, made first where there is none or an older one.

    Args:
        blocks: yields all rows, float32 [n, width] at a time.

    Raises:
        UserError: faiss is not installed, or cannot open a file of such a name.
    """
    faiss = _faiss()
    path = index_path(embeddings)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{embeddings}: faiss opens only names that are UTF-8; search without --index"
        ) from None
    if path.is_file() and path.stat().st_mtime_ns >= embeddings.stat().st_mtime_ns:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        if (index.ntotal, index.d) == (n_rows, width):
            return index
    index = faiss.IndexFlatIP(width)
    for block_NxE in blocks():
        norms = np.linalg.norm(block_NxE, axis=1, keepdims=True)
        index.add(np.ascontiguousarray(block_NxE / np.maximum(norms, 1e-12), np.float32))
    with atomic(path) as partial:
        faiss.write_index(index, str(partial))
    return index


def nearest_in(index: Any, query_E: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and cosine similarities of the k rows nearest to a unit vector, best first."""
    scores, rows = index.search(np.asarray(query_E, np.float32)[None], min(k, index.ntotal))
    order = np.lexsort((rows[0], -scores[0]))
    return rows[0][order], scores[0][order]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError(
            "an index needs faiss: pip install 'aria-jax[search]', or search without --index"
        ) from None
    return faiss


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


def _unit(x_NxE: np.ndarray) -> np.ndarray:
    x_NxE = np.asarray(x_NxE, np.float32)
    return x_NxE / np.maximum(np.linalg.norm(x_NxE, axis=1, keepdims=True), 1e-12)
