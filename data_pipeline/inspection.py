"""What is in a folder of token shards."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import TokenShards, load_manifest, reading_of, rejections
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind


@dataclass(frozen=True)
class Inspection:
    """A corpus in numbers.

    Attributes:
        splits: per split n_pieces, n_tokens, n_notes, hours.
        labels: per label name, how many pieces have each value.
        coverage: per label name and split, and in "total", how many pieces have the label at all
            ("n_pieces") and their share ("percent").
        kinds: how many tokens are of each kind, over the first pieces.
        notes_quantiles: notes of the shortest, quartile, median, quartile and longest piece.
        length_histogram: pieces below each power of two of tokens (and not below the one before).
        reading: how MIDI files were read, "standard" or "aria-utils".
        n_repaired: pieces of truncated files, read up to the break.
        rejected: files by "stage/reason".
        first_lines: the first tokens of the first piece.
    """

    tokenizer: str
    reading: str
    n_repaired: int
    splits: dict[str, dict[str, float]]
    labels: dict[str, dict[str, int]]
    coverage: dict[str, dict[str, dict[str, float]]]
    kinds: dict[str, int]
    notes_quantiles: list[int]
    length_histogram: dict[int, int]
    rejected: dict[str, int]
    first_lines: list[str]


def inspect(data_dir: str | Path, *, sampled_pieces: int = 200) -> Inspection:
    """Counts what the index knows of every piece, and the tokens of the first `sampled_pieces`.

    Raises:
        UserError: no shards there.
    """
    manifest = load_manifest(data_dir)
    tokenizer = Tokenizer.preset(manifest["tokenizer"]["preset"])
    splits, n_notes, lengths = {}, [], []
    labels: dict[str, Counter[str]] = {}
    labelled: dict[str, dict[str, int]] = {}
    kinds = np.zeros(len(Kind), np.int64)
    first_lines: list[str] = []
    for name in manifest["splits"]:
        shards = TokenShards(data_dir, name, tokenizer)
        splits[name] = {
            "n_pieces": len(shards),
            "n_tokens": int(shards.lengths.sum()),
            "n_notes": int(shards.n_notes.sum()),
            "hours": float(shards.duration_ms.sum() / 3.6e6),
        }
        n_notes.append(shards.n_notes)
        lengths.append(shards.lengths)
        for label in shards.label_names:
            codes, values = shards.label_codes(label)
            counts = np.bincount(codes[codes >= 0], minlength=len(values))
            labelled.setdefault(label, {})[name] = int(counts.sum())
            known = labels.setdefault(label, Counter())
            known.update(dict(zip(values, counts.tolist(), strict=True)))
        for i in range(min(len(shards), sampled_pieces)):
            ids = shards[i].ids
            kinds += np.bincount(tokenizer.kind[ids], minlength=len(Kind))
            if not first_lines:
                first_lines = _lines(ids[:40], tokenizer)
    notes = np.concatenate(n_notes) if n_notes else np.zeros(0, np.int64)
    quantiles = np.quantile(notes, [0, 0.25, 0.5, 0.75, 1]) if len(notes) else np.zeros(5)
    return Inspection(
        tokenizer=tokenizer.scheme,
        reading=reading_of(manifest),
        n_repaired=manifest.get("n_repaired", 0),
        splits=splits,
        labels={name: dict(counts.most_common()) for name, counts in labels.items()},
        coverage=_coverage(
            labelled, {name: int(split["n_pieces"]) for name, split in splits.items()}
        ),
        kinds={kind.name.lower(): int(kinds[kind]) for kind in Kind},
        notes_quantiles=[int(q) for q in quantiles],
        length_histogram=_by_power_of_two(np.concatenate(lengths)) if lengths else {},
        rejected=dict(
            Counter(f"{row['stage']}/{row['reason']}" for row in rejections(data_dir)).most_common()
        ),
        first_lines=first_lines,
    )


def _coverage(
    labelled: dict[str, dict[str, int]], n_pieces: dict[str, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """See `Inspection`; labels that most pieces have come first."""
    sizes = {**n_pieces, "total": sum(n_pieces.values())}
    found = {}
    for label, counts in sorted(labelled.items(), key=lambda item: -sum(item[1].values())):
        having = {**counts, "total": sum(counts.values())}
        found[label] = {
            split: {
                "n_pieces": having.get(split, 0),
                "percent": 100 * having.get(split, 0) / max(size, 1),
            }
            for split, size in sizes.items()
        }
    return found


def _by_power_of_two(lengths: np.ndarray) -> dict[int, int]:
    """Count of lengths below each power of two, counted once; empty classes are left out."""
    exponents, counts = np.unique(np.frexp(lengths)[1], return_counts=True)
    return {2 ** int(e): int(n) for e, n in zip(exponents, counts, strict=True)}


def _lines(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """One event a line: a note with its onset and duration, or a token that stands alone."""
    lines: list[str] = []
    for i in ids:
        kind = tokenizer.kind[i]
        token: Any = tokenizer.tokens[i]
        text = token if isinstance(token, str) else " ".join(map(str, token))
        if kind in (Kind.ONSET, Kind.DUR) and lines:
            lines[-1] += f"  {text} ms"
        else:
            lines.append(text)
    return lines[:-1]  # the last may lack its duration


def relabelled(
    data_dir: str | Path, labels_for: Callable[[str], Mapping[str, str]], at_most: int
) -> str:
    """Names pieces that have other labels now, e.g. "composer of a.mid bach → liszt"; "" for none.

    Args:
        labels_for: path -> what is known of it now.
    """
    found: list[str] = []
    for split in load_manifest(data_dir)["splits"]:
        shards = TokenShards(data_dir, split)
        for meta in (shards[i].meta for i in range(len(shards))):
            for name, value in labels_for(meta["path"]).items():
                if (was := meta["labels"].get(name)) != value:
                    found.append(f"{name} of {meta['path']} {was or 'none'} → {value}")
            if len(found) >= at_most:
                return ", ".join(found[:at_most])
    return ", ".join(found)
