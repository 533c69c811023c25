"""The logs of runs, thinned, and their losses as a picture.

    python -m benchmarks.training_curves OUT RUN [RUN ...]

RUN is a workdir. OUT/NAME.jsonl keeps every evaluation and at most `--rows` training lines of each,
evenly spread and averaged over the lines they stand for; OUT/losses.png shows all of them.
"""

import argparse
import json
from pathlib import Path

import numpy as np

KEPT = ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_s", "retrieval")


def read(workdir: Path) -> list[dict]:
    """The lines of a run's metrics, the last one of each step and split."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = {(row["split"], row["step"]): row for row in map(json.loads, lines)}
    return sorted(rows.values(), key=lambda row: row["step"])


def thinned(rows: list[dict], most: int) -> list[dict]:
    """Evaluations, and groups of training lines as their mean."""
    train = [row for row in rows if row["split"] == "train"]
    kept = [row for row in rows if row["split"] != "train"]
    for group in np.array_split(np.arange(len(train)), min(most, len(train)) or 1):
        members = [train[i] for i in group]
        if members:
            means = {
                name: float(np.mean([row[name] for row in members]))
                for name in KEPT
                if name in members[-1]
            }
            kept.append({"step": members[-1]["step"], "split": "train", **means})
    shown = [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in kept
    ]
    return sorted(shown, key=lambda row: (row["step"], row["split"]))


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    args.out.mkdir(parents=True, exist_ok=True)
    figure, all_axes = plt.subplots(1, len(args.runs), figsize=(4 * len(args.runs), 3.2))
    for workdir, axes in zip(args.runs, np.atleast_1d(all_axes), strict=True):
        rows = thinned(read(workdir), args.rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{workdir.name}.jsonl").write_text(text)
        for split, style in (("train", "-"), ("val", "o-")):
            points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=split, markersize=4)
        axes.set(title=workdir.name, xlabel="step", ylabel="loss, nats")
        axes.legend()
    figure.tight_layout()
    figure.savefig(args.out / "losses.png", dpi=110)


if __name__ == "__main__":
    main()
