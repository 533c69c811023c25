"""How near renderings of held-out scores are to a performance of them, beside a machine's.

    python -m benchmarks.eval_render DATA --checkpoint RUN [--slices 32]

DATA are shards of scores with their performances (`data build PAIRS.parquet DATA --tokenizer
render`), RUN a model of `train render`. From every held-out piece slices are rendered, spread
evenly over the pieces, and compared with the performance that the slice is of. "deadpan" plays the
score at the performance's mean tempo, with one velocity. Means over slices, 95 % intervals by a
bootstrap over compositions; onsets in ms.
"""

import argparse
import json

import numpy as np

from aria_jax.checkpoints.models import load_model
from aria_jax.generate.continuation import continue_prompt
from aria_jax.generate.decoding import Decoding
from aria_jax.generate.sampler import choose_sampler
from aria_jax.generate.weights import decoder_weights
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance
from data_pipeline.slices import Pieces
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.tokenizers.render import RenderTokenizer, rendition_errors

MEASURES = ("matched", "added", "onset_ms", "onset_ms_scaled", "velocity_r", "duration_r")


def chosen_slices(pieces: Pieces, n: int, notes: int) -> list[tuple[str, np.ndarray]]:
    """Composition and ids of `n` slices, from random places of pieces spread over the split."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        piece = i * len(pieces) // n
        last = max(pieces.n_notes(piece) - notes, 0)
        start = int(rng.integers(last + 1))
        labels = pieces.shards[piece].meta["labels"]
        name = labels.get("composition", str(piece))
        found.append((name, pieces.notes(piece, start, start + notes)))
    return found


def deadpan(tokenizer: RenderTokenizer, ids: np.ndarray) -> np.ndarray:
    """The score as its own performance, as long as the performance of it."""
    score = tokenizer.halves(ids)[0]
    own = np.concatenate([score, score])
    _, wanted = tokenizer.events(ids)
    performance = tokenizer.decode(own)
    factor = (wanted[-1] or 1) / max(int(performance.notes["start"].max()), 1)
    notes = performance.notes.copy()
    for name in ("start", "end"):
        notes[name] = np.rint(notes[name] * factor)
    notes["end"] = np.maximum(notes["end"], notes["start"] + 10)
    played = Tokenizer.preset("aria").encode(Performance(500, notes))
    return np.concatenate([score, played])


def interval(values: list[float], groups: list[str]) -> tuple[float, float, float]:
    """Mean and 95 % interval, bootstrapped over groups; NaN are left out."""
    array, names = np.array(values), np.array(groups)
    kinds, rng = np.unique(names), np.random.default_rng(0)
    means = []
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(names == g) for g in rng.choice(kinds, len(kinds))])
        if np.isfinite(array[rows]).any():
            means.append(float(np.nanmean(array[rows])))
    low, high = np.quantile(means, [0.025, 0.975]) if means else (np.nan, np.nan)
    return float(np.nanmean(array)) if means else float("nan"), float(low), float(high)


def evaluate(data: str, checkpoint: str, n: int, notes: int, temperature: float) -> dict:
    """Of the model and of the machine: each measure with its interval."""
    loaded = load_model(checkpoint)
    pieces = Pieces(data, "val")
    tokenizer = pieces.tokenizer
    if not isinstance(tokenizer, RenderTokenizer) or loaded.tokenizer != "render":
        raise UserError("eval_render takes shards and a model of --tokenizer render")
    weights = decoder_weights(loaded.model)
    rows: dict[str, list[dict[str, float]]] = {"model": [], "deadpan": []}
    groups = []
    for number, (name, truth) in enumerate(chosen_slices(pieces, n, notes)):
        score, performance = tokenizer.halves(truth.astype(np.int64))
        header = performance[: int(np.argmax(performance == tokenizer.bos_id)) + 1]
        prompt = np.concatenate([score, header])
        sampler = choose_sampler(temperature, min_p=0.035, top_p=None, top_k=None)
        settings = Decoding(sampler=sampler, max_tokens=4 * notes)
        (made,) = continue_prompt(weights, tokenizer, prompt, n=1, seed=number, settings=settings)
        rendered = np.concatenate([prompt, made.ids])
        rows["model"].append(rendition_errors(tokenizer, truth, rendered))
        rows["deadpan"].append(rendition_errors(tokenizer, truth, deadpan(tokenizer, truth)))
        groups.append(name)
    return {
        "slices": n,
        "compositions": len(set(groups)),
        **{
            who: {m: interval([row[m] for row in found], groups) for m in MEASURES}
            for who, found in rows.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Prints a table, or with --json a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--notes", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    found = evaluate(args.data, args.checkpoint, args.slices, args.notes, args.temperature)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['slices']} slices of {found['compositions']} compositions")
    for who in ("model", "deadpan"):
        cells = (
            f"{m} {v:.3g} ({low:.3g} to {high:.3g})" for m, (v, low, high) in found[who].items()
        )
        print(f"{who:<8} " + "  ".join(cells))


if __name__ == "__main__":
    main()
