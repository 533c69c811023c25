"""Recall and precision of near-duplicate detection on copies planted among real performances.

    python -m benchmarks.bench_dedup [MIDI_DIR] [--planted 200]

MIDI_DIR is the ASAP folder of the development data where it lies beside the checkout. Every file
of it is an original; copies of some are added, changed in one of several ways.
Recall: share of the copies that are grouped with their original. Confused: originals that are
grouped with another original (0 unless the folder itself holds copies).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.bench_data import DEVELOPMENT_DATA
from data_pipeline import dedup
from data_pipeline.errors import InvalidMidi
from data_pipeline.midi import TEMPO, Performance, read_midi
from data_pipeline.tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("midi_dir", nargs="?", type=Path, default=DEVELOPMENT_DATA)
    parser.add_argument("--planted", type=int, default=200, help="copies of each kind")
    args = parser.parse_args()
    if not args.midi_dir.is_dir():
        parser.error(f"{args.midi_dir}: no such folder; name one with real performances")
    report(args.midi_dir, args.planted)


def report(folder: Path, n_planted: int = 200) -> None:
    """Prints the table of copies, and what grouping many pieces takes."""
    originals = read_all(folder)
    began = time.perf_counter()
    prints = np.stack([dedup.fingerprint(p) for p in originals])
    seconds = time.perf_counter() - began
    n_notes = np.array([len(p.notes) for p in originals])
    print(
        f"{len(originals)} originals, {prints[0].nbytes} bytes and "
        f"{1e3 * seconds / len(originals):.2f} ms each ({n_notes.sum() / seconds:,.0f} notes/s)"
    )
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(originals), min(n_planted, len(originals)), replace=False)
    print(f"{'copy':<40}{'similarity 1%':>14}{'median':>8}{'recall':>8}{'confused':>10}")
    for name, change in copies(rng).items():
        planted = [change(originals[i]) for i in chosen]
        measure(name, prints, n_notes, chosen, planted)
    measure_scale(200_000)


def read_all(folder: Path) -> list[Performance]:
    """Every readable file with enough notes to have a fingerprint."""
    found = []
    for path in sorted(folder.rglob("*.mid")):
        try:
            performance = read_midi(path)
        except InvalidMidi:
            continue
        if len(performance.notes) >= 2 * dedup.MIN_NOTES:
            found.append(performance)
    return found


def copies(rng: np.random.Generator) -> dict[str, Callable[[Performance], Performance]]:
    """Ways to make a copy."""
    tokenizer = Tokenizer.preset("aria")

    def transposed(p: Performance) -> Performance:
        notes = p.notes.copy()
        shift = int(rng.choice([-5, -3, -1, 2, 4]))
        notes["pitch"] = np.clip(notes["pitch"].astype(int) + shift, 0, 127)
        return replace(p, notes=notes)

    def exported(p: Performance, factor: float, ticks_per_beat: int, tempo: int) -> Performance:
        notes = p.notes.copy()
        for end in ("start", "end"):
            notes[end] = np.round(p.ms(notes[end]) * factor * 1000 / tempo * ticks_per_beat)
        notes = notes[np.argsort(notes["start"], kind="stable")]
        return Performance(ticks_per_beat, notes, tempi=np.array([(0, tempo)], TEMPO))

    def stretched(p: Performance) -> Performance:
        return exported(p, float(rng.uniform(0.8, 1.25)), 480, 500_000)

    def trimmed(p: Performance, share: float) -> Performance:
        n = int(len(p.notes) * share)
        start = int(rng.integers(0, len(p.notes) - n + 1))
        return p.slice_notes(start, start + n)

    def tokenised(p: Performance) -> Performance:
        return tokenizer.decode(tokenizer.encode(p))

    return {
        "transposed": transposed,
        "stretched by up to 25%": stretched,
        "re-exported, 480 ticks": lambda p: exported(p, 1.0, 480, 400_000),
        "re-exported, 96 ticks": lambda p: exported(p, 1.0, 96, 600_000),
        "Aria tokens and back": tokenised,
        "trimmed to 75%": lambda p: trimmed(p, 0.75),
        "trimmed to 50%": lambda p: trimmed(p, 0.5),
        "80%, stretched, transposed": lambda p: transposed(stretched(trimmed(p, 0.8))),
        "80%, stretched, transposed, tokens": lambda p: tokenised(
            transposed(stretched(trimmed(p, 0.8)))
        ),
    }


def measure(
    name: str,
    prints: np.ndarray,
    n_notes: np.ndarray,
    chosen: np.ndarray,
    planted: list[Performance],
) -> None:
    """Prints one row of the table."""
    planted_prints = np.stack([dedup.fingerprint(p) for p in planted])
    similarity = (planted_prints == prints[chosen]).mean(axis=1)
    everything = np.concatenate([prints, planted_prints])
    lengths = np.concatenate([n_notes, [len(p.notes) for p in planted]])
    names = [f"{i:08d}" for i in range(len(everything))]  # all different: no exact matches
    group = dedup.near_duplicates(everything, lengths, names)
    n = len(prints)
    recall = np.mean(group[n:] == group[chosen])
    confused = n - len(np.unique(group[:n]))
    low, median = np.quantile(similarity, [0.01, 0.5])
    print(f"{name:<40}{low:>14.2f}{median:>8.2f}{recall:>8.3f}{confused:>10}")


def measure_scale(n: int) -> None:
    """Prints how long grouping takes for many unrelated pieces."""
    prints = np.random.default_rng(0).integers(0, 2**32, (n, dedup.N_HASHES), dtype=np.uint32)
    names = [f"{i:08d}" for i in range(n)]
    began = time.perf_counter()
    group = dedup.near_duplicates(prints, np.ones(n), names)
    seconds = time.perf_counter() - began
    print(f"grouping {n:,} unrelated pieces: {seconds:.1f} s, {n - len(np.unique(group))} grouped")


if __name__ == "__main__":
    main()
