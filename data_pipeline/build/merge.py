"""Finished units to shards: which pieces are kept, the split of each, and always the same bytes.

All is decided from summaries alone, in arrays: 40 bytes a piece, and 384 more where
near-duplicates are looked for. Nothing depends on how the files were divided into units.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import dedup, storage
from data_pipeline.artifact import publish, synced
from data_pipeline.build.journal import read_summaries, read_unit, rejection
from data_pipeline.shards import (
    FILES, MANIFEST, REJECTED, SPLITS, SplitWriter, index_name, load_manifest,
)  # fmt: skip

_MADE_BY_MERGE = re.compile(r"[a-z]+-\d{5}-of-\d{5}\.arrayrecord|[a-z]+-index\.npz")
DEDUP = ("exact", "near", "none")
TOKENS_PER_SHARD = 64 << 20
_KEPT, _EXACT, _NEAR, _CAPPED, _EXCLUDED = range(5)
_REASONS = {_EXACT: "exact-duplicate", _NEAR: "near-duplicate", _CAPPED: "composition-cap",
            _EXCLUDED: "excluded"}  # fmt: skip
_NO_GROUP = -1
_SAID = {name: i for i, name in enumerate(SPLITS)}
_VAL, _TEST, _UNSAID = _SAID["val"], _SAID["test"], -1
_CONTENT_BYTES = 16  # of the hash's 32: two of a billion pieces share them once in 10^21 corpora


@dataclass(frozen=True)
class MergeSettings:
    """How accepted pieces become a corpus.

    Attributes:
        val_fraction: share of the compositions that is kept for validation.
        dedup: "exact" (one piece for each content), "near" (one for each performance, however it
            was transposed, stretched, trimmed or exported) or "none".
        max_per_composition: most pieces of one composition; None for no limit.
        shards: shards of the train split; None: one for each TOKENS_PER_SHARD tokens.
        split_column: where the label "split" comes from, which is then honoured wherever a piece
            has one; None: it is honoured if every piece has one; "none": it is not.
    """

    val_fraction: float
    dedup: str
    max_per_composition: int | None
    shards: int | None
    split_column: str | None = None


@dataclass(frozen=True)
class Excluded:
    """Finished units of files that are only compared with: what is like one of them is left out.

    Attributes:
        units: their results.
        names: the source of each unit, as rejected.jsonl names it.
    """

    units: Sequence[Path] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class MergePlan:
    """What is decided of pieces 0..N-1, numbered in the order of the units.

    Attributes:
        split_of: of each piece its number in SPLITS, int8 [N].
        published: whether the split of the metadata was followed.
        warnings: what was not done about it.
        n_pieces, n_tokens: of the kept pieces of each split.
    """

    split_of: np.ndarray
    published: bool
    warnings: list[str]
    n_pieces: dict[str, int]
    n_tokens: dict[str, int]
    _decision: np.ndarray
    _duplicate_of: dict[int, str]

    def split(self, piece: int) -> str:
        """Where a piece goes."""
        return SPLITS[int(self.split_of[piece])]

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that are written: without published test pieces there is no test split."""
        return tuple(name for name in SPLITS if name != "test" or self.n_pieces[name])

    def dropped(self, piece: int, labels: dict[str, str]) -> tuple[str, str] | None:
        """Reason and value for rejected.jsonl; None for a piece that is kept."""
        decision = int(self._decision[piece])
        if decision == _KEPT:
            return None
        value = labels["composition"] if decision == _CAPPED else self._duplicate_of[piece]
        return _REASONS[decision], value

    def n_shards(self, split: str, wanted: int | None) -> int:
        """As many as asked for, or by size; at least one, and none that would be empty."""
        wanted = wanted or -(-self.n_tokens[split] // TOKENS_PER_SHARD)
        return max(1, min(wanted, self.n_pieces[split]))


def plan_merge(
    units: Sequence[Path], settings: MergeSettings, excluded: Excluded | None = None
) -> MergePlan:
    """Reads the units' summaries and decides."""
    pieces = _read(units, with_fingerprints=settings.dedup == "near")
    decision, representative = _without_duplicates(pieces, settings.dedup)
    like = {} if excluded is None else _like_excluded(pieces, excluded, settings.dedup)
    decision[list(like)] = _EXCLUDED
    if settings.max_per_composition is not None:
        kept = np.flatnonzero(decision == _KEPT)
        groups = np.where(
            pieces.labelled, np.unique(pieces.work, return_inverse=True)[1], _NO_GROUP
        )
        keep = dedup.cap_per_group(
            groups[kept], pieces.content[kept], settings.max_per_composition
        )
        decision[kept[~keep]] = _CAPPED
    kept = decision == _KEPT
    split_of, published = _split_of_each(pieces, kept, representative, settings)
    here = {split: kept & (split_of == i) for i, split in enumerate(SPLITS)}
    return MergePlan(
        split_of=split_of,
        published=published,
        warnings=_warnings(pieces, published, settings),
        n_pieces={split: int(mask.sum()) for split, mask in here.items()},
        n_tokens={split: int(pieces.n_tokens[mask].sum()) for split, mask in here.items()},
        _decision=decision,
        _duplicate_of={**_paths_of(units, decision, representative), **like},
    )


def composition_key(name: str) -> int:
    """64 bits that stand for a composition and place it in the split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def in_validation(works: np.ndarray, kept: np.ndarray, val_fraction: float) -> np.ndarray:
    """Which pieces are for validation: by the key of their composition alone.

    So adding music moves nothing between the splits. Where chance leaves a split without a kept
    piece, the one composition nearest to the threshold moves.

    Args:
        works: `composition_key` of each piece, uint64 [N].
        kept: bool [N].
        val_fraction: share of the compositions.

    Returns:
        bool [N].
    """
    there = np.unique(works[kept])
    if not len(there) or val_fraction <= 0:
        return np.zeros(len(works), bool)
    in_val = works.astype(np.float64) / 2.0**64 < val_fraction
    if len(there) > 1 and not in_val[kept].any():
        in_val |= works == there[0]
    if len(there) > 1 and in_val[kept].all():
        in_val &= works != there[-1]
    return in_val


def _split_of_each(
    pieces: "_Pieces", kept: np.ndarray, representative: np.ndarray, settings: MergeSettings
) -> tuple[np.ndarray, bool]:
    """Number in SPLITS of each piece, int8 [N], and whether the published split decided.

    A test piece is never trained on, whatever else is decided, and nor is a piece that stands for
    a duplicate of one. A published split without validation pieces gives up some of its training
    compositions for them.
    """
    said = pieces.split.copy()
    if settings.split_column == "none":
        said[:] = _UNSAID
    published = bool(len(said)) and (
        bool((said != _UNSAID).all())
        if settings.split_column is None
        else bool((said != _UNSAID).any())
    )
    np.maximum.at(said, representative, said.copy())
    by_composition = in_validation(pieces.work, kept & (said != _TEST), settings.val_fraction)
    split_of = by_composition.astype(np.int8)
    if published and (said[kept] == _VAL).any():
        split_of = np.where(said == _UNSAID, split_of, said)
    split_of[said == _TEST] = _TEST
    return split_of, published


def _warnings(pieces: "_Pieces", published: bool, settings: MergeSettings) -> list[str]:
    n, n_said = len(pieces.split), int((pieces.split != _UNSAID).sum())
    found = []
    if settings.max_per_composition is not None and (n_lone := int((~pieces.labelled).sum())):
        found.append(f"{n_lone:,} of {n:,} pieces have no composition, so no limit of performances")
    if not n_said or n_said == n or settings.split_column == "none":
        return found
    text = f"{n_said:,} of {n:,} pieces have a published split"
    if published:
        return [*found, f"{text}; the others are divided by composition"]
    return [
        *found,
        f"{text}, so it is not followed, except that its test pieces are kept out of train and val;"
        " --split-column split follows it where there is one, --split-column none ignores it"
    ]


@dataclass(frozen=True)
class _Pieces:
    """Columns over the accepted pieces: content hash S16, composition key uint64, whether that
    comes from a label, published split int8 (number in SPLITS or -1), notes and tokens int64,
    fingerprints uint32 [N, H] or None.
    """

    content: np.ndarray
    work: np.ndarray
    labelled: np.ndarray
    split: np.ndarray
    n_notes: np.ndarray
    n_tokens: np.ndarray
    fingerprints: np.ndarray | None


@dataclass
class _Columns:
    """`_Pieces` as they grow."""

    content: bytearray = field(default_factory=bytearray)
    work: "array[int]" = field(default_factory=lambda: array("Q"))
    labelled: bytearray = field(default_factory=bytearray)
    split: "array[int]" = field(default_factory=lambda: array("b"))
    n_notes: "array[int]" = field(default_factory=lambda: array("q"))
    n_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    fingerprints: bytearray = field(default_factory=bytearray)


def _accepted(units: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for unit in units:
        for summary in read_summaries(unit):
            if "n_tokens" in summary:
                yield summary


def _read(units: Sequence[Path], *, with_fingerprints: bool) -> _Pieces:
    columns = _Columns()
    for summary in _accepted(units):
        composition = summary["labels"].get("composition")
        # Pieces without a label can only share a composition with copies of themselves.
        name = f"label:{composition}" if composition else f"content:{summary['content']}"
        columns.content += bytes.fromhex(summary["content"])[:_CONTENT_BYTES]
        columns.work.append(composition_key(name))
        columns.labelled.append(bool(composition))
        columns.split.append(_SAID.get(summary["labels"].get("split"), _UNSAID))
        columns.n_notes.append(summary["n_notes"])
        columns.n_tokens.append(summary["n_tokens"])
        if with_fingerprints:
            columns.fingerprints += summary["fingerprint"]
    prints = np.frombuffer(columns.fingerprints, "<u4").reshape(-1, dedup.N_HASHES)
    return _Pieces(
        content=np.frombuffer(columns.content, f"S{_CONTENT_BYTES}"),
        work=np.frombuffer(columns.work, np.uint64),
        labelled=np.frombuffer(columns.labelled, bool),
        split=np.frombuffer(columns.split, np.int8),
        n_notes=np.frombuffer(columns.n_notes, np.int64),
        n_tokens=np.frombuffer(columns.n_tokens, np.int64),
        fingerprints=prints if with_fingerprints else None,
    )


def _without_duplicates(pieces: _Pieces, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Fate of each piece so far, int8 [N], and the piece that stands for it, int64 [N]."""
    numbers = np.arange(len(pieces.content))
    if how == "none":
        representative = numbers
    elif pieces.fingerprints is not None:
        representative = dedup.near_duplicates(pieces.fingerprints, pieces.n_notes, pieces.content)
    else:
        _, first, group = np.unique(pieces.content, return_index=True, return_inverse=True)
        representative = first[group]  # of equal pieces the first by path
    decision = np.full(len(numbers), _KEPT, np.int8)
    decision[representative != numbers] = _NEAR
    decision[(decision == _NEAR) & (pieces.content == pieces.content[representative])] = _EXACT
    return decision, representative


def _like_excluded(pieces: _Pieces, excluded: Excluded, how: str) -> dict[int, str]:
    """Of each piece that is a duplicate of an excluded one, directly or through others, the name of
    that one.
    """
    others = _read(excluded.units, with_fingerprints=how == "near")
    content = np.concatenate([pieces.content, others.content])
    if pieces.fingerprints is not None and others.fingerprints is not None:
        fingerprints = np.concatenate([pieces.fingerprints, others.fingerprints])
        n_notes = np.concatenate([pieces.n_notes, others.n_notes])
        group = dedup.near_duplicates(fingerprints, n_notes, content)
    else:
        group = np.unique(content, return_inverse=True)[1]
    n = len(pieces.content)
    found, first = np.unique(group[n:], return_index=True)
    hit = np.flatnonzero(np.isin(group[:n], found))
    of_hit = first[np.searchsorted(found, group[hit])]
    names = [
        f"{name}/{summary['path']}"
        for unit, name in zip(excluded.units, excluded.names, strict=True)
        for summary in _accepted([unit])
    ]
    return {int(piece): names[other] for piece, other in zip(hit, of_hit, strict=True)}


def _paths_of(
    units: Sequence[Path], decision: np.ndarray, representative: np.ndarray
) -> dict[int, str]:
    """Path of the piece that stands for each duplicate; only those paths are ever in memory."""
    duplicates = np.flatnonzero((decision == _EXACT) | (decision == _NEAR))
    if not len(duplicates):
        return {}
    wanted: Collection[int] = set(representative[duplicates].tolist())
    paths = {i: s["path"] for i, s in enumerate(_accepted(units)) if i in wanted}
    return {int(piece): paths[int(representative[piece])] for piece in duplicates}


# --- writing --------------------------------------------------------------------------------------


def merge_units(
    units: Sequence[Path],
    work: Path,
    out_dir: Path,
    settings: MergeSettings,
    excluded: Excluded | None = None,
) -> dict[str, Any]:
    """Writes shards, indexes and rejected.jsonl of finished units to `out_dir`.

    Returns the manifest's counts ("splits", "rejected", the totals) and warnings. May be repeated
    after a kill: everything is made in `work` first.
    """
    plan = plan_merge(units, settings, excluded)
    work.mkdir(exist_ok=True)
    writers = {
        split: SplitWriter(split, plan.n_shards(split, settings.shards), work)
        for split in plan.splits
    }
    rejected: Counter[str] = Counter()
    piece = -1
    with synced(work / REJECTED, "w", encoding="utf-8") as rejects:
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


def send_corpus(out: Path) -> None:
    """Sends a corpus to the bucket it is in; the manifest last, which says that it is whole."""
    if not storage.is_remote(out):
        return
    own = {FILES, REJECTED}
    for split, made in load_manifest(out)["splits"].items():
        own |= {index_name(split), *(shard["file"] for shard in made["shards"])}
    storage.upload(out, only=own.__contains__)
    for name in storage.listing(out):
        if _MADE_BY_MERGE.fullmatch(name) and name not in own:
            storage.remove(out / name)  # of a corpus that this one replaces
    storage.upload(out / MANIFEST)
