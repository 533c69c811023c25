"""What a model's states tell of single notes: melody, bridge or accompaniment, and how loud.

    python -m benchmarks.note_probe POP909_DIR --checkpoint mini

Two tasks at the level of notes that MidiBERT-Piano reports on POP909 (Chou et al., 2021): which of
the three tracks a note is of, and which of six dynamics (pp to ff) it has. As there, the model is
not told velocities: all notes are given one. Unlike there the model is not finetuned, and sees only
what comes before a note and the note itself: a ridge classifier reads the state at the note's last
token. No song is on both sides of a fold. Beside it: the same network untrained, the note's
own features (pitch, duration, the gap before it, highest or lowest of its onset, notes at its
onset), and the most frequent class.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aria_jax.checkpoints.models import load_model
from aria_jax.config import ComputeConfig
from aria_jax.generate.score import windows
from aria_jax.models.heads import Model, build_model
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance, read_midi
from data_pipeline.tokenizers import AriaTokenizer, Tokenizer, of_aria

TRACKS = ("melody", "bridge", "piano")
DYNAMICS = (32, 48, 64, 80, 96)
"""Where p, mp, mf, f and ff begin."""
ONE_VELOCITY = 60


def songs(folder: Path) -> list[Performance]:
    """Files with POP909's three tracks, on channels 0, 1 and 2."""
    found = [read_midi(path) for path in sorted(folder.rglob("pop909*.mid"))]
    found = [one for one in found if set(np.unique(one.notes["channel"])) == {0, 1, 2}]
    if len(found) < 5:
        raise UserError(f"{folder}: {len(found)} files pop909*.mid of three tracks; 5 are needed")
    return found


def own_features(song: Performance) -> np.ndarray:
    """What each note says by itself and beside those of its onset, float [N, 6]."""
    notes, start = song.notes, song.ms(song.notes["start"])
    length = song.ms(song.notes["end"]) - start
    _, onset, size = np.unique(start, return_inverse=True, return_counts=True)
    high, low = np.full(len(size), -1), np.full(len(size), 128)
    np.maximum.at(high, onset, notes["pitch"].astype(int))
    np.minimum.at(low, onset, notes["pitch"].astype(int))
    gap = np.diff(start, prepend=start[0])
    pitch = notes["pitch"].astype(int)
    columns = (pitch, np.log1p(length), np.log1p(gap), pitch == high[onset], pitch == low[onset])
    return np.stack([*columns, size[onset]], axis=1).astype(float)


def states(model: Model, tokenizer: AriaTokenizer, song: Performance, context: int) -> np.ndarray:
    """The state at the last token of each note, float32 [N, D]."""
    notes = song.notes.copy()
    notes["velocity"] = ONE_VELOCITY
    ids = tokenizer.encode(replace(song, notes=notes)).astype(np.int64)
    at = tokenizer.note_positions(ids) + 2  # its duration
    if len(at) != len(notes):
        raise UserError("a song has notes without tokens")
    graph, state = nnx.split(model)
    compute = jax.jit(lambda state, x: nnx.merge(graph, state).hidden(x))
    out = None
    for window in windows(0, len(ids), context):
        row = np.full((1, context), tokenizer.pad_id, np.int32)
        row[0, : window.stop - window.start] = ids[window.start : window.stop]
        hidden = np.asarray(compute(state, jnp.asarray(row))[0], np.float32)
        out = np.zeros((len(ids), hidden.shape[-1]), np.float32) if out is None else out
        out[window.keep : window.stop] = hidden[
            window.keep - window.start : window.stop - window.start
        ]
    if out is None:
        raise UserError("an empty song")
    return out[at]


def accuracy(x: np.ndarray, y: np.ndarray, song: np.ndarray) -> tuple[float, float]:
    """Of held-out songs, five folds: over all notes, and the mean over classes of their recall."""
    right = np.zeros(len(y), bool)
    for train, test in GroupKFold(5).split(x, y, song):
        fit = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100))
        right[test] = fit.fit(x[train], y[train]).predict(x[test]) == y[test]
    return float(right.mean()), float(np.mean([right[y == one].mean() for one in np.unique(y)]))


def probe(folder: Path, checkpoint: str) -> dict[str, Any]:
    """Accuracy and mean recall of each task by each kind of features."""
    loaded = load_model(checkpoint)
    tokenizer = of_aria(Tokenizer.preset(loaded.tokenizer), "note_probe")
    found = songs(folder)
    untrained = build_model(loaded.config, ComputeConfig(), rngs=nnx.Rngs(0))
    context = min(1024, loaded.config.max_seq_len)
    features = {
        "model": [states(loaded.model, tokenizer, song, context) for song in found],
        "untrained": [states(untrained, tokenizer, song, context) for song in found],
        "note": [own_features(song) for song in found],
    }
    features["model and note"] = [
        np.concatenate(pair, axis=1)
        for pair in zip(features["model"], features["note"], strict=True)
    ]
    song = np.repeat(np.arange(len(found)), [len(one.notes) for one in found])
    notes = np.concatenate([one.notes for one in found])
    tasks = {
        "track": notes["channel"].astype(int),
        "velocity": np.digitize(notes["velocity"], DYNAMICS),
    }
    result: dict[str, Any] = {"songs": len(found), "notes": len(notes)}
    for task, y in tasks.items():
        most = float(np.bincount(y).max() / len(y))
        result[task] = {"most frequent": (most, 1 / len(np.unique(y)))}
        for name, parts in features.items():
            result[task][name] = accuracy(np.concatenate(parts), y, song)
    return result


def main(argv: list[str] | None = None) -> None:
    """Prints a table, or with --json a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = probe(args.folder, args.checkpoint)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['songs']} songs, {found['notes']:,} notes: accuracy (mean recall of classes)")
    for task in ("track", "velocity"):
        cells = (f"{name} {a:.3f} ({b:.3f})" for name, (a, b) in found[task].items())
        print(f"{task:<9}" + "  ".join(cells))


if __name__ == "__main__":
    main()
