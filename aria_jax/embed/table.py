"""Embeddings on disk: one Parquet row per file, readable by anything that reads Parquet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Embeddings:
    """Rows of an embeddings file.

    Attributes:
        path, sha256: of each file.
        embedding: float32 [N, E].
        n_slices, n_notes, duration_ms: int64 [N].
        labels: what is known of each file, e.g. {"composer": "bach", "split": "val"}.
        fingerprint: of the model that made them.
    """

    path: Sequence[str]
    sha256: Sequence[str]
    embedding: np.ndarray
    n_slices: np.ndarray
    n_notes: np.ndarray
    duration_ms: np.ndarray
    labels: Sequence[dict[str, str]]
    fingerprint: str

    def column(self, label: str) -> list[str | None]:
        """One label of every file, None where it is unknown."""
        return [row.get(label) for row in self.labels]


def write_embeddings(table: Embeddings, out: str | Path) -> None:
    """Writes the file whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = table.embedding.shape[1]
    flat = pa.array(np.ascontiguousarray(table.embedding, np.float32).reshape(-1))
    columns = {
        "path": pa.array(table.path, pa.string()),
        "sha256": pa.array(table.sha256, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
        "n_slices": pa.array(table.n_slices, pa.int32()),
        "n_notes": pa.array(table.n_notes, pa.int32()),
        "duration_ms": pa.array(table.duration_ms, pa.int64()),
        "labels": pa.array(
            [list(r.items()) for r in table.labels], pa.map_(pa.string(), pa.string())
        ),
    }
    content = pa.table(columns).replace_schema_metadata({"model_fingerprint": table.fingerprint})
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    pq.write_table(content, partial)
    partial.replace(out)


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads what `write_embeddings` wrote.

    Raises:
        UserError: no such file, not Parquet, or columns missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make it with `aria-jax embed`")
    try:
        content = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from None
    needed = ("path", "sha256", "embedding", "n_slices", "n_notes", "duration_ms", "labels")
    if missing := [name for name in needed if name not in content.column_names]:
        raise UserError(f"{path}: not made by `aria-jax embed` (no column {', '.join(missing)})")
    metadata = content.schema.metadata or {}
    return Embeddings(
        path=content["path"].to_pylist(),
        sha256=content["sha256"].to_pylist(),
        embedding=np.stack(content["embedding"].to_numpy()).astype(np.float32),
        n_slices=content["n_slices"].to_numpy(),
        n_notes=content["n_notes"].to_numpy(),
        duration_ms=content["duration_ms"].to_numpy(),
        labels=[dict(row or ()) for row in content["labels"].to_pylist()],
        fingerprint=metadata.get(b"model_fingerprint", b"").decode(),
    )
