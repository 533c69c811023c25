"""Reading and tokenising against mido and miditoolkit parsing the same files, in one run.

python -m benchmarks.bench_data [MIDI_DIR] [--files 30]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.midi import midi_bytes, read_midi
from data_pipeline.tokenizer import Tokenizer
from tests.corpora import random_performance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("midi_dir", nargs="?", type=Path, help="default: made-up pieces")
    parser.add_argument("--files", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.midi_dir is None:
            rng = np.random.default_rng(0)
            for i in range(args.files):
                (Path(folder) / f"{i}.mid").write_bytes(midi_bytes(random_performance(rng, 3000)))
        found = sorted((args.midi_dir or Path(folder)).rglob("*.mid"))
        measure(found[:: max(len(found) // args.files, 1)][: args.files])


def measure(paths: list[Path]) -> None:
    """Takes the sides in turn, file by file, so that a busy machine slows all of them alike."""
    from miditoolkit import MidiFile as ToolkitFile
    from mido import MidiFile

    tokenizer = Tokenizer.preset("aria")
    tokenizer.encode(read_midi(paths[0]))  # compiles
    seconds = dict.fromkeys(("read", "tokenise", "mido, parsing only", "miditoolkit"), 0.0)
    n_notes = n_tokens = 0
    for path in paths:
        began = time.perf_counter()
        performance = read_midi(path)
        read = time.perf_counter()
        ids = tokenizer.encode(performance)
        tokenised = time.perf_counter()
        MidiFile(path)
        parsed = time.perf_counter()
        ToolkitFile(path)
        seconds["read"] += read - began
        seconds["tokenise"] += tokenised - read
        seconds["mido, parsing only"] += parsed - tokenised
        seconds["miditoolkit"] += time.perf_counter() - parsed
        n_notes += len(performance.notes)
        n_tokens += len(ids)
    ours = seconds["read"] + seconds["tokenise"]
    print(f"{len(paths)} files, {n_notes:,} notes, {n_tokens:,} tokens")
    for name, spent in seconds.items():
        print(f"{name:<20} {1000 * spent / len(paths):8.2f} ms a file")
    print(
        f"read and tokenise: {len(paths) / ours:,.0f} files/s, {n_notes / ours:,.0f} notes/s, "
        f"{n_tokens / ours:,.0f} tokens/s"
    )
    for name in ("mido, parsing only", "miditoolkit"):
        print(f"{seconds[name] / ours:8.1f} × the speed of {name}")


if __name__ == "__main__":
    main()
