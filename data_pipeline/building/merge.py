"""Unit results to shards as planned: splits apart, shards balanced, always the same bytes."""

import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.artifact import publish
from data_pipeline.building.journal import read_unit, rejection
from data_pipeline.building.plan import MergeSettings, make_plan
from data_pipeline.shards import (
    REJECTED,
    IndexWriter,
    ShardWriter,
    index_name,
    shard_name,
    write_index,
)

_MADE_BY_MERGE = re.compile(r"[a-z]+-\d{5}-of-\d{5}\.arrayrecord|[a-z]+-index\.npz")
_META = ("path", "sha256", "duration_ms", "n_notes", "labels", "repaired")


def merge(
    units: Sequence[Path], work: Path, out_dir: Path, settings: MergeSettings
) -> dict[str, Any]:
    """Writes shards, indexes and rejected.jsonl of finished units to `out_dir`.

    Returns the manifest's counts ("splits", "rejected", the totals) and warnings. May be repeated
    after a kill: everything is made in `work` first.
    """
    plan = make_plan(units, settings)
    work.mkdir(exist_ok=True)
    writers = {
        split: _SplitWriter(split, plan.n_shards(split, settings.shards), work)
        for split in plan.splits
    }
    rejected: Counter[str] = Counter()
    piece = -1
    with (work / REJECTED).open("w", encoding="utf-8") as rejects:
        for unit in units:
            for summary, ids in read_unit(unit):
                if "n_tokens" in summary:
                    piece += 1
                    dropped = plan.dropped(piece, summary["labels"])
                    if dropped is None:
                        writer = writers[plan.split(piece)]
                        writer.write(np.frombuffer(ids, dtype="<u2"), summary)
                        continue
                    summary = rejection(summary["path"], "dedup", *dropped)
                rejected[f"{summary['stage']}/{summary['reason']}"] += 1
                rejects.write(json.dumps(summary, ensure_ascii=False) + "\n")
        rejects.flush()
        os.fsync(rejects.fileno())
    splits = {split: writer.close() for split, writer in writers.items()}
    for path in out_dir.iterdir():  # of a corpus that this one replaces
        if _MADE_BY_MERGE.fullmatch(path.name):
            path.unlink()
    for path in sorted(work.iterdir()):
        publish(path, out_dir / path.name)
    return {
        "n_accepted": sum(split["n_pieces"] for split in splits.values()),
        "n_rejected": rejected.total(),
        "n_repaired": sum(split["n_repaired"] for split in splits.values()),
        "n_tokens": sum(split["n_tokens"] for split in splits.values()),
        "n_notes": sum(split["n_notes"] for split in splits.values()),
        "hours": sum(split["duration_ms"] for split in splits.values()) / 3.6e6,
        "splits": splits,
        "published_split": plan.published,
        "warnings": plan.warnings,
        "rejected": dict(sorted(rejected.items())),
    }


class _SplitWriter:
    """The shards of one split; each piece goes to the shard with the fewest tokens so far."""

    def __init__(self, split: str, n_shards: int, work: Path):
        self._path = work / index_name(split)
        self._shards = [ShardWriter(work / shard_name(split, i, n_shards)) for i in range(n_shards)]
        self._indexes = [IndexWriter() for _ in self._shards]
        self._load = [(0, i) for i in range(n_shards)]
        self._n_notes = self._duration_ms = self._n_repaired = 0

    def write(self, ids: np.ndarray, summary: dict[str, Any]) -> None:
        load, shard = heapq.heappop(self._load)
        heapq.heappush(self._load, (load + len(ids), shard))
        meta = {key: summary[key] for key in _META if key in summary}
        self._shards[shard].write(ids, meta)
        self._indexes[shard].add(len(ids), meta["n_notes"], meta["duration_ms"], meta["labels"])
        self._n_notes += meta["n_notes"]
        self._duration_ms += meta["duration_ms"]
        self._n_repaired += "repaired" in meta

    def close(self) -> dict[str, Any]:
        shards = [shard.close() for shard in self._shards]
        write_index(self._path, self._indexes)
        return {
            "n_pieces": sum(shard["n_pieces"] for shard in shards),
            "n_tokens": sum(shard["n_tokens"] for shard in shards),
            "n_notes": self._n_notes,
            "duration_ms": self._duration_ms,
            "n_repaired": self._n_repaired,
            "shards": shards,
        }
