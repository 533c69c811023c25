"""A vector index beside an embeddings file, for many searches in one large file: extra `search`.

The index is flat: exact, the unit vectors themselves, mapped into memory instead of decoded. It
lies in EMB.faiss and is made again where EMB is newer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.artifact import atomic
from data_pipeline.errors import UserError


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
        UserError: faiss is not installed.
    """
    faiss = _faiss()
    path = index_path(embeddings)
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
