"""Unit results to shards: duplicates out, splits apart, shards balanced, always the same bytes."""

import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.building.journal import publish, read_summaries, read_unit, rejection
from data_pipeline.shards import (
    REJECTED,
    SPLITS,
    IndexWriter,
    ShardWriter,
    index_name,
    shard_name,
    write_index,
)

TOKENS_PER_SHARD = 64 << 20


@dataclass(frozen=True)
class MergeSettings:
    """How accepted pieces become a corpus.

    Attributes:
        val_fraction: share of the compositions that is kept for validation.
        dedup: "exact" (one piece for each content) or "none".
        max_per_composition: most pieces of one composition; None for no limit.
        shards: shards of the train split; None: one for each TOKENS_PER_SHARD tokens.
    """

    val_fraction: float
    dedup: str
    max_per_composition: int | None
    shards: int | None


@dataclass
class _Plan:
    """What becomes of every accepted piece, numbered in the order of the units.

    Attributes:
        dropped: (reason, value) of the pieces that are not kept.
        composition: of each piece.
        in_val: of each composition.
        n_pieces, n_tokens: of each composition, kept pieces only.
    """

    dropped: dict[int, tuple[str, str]] = field(default_factory=dict)
    composition: list[int] = field(default_factory=list)
    in_val: list[bool] = field(default_factory=list)
    n_pieces: Counter[int] = field(default_factory=Counter)
    n_tokens: Counter[int] = field(default_factory=Counter)

    def split(self, composition: int) -> str:
        """Where a composition goes."""
        return SPLITS[self.in_val[composition]]


def merge(
    units: Sequence[Path], work: Path, out_dir: Path, settings: MergeSettings
) -> dict[str, Any]:
    """Writes shards, indexes and rejected.jsonl of finished units to `out_dir`.

    Returns the manifest's counts: "splits", "rejected" and the totals. May be repeated after a
    kill: everything is made in `work` first.
    """
    plan = _plan(units, settings)
    work.mkdir(exist_ok=True)
    writers = _open_shards(plan, work, settings)
    rejected: Counter[str] = Counter()
    piece = 0
    with (work / REJECTED).open("w", encoding="utf-8") as rejects:
        for unit in units:
            for summary, ids in read_unit(unit):
                if "n_tokens" in summary:
                    dropped = plan.dropped.get(piece)
                    if dropped is None:
                        split = plan.split(plan.composition[piece])
                        writers[split].write(np.frombuffer(ids, dtype="<u2"), summary)
                        piece += 1
                        continue
                    summary = rejection(summary["path"], "dedup", *dropped)
                    piece += 1
                rejected[f"{summary['stage']}/{summary['reason']}"] += 1
                rejects.write(json.dumps(summary, ensure_ascii=False) + "\n")
        rejects.flush()
        os.fsync(rejects.fileno())
    splits = {split: writer.close() for split, writer in writers.items()}
    for path in sorted(work.iterdir()):
        publish(path, out_dir / path.name)
    return {
        "n_accepted": sum(split["n_pieces"] for split in splits.values()),
        "n_rejected": rejected.total(),
        "n_tokens": sum(split["n_tokens"] for split in splits.values()),
        "n_notes": sum(split["n_notes"] for split in splits.values()),
        "hours": sum(split["duration_ms"] for split in splits.values()) / 3.6e6,
        "splits": splits,
        "rejected": dict(sorted(rejected.items())),
    }


def _plan(units: Sequence[Path], settings: MergeSettings) -> _Plan:
    """Reads summaries only. Of equal pieces the first by path stays."""
    seen: dict[str, str] = {}
    names: dict[str, int] = {}
    plan = _Plan()
    for unit in units:
        for summary in read_summaries(unit):
            if "n_tokens" not in summary:
                continue
            piece = len(plan.composition)
            # Pieces without a label can only share a composition with copies of themselves.
            name = "label:" + summary["labels"].get("composition", "")
            if name == "label:":
                name = "content:" + summary["content"]
            composition = names.setdefault(name, len(names))
            plan.composition.append(composition)
            if settings.dedup == "exact" and summary["content"] in seen:
                plan.dropped[piece] = ("exact-duplicate", seen[summary["content"]])
            elif plan.n_pieces[composition] == settings.max_per_composition:
                plan.dropped[piece] = ("composition-cap", name.partition(":")[2])
            else:
                plan.n_pieces[composition] += 1
                plan.n_tokens[composition] += summary["n_tokens"]
                seen[summary["content"]] = summary["path"]
    plan.in_val = split_compositions(list(names), settings.val_fraction)
    return plan


def split_compositions(names: Sequence[str], val_fraction: float) -> list[bool]:
    """Whether each composition is in the validation split: by the hash of its name alone.

    So adding music moves nothing between the splits. Where chance leaves a split empty, the one
    composition nearest to the threshold moves.
    """
    if not names or val_fraction <= 0:
        return [False] * len(names)
    hashes = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    place = [int.from_bytes(value, "big") / 2**64 for value in hashes]
    in_val = [value < val_fraction for value in place]
    if len(names) > 1 and not any(in_val):
        in_val[place.index(min(place))] = True
    if len(names) > 1 and all(in_val):
        in_val[place.index(max(place))] = False
    return in_val


class _SplitWriter:
    """The shards of one split; each piece goes to the shard with the fewest tokens so far."""

    def __init__(self, split: str, n_shards: int, work: Path):
        self._path = work / index_name(split)
        self._shards = [ShardWriter(work / shard_name(split, i, n_shards)) for i in range(n_shards)]
        self._indexes = [IndexWriter() for _ in self._shards]
        self._load = [(0, i) for i in range(n_shards)]
        self._n_notes = self._duration_ms = 0

    def write(self, ids: np.ndarray, summary: dict[str, Any]) -> None:
        load, shard = heapq.heappop(self._load)
        heapq.heappush(self._load, (load + len(ids), shard))
        meta = {key: summary[key] for key in ("path", "sha256", "duration_ms", "n_notes", "labels")}
        self._shards[shard].write(ids, meta)
        self._indexes[shard].add(len(ids), meta["n_notes"], meta["duration_ms"], meta["labels"])
        self._n_notes += meta["n_notes"]
        self._duration_ms += meta["duration_ms"]

    def close(self) -> dict[str, Any]:
        shards = [shard.close() for shard in self._shards]
        write_index(self._path, self._indexes)
        return {
            "n_pieces": sum(shard["n_pieces"] for shard in shards),
            "n_tokens": sum(shard["n_tokens"] for shard in shards),
            "n_notes": self._n_notes,
            "duration_ms": self._duration_ms,
            "shards": shards,
        }


def _open_shards(plan: _Plan, work: Path, settings: MergeSettings) -> dict[str, _SplitWriter]:
    """As many shards as asked for, but never one that would be empty (a split has at least one)."""
    writers = {}
    for split in SPLITS:
        members = [c for c in plan.n_pieces if plan.split(c) == split]
        n_pieces = sum(plan.n_pieces[c] for c in members)
        n_tokens = sum(plan.n_tokens[c] for c in members)
        wanted = settings.shards or -(-n_tokens // TOKENS_PER_SHARD)
        writers[split] = _SplitWriter(split, max(1, min(wanted, n_pieces)), work)
    return writers
