"""Reading, tokenising and augmenting, beside other programs that read and tokenise MIDI.

    python -m benchmarks.bench_data [MIDI_DIR] [--files 30] [--rounds 3] [--everything]

mido and miditoolkit are always measured; symusic and MidiTok where they are installed
(pip install symusic miditok). --everything also prints what near-duplicate search (bench_dedup)
and the loaders (bench_loaders) do.

Without MIDI_DIR it takes ASAP performances where the development data lies beside the checkout,
else made-up pieces. One process, by its CPU time; the sides are taken in turn, file by file, so
that a busy machine slows all of them alike, and each file counts with its fastest round.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import dedup, filters
from data_pipeline._smf import decoded_tracks
from data_pipeline.augment import AugmentConfig, augment
from data_pipeline.midi import midi_bytes, pedalled_ends, read_midi
from data_pipeline.shards import pack_record
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

DEVELOPMENT_DATA = Path(__file__).parents[2] / "shared" / "data" / "asap"
# EleutherAI/aria-utils e122d03, Python, one core of another machine, 30 ASAP performances of 3,190
# notes and 9,631 tokens on average (golden/README of the development data); it cannot be run here.
REFERENCE_FILES_PER_S, REFERENCE_TOKENS_PER_S = 3.0, 28_700
REFERENCE_AUGMENTED_PER_S = 248_000
GOAL_TIMES, AIM_TIMES, GOAL_AUGMENTED_PER_S = 30, 100, 5_000_000
WINDOW = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("midi_dir", nargs="?", type=Path, help="default: see above")
    parser.add_argument("--files", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--everything", action="store_true", help="dedup and loaders, too")
    args = parser.parse_args()
    folder = args.midi_dir or (DEVELOPMENT_DATA if DEVELOPMENT_DATA.is_dir() else None)
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            rng = np.random.default_rng(0)
            for i in range(args.files):
                made = midi_bytes(random_performance(rng, 3000))
                (Path(scratch) / f"{i}.mid").write_bytes(made)
        found = sorted((folder or Path(scratch)).rglob("*.mid"))
        paths = found[:: max(len(found) // args.files, 1)][: args.files]
        print(f"{folder or 'made-up pieces'}: every {max(len(found) // args.files, 1)}th file")
        ids = measure(paths, args.rounds)
    measure_augmentation(ids)
    if args.everything:
        from benchmarks import bench_dedup, bench_loaders

        if folder is not None:
            print("\nnear-duplicate search")
            bench_dedup.report(folder)
        print("\nloaders")
        bench_loaders.report()


def measure(paths: list[Path], rounds: int) -> list[np.ndarray]:
    """Prints what reading and tokenising take; ids of every file."""
    tokenizer = Tokenizer.preset("aria")
    data = [path.read_bytes() for path in paths]
    performances = [read_midi(content) for content in data]
    ids = [tokenizer.encode(performance) for performance in performances]
    others = _other_programs(paths)
    sides = {
        "read and tokenise": lambda i: tokenizer.encode(read_midi(paths[i])),
        **others,
        **_parts(paths, data, performances, tokenizer),
        **_other_steps(data, performances, ids),
    }
    ms = _fastest(sides, len(paths), rounds)
    n_notes, n_tokens = sum(len(p.notes) for p in performances), sum(map(len, ids))
    print(f"{len(paths)} files, {n_notes:,} notes, {n_tokens:,} tokens")
    local = ms["read and tokenise"]
    seconds = local * len(paths) / 1000
    print(f"\n{'one process, CPU time':<34}{'ms per file':>12}{'files/s':>10}{'times':>8}")
    for name in ("read and tokenise", *others):
        print(f"{name:<34}{ms[name]:>12.3f}{1000 / ms[name]:>10,.0f}{ms[name] / local:>8.1f}")
    print(f"\n{n_notes / seconds:,.0f} notes/s, {n_tokens / seconds:,.0f} tokens/s")
    times = 1000 / local / REFERENCE_FILES_PER_S
    print(
        f"  {times:,.0f} x the reference's {REFERENCE_FILES_PER_S} files/s (goal {GOAL_TIMES}, aim "
        f"{AIM_TIMES}), {n_tokens / seconds / REFERENCE_TOKENS_PER_S:,.0f} x its tokens/s; "
        "the reference was measured elsewhere"
    )
    print("\nwhere the time goes (parts measured one by one)")
    for name in _parts(paths, data, performances, tokenizer):
        print(f"  {name:<34}{ms[name]:8.3f} ms {100 * ms[name] / local:5.0f} %")
    print("\nwhat a build does besides, where asked to")
    for name in _other_steps(data, performances, ids):
        print(f"  {name:<34}{ms[name]:8.3f} ms")
    return ids


Step = Callable[[int], Any]


def _other_programs(paths: list[Path]) -> dict[str, Step]:
    """What other programs do with the files, of those that are installed."""
    from miditoolkit import MidiFile as ToolkitFile
    from mido import MidiFile

    sides: dict[str, Step] = {
        "mido, reading only": lambda i: MidiFile(paths[i]),
        "miditoolkit, reading only": lambda i: ToolkitFile(paths[i]),
    }
    if find_spec("symusic"):
        from symusic import Score

        sides["symusic, reading only"] = lambda i: Score(paths[i])
    if find_spec("miditok") and find_spec("symusic"):
        from miditok import REMI

        remi = REMI()
        sides["MidiTok REMI, read and tokenise"] = lambda i: remi(paths[i])
    return sides


def _parts(
    paths: list[Path], data: list[bytes], performances: list, tokenizer: Tokenizer
) -> dict[str, Step]:
    def times(i: int) -> None:
        performance = performances[i]
        performance.between_ms(performance.notes["start"], pedalled_ends(performance))

    return {
        "opening the file": lambda i: paths[i].read_bytes(),
        "bytes to performance": lambda i: read_midi(data[i]),
        "  of it decoding events": lambda i: decoded_tracks(data[i], "", True, False),
        "performance to ids": lambda i: tokenizer.encode(performances[i]),
        "  of it pedal and milliseconds": times,
    }


def _other_steps(data: list[bytes], performances: list, ids: list[np.ndarray]) -> dict[str, Step]:
    import hashlib

    return {
        "filters light": lambda i: filters.check(performances[i], filters.PRESETS["light"]),
        "filters heavy": lambda i: filters.check(performances[i], filters.PRESETS["heavy"]),
        "content hash (--dedup exact)": lambda i: dedup.content_hash(performances[i]),
        "fingerprint (--dedup near)": lambda i: dedup.fingerprint(performances[i]),
        "sha256 of the file": lambda i: hashlib.sha256(data[i]).hexdigest(),
        "packing the record": lambda i: pack_record(ids[i], {}),
    }


def _fastest(sides: dict[str, Step], n_files: int, rounds: int) -> dict[str, float]:
    """Mean over the files of each one's fastest round, in ms, for each side."""
    best = np.full((len(sides), n_files), np.inf)
    for _ in range(rounds):
        for i in range(n_files):
            for side, step in enumerate(sides.values()):
                began = time.process_time()
                step(i)
                best[side, i] = min(best[side, i], time.process_time() - began)
    return dict(zip(sides, 1000 * best.mean(axis=1), strict=True))


def measure_augmentation(ids: list[np.ndarray], seconds: float = 2.0) -> None:
    """Prints tokens/s of `augment` on windows of the ids, by CPU time of this process."""
    tokenizer, rng = Tokenizer.preset("aria"), np.random.default_rng(0)
    joined = np.concatenate(ids)
    windows = [joined[i : i + WINDOW] for i in range(0, len(joined), WINDOW)]
    everything = AugmentConfig(rubato=0.2, velocity_curve=2, note_drop=0.05, sustain=0.2)
    print(f"\naugmentation of windows of {WINDOW} ids, one process")
    for name, config in (("the reference's", AugmentConfig()), ("with all extras", everything)):
        augment(windows[0], config, rng, tokenizer)
        n_tokens, began = 0, time.process_time()
        while (elapsed := time.process_time() - began) < seconds:
            for window in windows:
                n_tokens += len(augment(window, config, rng, tokenizer))
        rate = n_tokens / elapsed
        print(
            f"  {name:<16}{rate:>12,.0f} tokens/s, {rate / REFERENCE_AUGMENTED_PER_S:,.0f} x the "
            f"reference's {REFERENCE_AUGMENTED_PER_S:,} (goal {GOAL_AUGMENTED_PER_S:,})"
        )


if __name__ == "__main__":
    main()
