"""Indexes beside an embeddings file, for many searches in it: EMB.index/.

    made.json     of which file, how many rows
    unit.npy      float32 [N, E], unit vectors            exact
    bytes.npy     int8 [N, E], the same in 256 steps      exact
    scales.npy    float32 [2, N], step and error of each  exact
    made-ivf.json, ivf.faiss                              ivf

"exact" looks at all rows as bytes, a quarter of what would have to be read, and then at those rows
as they are that can be among the nearest: the scalar product with a unit vector is wrong by no more
than the length of the row's error. So it misses none. Two files are mapped into memory, not read.

"ivf" is faiss's inverted file of float16 vectors (extra `search`): rows lie in lists around k-means
centroids, and only lists near the query are looked at, as many as find `RECALL` of the nearest of
rows that were drawn from the file; how many they find is measured when the index is made.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aria_jax.embed.table import SUMMARY, Rows
from data_pipeline import storage
from data_pipeline.artifact import atomic, write_atomically
from data_pipeline.errors import UserError

RECALL, RECALL_K, N_DRAWN = 0.95, 10, 100
"""Of how many nearest of how many rows an approximate index finds which share at least."""
ROUNDING = 1e-4
"""More than float32 sums of a few thousand products of unit vectors are wrong by."""
_BLOCK = 1024  # rows that are looked at together
_TRAINING_ROWS_PER_LIST = 64


class Index(Protocol):
    """What finds the nearest rows.

    Attributes:
        width: E.
        about: what it is, and how good.
    """

    width: int
    about: str

    def nearest(self, query_E: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and cosine similarities of the k rows nearest to a unit vector, best first."""


def open_index(kind: str, embeddings: Path, rows: Rows) -> Index:
    """The index of an embeddings file or data set, made first where there is none, or one of what
    lay there before.

    Args:
        kind: "exact" or "ivf".
        rows: of `embeddings`.

    Raises:
        UserError: faiss is wanted and not installed, or cannot open a file of such a name.
    """
    folder, note, stamp, made = _found(kind, embeddings)
    if kind == "ivf":
        _check_faiss(folder)
    if made is None:
        note.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        make = _make_exact if kind == "exact" else _make_ivf
        made = {"of": stamp, **make(folder, rows)}
        write_atomically(note, json.dumps(made))
    return _Exact(folder) if kind == "exact" else _Ivf(folder, made)


def has_index(kind: str, embeddings: Path) -> bool:
    """Whether `open_index` has nothing to make."""
    return _found(kind, embeddings)[-1] is not None


def _found(kind: str, embeddings: Path) -> tuple[Path, Path, dict[str, int], dict[str, Any] | None]:
    """The index's folder and note, what the note should be of, and what it says if it is that."""
    hidden = "." if storage.is_remote(embeddings) else ""  # what begins with a dot is never sent
    folder = embeddings.with_name(f"{hidden}{embeddings.name}.index")
    note = folder / ("made.json" if kind == "exact" else "made-ivf.json")
    of = (embeddings / SUMMARY if embeddings.is_dir() else embeddings).stat()
    stamp = {"bytes": of.st_size, "modified_ns": of.st_mtime_ns}
    try:
        made = json.loads(note.read_text())
    except (OSError, ValueError):
        made = {}
    return folder, note, stamp, made if made.get("of") == stamp else None


# --- exact ---------------------------------------------------------------------------------------


def _make_exact(folder: Path, rows: Rows) -> dict[str, Any]:
    n_rows, width = sum(rows.sizes), rows.vectors(0).shape[1]
    with ExitStack() as files:

        def new(name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
            partial = files.enter_context(atomic(folder / f"{name}.npy"))
            return np.lib.format.open_memmap(partial, "w+", dtype, shape)

        unit_NxE = new("unit", np.float32, (n_rows, width))
        bytes_NxE = new("bytes", np.int8, (n_rows, width))
        scales_2xN = new("scales", np.float32, (2, n_rows))
        at = 0
        for block_NxE in rows.blocks():
            own = slice(at, at := at + len(block_NxE))
            unit_NxE[own] = unit_rows(block_NxE)
            bytes_NxE[own], scales_2xN[:, own] = _as_bytes(unit_NxE[own])
        for made in (unit_NxE, bytes_NxE, scales_2xN):
            made.flush()
    return {"n_rows": n_rows, "width": width}


def _as_bytes(unit_NxE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [N, E], and float32 [2, N]: step, and length of the error."""
    steps = np.maximum(np.abs(unit_NxE).max(1), 1e-12) / 127
    bytes_NxE = np.rint(unit_NxE / steps[:, None]).astype(np.int8)
    errors = np.linalg.norm(unit_NxE - bytes_NxE * steps[:, None], axis=1)
    return bytes_NxE, np.stack([steps, errors]).astype(np.float32)


class _Exact:
    def __init__(self, folder: Path):
        self._unit_NxE = np.load(folder / "unit.npy", mmap_mode="r")
        self._bytes_NxE = np.load(folder / "bytes.npy", mmap_mode="r")
        self._steps_N, errors_N = np.load(folder / "scales.npy")
        self._errors_N = errors_N + np.float32(ROUNDING)
        n_rows, self.width = self._unit_NxE.shape
        self.about = f"exact, {n_rows:,} rows"
        self._blocks = np.arange(0, n_rows, _BLOCK)
        self._block_errors = np.maximum.reduceat(self._errors_N, self._blocks)
        n_cpus = len(os.sched_getaffinity(0))
        self._pool, self._shares = ThreadPoolExecutor(n_cpus), n_rows * np.arange(n_cpus + 1)
        self._shares //= n_cpus

    def nearest(self, query_E: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index`."""
        rows = self._candidates(query_E, k)
        scores = self._unit_NxE[rows] @ query_E
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]

    def _candidates(self, query_E: np.ndarray, k: int) -> np.ndarray:
        """Every row that can be one of the k nearest, and a few more, ascending."""
        from data_pipeline._kernels import byte_products

        least_N = np.empty(len(self._bytes_NxE), np.float32)  # what each row scores at least

        def score(own: slice) -> None:
            byte_products(self._bytes_NxE[own], self._steps_N[own], query_E, least_N[own])
            least_N[own] -= self._errors_N[own]

        list(self._pool.map(score, map(slice, self._shares[:-1], self._shares[1:])))
        best = np.maximum.reduceat(least_N, self._blocks)
        surely = best if len(best) >= k else least_N
        bar = np.partition(surely, -k)[-k]
        blocks = self._blocks[best + 2 * self._block_errors >= bar]
        rows = (blocks[:, None] + np.arange(_BLOCK)).ravel()
        rows = rows[rows < len(least_N)]
        return rows[least_N[rows] + 2 * self._errors_N[rows] >= bar]


# --- approximate ---------------------------------------------------------------------------------


def _make_ivf(folder: Path, rows: Rows) -> dict[str, Any]:
    import faiss

    n_rows, width = sum(rows.sizes), rows.vectors(0).shape[1]
    n_lists = 1 << int(np.log2(max(4 * np.sqrt(n_rows), 1)))
    n_lists = max(min(n_lists, n_rows // _TRAINING_ROWS_PER_LIST), 1)
    rng = np.random.default_rng(0)
    n_training = min(n_rows, n_lists * _TRAINING_ROWS_PER_LIST)
    training = _take(rows.blocks(), np.sort(rng.choice(n_rows, n_training, replace=False)))
    index: Any = faiss.index_factory(width, f"IVF{n_lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(training)
    for block_NxE in rows.blocks():
        index.add(unit_rows(block_NxE))
    queries = training[rng.choice(n_training, min(N_DRAWN, n_training), replace=False)]
    k = min(RECALL_K, n_rows)
    right = _nearest_of_many(queries, rows.blocks(), k)
    index.nprobe = 1
    while (found := recall(index.search(queries, k)[1], right)) < RECALL and index.nprobe < n_lists:
        index.nprobe = min(2 * index.nprobe, n_lists)
    with atomic(folder / "ivf.faiss") as partial:
        faiss.write_index(index, str(partial))
    made = {"n_lists": n_lists, "n_probed": index.nprobe, "recall": found, "k": k}
    return {"n_rows": n_rows, "width": width, **made, "n_drawn": len(queries)}


class _Ivf:
    def __init__(self, folder: Path, made: dict[str, Any]):
        import faiss

        path = str(folder / "ivf.faiss")
        self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        self.width = made["width"]
        self.about = (
            f"ivf, {made['n_rows']:,} rows in {made['n_lists']:,} lists, {made['n_probed']:,} of "
            f"them looked at; finds {made['recall']:.1%} of the {made['k']} nearest of "
            f"{made['n_drawn']} rows drawn from the file"
        )

    def nearest(self, query_E: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index`; fewer than k where the lists that are looked at hold fewer."""
        scores, rows = (found[0] for found in self._index.search(query_E[None], k))
        scores, rows = scores[rows >= 0], rows[rows >= 0]
        order = np.lexsort((rows, -scores))
        return rows[order], scores[order]


def recall(found_QxK: np.ndarray, right_QxK: np.ndarray) -> float:
    """Share of the right rows that are among those found."""
    same = [np.isin(right, found).mean() for found, right in zip(found_QxK, right_QxK, strict=True)]
    return float(np.mean(same))


def _nearest_of_many(queries_QxE: np.ndarray, blocks: Iterator[np.ndarray], k: int) -> np.ndarray:
    """Numbers of the k nearest rows of each query, [Q, k]."""
    rows = np.zeros((len(queries_QxE), 0), np.int64)
    best, at = np.zeros(rows.shape, np.float32), 0
    for block_NxE in blocks:
        scores = np.hstack([best, queries_QxE @ unit_rows(block_NxE).T])
        numbers = np.arange(at, at := at + len(block_NxE))
        rows = np.hstack([rows, np.broadcast_to(numbers, (len(rows), len(numbers)))])
        keep = np.argpartition(-scores, min(k, scores.shape[1]) - 1)[:, :k]
        best, rows = np.take_along_axis(scores, keep, 1), np.take_along_axis(rows, keep, 1)
    return rows


def _take(blocks: Iterator[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Unit vectors of rows, in ascending order."""
    found, at = [], 0
    for block_NxE in blocks:
        mine = rows[(rows >= at) & (rows < at + len(block_NxE))] - at
        found.append(unit_rows(block_NxE[mine]))
        at += len(block_NxE)
    return np.concatenate(found)


def unit_rows(x_NxE: np.ndarray) -> np.ndarray:
    """float32 [N, E], each row of length 1, or 0 where it is that."""
    x_NxE = np.asarray(x_NxE, np.float32)
    return x_NxE / np.maximum(np.linalg.norm(x_NxE, axis=1, keepdims=True), 1e-12)


def _check_faiss(folder: Path) -> None:
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise UserError(
            "--index ivf needs faiss: pip install 'aria-jax[search]', or use --index exact"
        ) from None
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{folder}: faiss opens only names that are UTF-8; use --index exact"
        ) from None
