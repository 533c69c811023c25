"""Tokens per second that each loader delivers, in one process, with and without augmentation.

    python -m benchmarks.bench_loaders [DATA_DIR] [--seq-len 2048] [--seconds 2]

Without DATA_DIR it measures on made-up pieces as long as concert performances. The rate counts
tokens without padding, by wall clock and by CPU time (the loader reads ahead in a thread).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline import shards
from data_pipeline.augment import AugmentConfig, augment
from data_pipeline.errors import UserError
from data_pipeline.loaders import Batch, BatchStream
from data_pipeline.loaders.slice_batches import contrastive_pairs, labelled_slices
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.midi import NOTE, Performance
from data_pipeline.tokenizers import Tokenizer

GOAL = 500_000  # augmented tokens per second and core
N_PIECES, NOTES_PER_PIECE = 300, 3190  # as many notes as an average ASAP performance has
COMPOSERS = ("bach", "chopin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", nargs="?", help="token shards; default: made-up ones")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    args = parser.parse_args()
    report(args.data_dir, args.seq_len, args.batch, args.seconds)


def report(
    data_dir: str | Path | None = None, seq_len: int = 2048, batch: int = 16, seconds: float = 2.0
) -> None:
    """Prints what each loader delivers of `data_dir`, or of made-up pieces."""
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = data_dir or made_up_shards(Path(scratch))
        print(f"augment() alone: {augment_rate(data_dir, seq_len, seconds):,.0f} tokens/s")
        print(f"{'loader':<14}{'augment':<9}{'tokens/s':>12}{'per CPU s':>12}{'of goal':>9}")
        for name, config in ((n, c) for n in LOADERS for c in (None, AugmentConfig())):
            try:
                loader = LOADERS[name](data_dir, config, seq_len, batch)
            except UserError as error:
                print(f"{name:<14}skipped: {error}")
                continue
            wall, cpu = rates(loader.iterate(), seconds)
            augmented = "yes" if config else "no"
            print(f"{name:<14}{augmented:<9}{wall:>12,.0f}{cpu:>12,.0f}{cpu / GOAL:>8.1f}x")


def _common(config: AugmentConfig | None, seq_len: int, batch: int) -> dict:
    return {
        "split": "train",
        "seq_len": seq_len,
        "global_batch": batch,
        "seed": 0,
        "augment": config,
    }


def _concat(data_dir, *how) -> BatchStream:
    return lm_windows(data_dir, **_common(*how))


def _best_fit(data_dir, *how) -> BatchStream:
    return lm_windows(data_dir, packing="best-fit", **_common(*how))


def _pairs(data_dir, *how) -> BatchStream:
    return contrastive_pairs(data_dir, **_common(*how))


def _labelled(data_dir, *how) -> BatchStream:
    names = shards.TokenShards(data_dir, "train").label_codes("composer")[1]
    return labelled_slices(data_dir, label="composer", class_names=names, **_common(*how))


LOADERS = {"lm concat": _concat, "lm best-fit": _best_fit, "pairs": _pairs, "labelled": _labelled}


def rates(batches: Iterator[Batch], seconds: float) -> tuple[float, float]:
    """Tokens per second of wall clock and of CPU time, after three batches to warm up."""
    for _ in range(3):
        next(batches)
    n_tokens, wall, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - wall) < seconds:
        batch = next(batches)
        tokens = batch["inputs"] if "inputs" in batch else batch["tokens"]
        n_tokens += np.count_nonzero(tokens != Tokenizer.pad_id)
    return n_tokens / elapsed, n_tokens / (time.process_time() - cpu)


def augment_rate(data_dir: str | Path, seq_len: int, seconds: float) -> float:
    """Tokens per second of `augment` on windows in memory."""
    pieces = shards.TokenShards(data_dir, "train")
    tokenizer, rng, config = Tokenizer.preset("aria"), np.random.default_rng(0), AugmentConfig()
    ids = np.concatenate([pieces[i].ids for i in range(min(len(pieces), 50))])
    windows = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
    augment(windows[0], config, rng, tokenizer)
    n_tokens, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        for window in windows:
            n_tokens += len(augment(window, config, rng, tokenizer))
    return n_tokens / elapsed


def made_up_shards(folder: Path) -> Path:
    """Token shards of random piano pieces."""
    rng, tokenizer = np.random.default_rng(0), Tokenizer.preset("aria")
    writer = shards.ShardWriter(folder / shards.shard_name("train", 0, 1))
    index = shards.IndexWriter()
    for i in range(N_PIECES):
        notes = np.zeros(NOTES_PER_PIECE, NOTE)
        notes["start"] = np.cumsum(rng.choice([0, 40, 90, 130, 260], NOTES_PER_PIECE))
        notes["end"] = notes["start"] + rng.integers(50, 1500, NOTES_PER_PIECE)
        notes["pitch"] = rng.integers(30, 100, NOTES_PER_PIECE)
        notes["velocity"] = rng.integers(10, 120, NOTES_PER_PIECE)
        labels = {"composer": COMPOSERS[i % len(COMPOSERS)]}
        ids = tokenizer.encode(Performance(500, notes), labels=labels)
        meta = {"path": f"{i}.mid", "sha256": "", "duration_ms": 0, "labels": labels}
        writer.write(ids, {**meta, "n_notes": NOTES_PER_PIECE})
        index.add(len(ids), NOTES_PER_PIECE, 0, labels)
    splits = {"train": {"shards": [writer.close()]}}
    shards.write_index(folder / shards.index_name("train"), [index])
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "tokenizer": {"preset": "aria", "hash": tokenizer.hash},
        "splits": splits,
    }
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    return folder


if __name__ == "__main__":
    main()
