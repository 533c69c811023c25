"""How well a language model continues held-out music, beside an interpolated n-gram and its own
earlier checkpoints: `python -m benchmarks.eval_continuation SHARDS --checkpoint MODEL`.

Of the validation split of SHARDS one half tunes the n-gram (`benchmarks.ngram`), the other is
judged, so that neither has seen it. Writes results.md and results.json to OUT.

1. Nats per note: all tokens behind `<S>`, `<E>` included, over the number of notes. Labels that
   name the piece (composer, form) are left out of the prefix: the n-gram knows none.
2. Continuations of prompts of so many notes, by each system and as the piece really goes on, in
   numbers (`aria_jax.eval.comparison.MusicStatistics`). Distance of a statistic: Wasserstein-1
   between its values over continuations and over the real ones, divided by the standard deviation
   of the real ones; 95 % intervals by resampling prompts. How near music itself comes is told by
   real continuations of other places of the held-out pieces ("real, elsewhere").
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from aria_jax.checkpoints.models import LoadedModel, load_model
from aria_jax.eval.comparison import MusicStatistics, music_statistics
from aria_jax.generate.continuation import continue_prompt
from aria_jax.generate.decoding import Decoding
from aria_jax.generate.sampler import choose_sampler
from aria_jax.generate.score import score_pieces
from aria_jax.generate.weights import decoder_weights
from aria_jax.report import program_version
from benchmarks.ngram import NoteNgram, Notes, ids_of, notes_of
from data_pipeline.artifact import write_atomically
from data_pipeline.errors import UserError
from data_pipeline.midi import Performance
from data_pipeline.shards import TokenShards
from data_pipeline.tokenizers import Tokenizer

TEMPERATURE, MIN_P = 0.98, 0.035
"""Of both systems; what `aria-jax generate` takes."""
BOOTSTRAPS = 1000
MIN_NOTES = 20
"""A continuation with fewer has no statistics."""
NGRAM, ELSEWHERE = "n-gram", "real, elsewhere"


@dataclass(frozen=True)
class Excerpt:
    """A place in a held-out piece.

    Attributes:
        name: of the piece.
        prompt: ids up to its last note, without `<E>`.
        real: how it goes on.
        notes: of the prompt.
    """

    name: str
    prompt: np.ndarray
    real: Performance
    notes: Notes


def unlabelled(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """A piece whose prefix names no composer and no form, int64 [L]."""
    ids = np.asarray(ids, np.int64)
    names = [i for i, token in enumerate(tokenizer.tokens)
             if token[:2] in (("prefix", "composer"), ("prefix", "form"))]  # fmt: skip
    return ids[~np.isin(ids, names)]


def held_out(shards: str, tokenizer: Tokenizer, limit: int | None) -> tuple[list, list, list[str]]:
    """Pieces to tune on, pieces to judge and the names of these: every other one."""
    records = TokenShards(shards, "val", tokenizer)
    if len(records) < 4:
        raise UserError(f"{shards}: {len(records)} held-out pieces are too few; build with more")
    pieces = [unlabelled(records[i].ids, tokenizer) for i in range(len(records))][:limit]
    names = [records[i].meta["path"] for i in range(len(pieces))]
    return pieces[::2], pieces[1::2], names[1::2]


def first_event(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """Where the prefix and `<S>` end."""
    return int(np.argmax(ids == tokenizer.bos_id)) + 1


def opened(path: str) -> LoadedModel:
    """A model; RUN@STEP is that of a step."""
    run, at, step = path.rpartition("@")
    return load_model(run, step=int(step)) if at and step.isdecimal() else load_model(path)


def labels_of(paths: Sequence[str]) -> dict[str, str]:
    """Names in tables -> paths: the last part of each where that tells them apart."""
    short = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return dict(zip(short if len(set(short)) == len(set(paths)) else paths, paths, strict=True))


def model_nats(path: str, pieces: Sequence[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """-ln p of each piece behind `<S>`, float64 [number of pieces]."""
    loaded = opened(path)
    if loaded.tokenizer != tokenizer.preset_name:
        raise UserError(f"{path}: its tokenizer is {loaded.tokenizer}, not {tokenizer.preset_name}")
    scores = score_pieces(loaded.model, tokenizer, pieces, progress=progress(f"score {path}"))
    return np.array(
        [s.nll[first_event(s.ids, tokenizer) - 1 :].sum(dtype=np.float64) for s in scores]
    )


def progress(what: str) -> Callable[[int, int], None]:
    """Says how far a step is, every ten seconds."""
    last = [time.monotonic()]

    def report(done: int, total: int) -> None:
        if done == total or time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"{what}: {done:,}/{total:,}", file=sys.stderr, flush=True)

    return report


def per_note(nats_P: np.ndarray, notes_P: np.ndarray) -> tuple[float, float, float]:
    """Nats per note over pieces, and its 95 % interval, by resampling pieces."""
    drawn = np.random.default_rng(0).integers(0, len(nats_P), (BOOTSTRAPS, len(nats_P)))
    low, high = np.quantile(nats_P[drawn].sum(1) / notes_P[drawn].sum(1), [0.025, 0.975])
    return float(nats_P.sum() / notes_P.sum()), float(low), float(high)


def excerpts(
    pieces: Sequence[np.ndarray],
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    n: int,
    prompt_notes: int,
    real_notes: int,
    seed: int,
) -> list[Excerpt]:
    """Places of which so many notes come before and after, spread evenly over the pieces."""
    rng, length = np.random.default_rng(seed), prompt_notes + real_notes
    sizes = [tokenizer.n_notes(ids) for ids in pieces]
    usable = [i for i, size in enumerate(sizes) if size >= length]
    if not usable:
        raise UserError(f"no held-out piece has {length} notes; ask for shorter prompts")
    order = np.concatenate([rng.permutation(usable) for _ in range(-(-n // len(usable)))])[:n]
    starts = [int(rng.integers(0, sizes[i] - length + 1)) for i in order]
    return [
        excerpt(names[i], pieces[i], start, prompt_notes, real_notes, tokenizer)
        for i, start in zip(order.tolist(), starts, strict=True)
    ]


def excerpt(
    name: str, ids: np.ndarray, start: int, prompt_notes: int, real_notes: int, tokenizer: Tokenizer
) -> Excerpt:
    """The place behind `start` + `prompt_notes` notes."""
    whole = tokenizer.slice_notes(ids, start, start + prompt_notes + real_notes)
    prompt = tokenizer.slice_notes(ids, start, start + prompt_notes)[:-1].astype(np.int64)
    real = tokenizer.decode(whole).slice_notes(prompt_notes, prompt_notes + real_notes)
    return Excerpt(name, prompt, real, notes_of(prompt, tokenizer))


def by_model(
    path: str,
    places: Sequence[Excerpt],
    tokenizer: Tokenizer,
    *,
    each: int,
    n_notes: int,
    seed: int,
) -> list[list[Performance]]:
    """Continuations of every prompt, at most `n_notes` long."""
    weights = decoder_weights(opened(path).model)
    # Three tokens a note, and one for every 5 s.
    sampler = choose_sampler(TEMPERATURE, min_p=MIN_P, top_p=None, top_k=None)
    settings = Decoding(sampler=sampler, max_tokens=int(3.5 * n_notes))
    report, made = progress(f"generate {path}"), []
    for number, place in enumerate(places):
        continuations = continue_prompt(
            weights, tokenizer, place.prompt, n=each, seed=seed + number, settings=settings
        )
        made.append([c.continuation.slice_notes(0, n_notes) for c in continuations])
        report(number + 1, len(places))
    return made


def by_ngram(
    ngram: NoteNgram,
    places: Sequence[Excerpt],
    tokenizer: Tokenizer,
    *,
    each: int,
    n_notes: int,
    seed: int,
) -> list[list[Performance]]:
    """The same by the n-gram, with the same temperature and min-p."""
    report = progress("generate n-gram")
    made: list[list[Performance]] = []
    for number, place in enumerate(places):
        header, prompt = place.prompt[: first_event(place.prompt, tokenizer)], place.notes
        made.append([])
        for variation in range(each):
            rng = np.random.default_rng([seed, number, variation])
            drawn = ngram.continue_notes(prompt, n_notes, rng, temperature=TEMPERATURE, min_p=MIN_P)
            whole = tokenizer.decode(ids_of(prompt + drawn, header, tokenizer))
            made[-1].append(whole.slice_notes(len(prompt), len(prompt) + len(drawn)))
        report(number + 1, len(places))
    return made


def statistics_of(performances: Sequence[Sequence[Performance]]) -> np.ndarray:
    """float64 [prompts, continuations, statistics]; nan where one is too short."""
    names = [field.name for field in fields(MusicStatistics)]
    found = np.full((len(performances), len(performances[0]), len(names)), np.nan)
    for i, row in enumerate(performances):
        for j, performance in enumerate(row):
            if len(performance.notes) >= MIN_NOTES:
                found[i, j] = list(asdict(music_statistics(performance)).values())
    return found


def distance(made_PxC: np.ndarray, real_P: np.ndarray, scale: float = 1.0) -> float:
    """Wasserstein-1 between one statistic's values in units of `scale`; nan without a scale."""
    from scipy.stats import wasserstein_distance

    made, real = made_PxC[~np.isnan(made_PxC)], real_P[~np.isnan(real_P)]
    if not len(made) or not len(real) or not scale > 0:
        return float("nan")
    return float(wasserstein_distance(made, real) / scale)


def distances(
    systems: Mapping[str, np.ndarray], real_PxS: np.ndarray
) -> dict[str, dict[str, list[float]]]:
    """Of each system and statistic: distance and its interval; and how much nearer than the n-gram.

    Args:
        systems: statistics, float [P, C, S]; real_PxS: of the real continuations.
    """
    names = [field.name for field in fields(MusicStatistics)]
    n = len(real_PxS)
    drawn = np.random.default_rng(0).integers(0, n, (BOOTSTRAPS, n))
    found: dict[str, dict[str, list[float]]] = {system: {} for system in systems}
    for s, name in enumerate(names):
        scale = float(np.nanstd(real_PxS[:, s]))  # of all: that of a resample may be 0
        resampled = {
            system: np.array([distance(x[d, :, s], real_PxS[d, s], scale) for d in drawn])
            for system, x in systems.items()
        }
        for system, x in systems.items():
            own = distance(x[:, :, s], real_PxS[:, s], scale)
            nearer = distance(systems[NGRAM][:, :, s], real_PxS[:, s], scale) - own
            low, high = normal_interval(own, resampled[system])
            found[system][name] = [own, max(low, 0.0), high, nearer]
            found[system][name] += normal_interval(nearer, resampled[NGRAM] - resampled[system])
    return found


def normal_interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """95 %: 1.96 standard deviations of resampled values to either side.

    Not their quantiles: a resample holds fewer different values, which makes every distance larger.
    """
    half = 1.96 * float(np.nanstd(resampled))
    return value - half, value + half


def nats_table(nats: Mapping[str, np.ndarray], notes_P: np.ndarray) -> list[list[str]]:
    """Of each system: nats per note, and how many fewer than the n-gram's, with intervals."""
    lines = [["system", "nats per note", "fewer than the n-gram"]]
    for system, nats_P in nats.items():
        own = "{:.3f} ({:.3f} to {:.3f})".format(*per_note(nats_P, notes_P))
        fewer = "{:+.3f} ({:+.3f} to {:+.3f})".format(*per_note(nats[NGRAM] - nats_P, notes_P))
        lines.append([system, own, "" if system == NGRAM else fewer])
    return lines


def distance_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """Statistics by system: distance to the real continuations, with intervals."""
    lines = [["distance to the real continuations", *found]]
    for name in next(iter(found.values())):
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*row[name][:3]) for row in found.values()]
        lines.append([name.replace("_", " "), *cells])
    return lines


def nearer_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """The same, how much nearer than the n-gram."""
    systems = [system for system in found if system not in (NGRAM, ELSEWHERE)]
    lines = [["nearer than the n-gram by", *systems]]
    for name in found[NGRAM]:
        cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*found[s][name][3:]) for s in systems]
        lines.append([name.replace("_", " "), *cells])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the evaluation and prints what it writes."""
    args = arguments().parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    loaded = opened(args.checkpoint)
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    tune, judged, names = held_out(args.shards, tokenizer, args.max_pieces)
    records = TokenShards(args.shards, "train", tokenizer)
    n_train = min(len(records), args.train_pieces or len(records))
    train = []
    report = progress("read")
    for i in np.random.default_rng(args.seed).permutation(len(records))[:n_train].tolist():
        train.append(notes_of(records[i].ids, tokenizer))
        report(len(train), n_train)
    ngram = NoteNgram.fit(train, [notes_of(ids, tokenizer) for ids in tune], min_count=2)
    del train
    notes = [notes_of(ids, tokenizer) for ids in judged]
    models = labels_of([args.checkpoint, *args.earlier])
    nats = {NGRAM: ngram.nats(notes)}
    nats |= {name: model_nats(path, judged, tokenizer) for name, path in models.items()}
    lines = nats_table(nats, np.array(list(map(len, notes))))
    parts = [
        f"{len(judged)} held-out pieces, {sum(map(len, notes)):,} notes; the n-gram counted "
        f"{n_train:,} pieces and was tuned on {len(tune)} others.\n",
        markdown(lines),
        "".join(f"- {name}: {how}\n" for name, how in ngram.settings.items()),
    ]
    result: dict = {"nats": {name: values.tolist() for name, values in nats.items()}}
    if args.prompts:
        sizes = {"prompt_notes": args.prompt_notes, "real_notes": args.notes}
        options = {"each": args.each, "n_notes": args.notes, "seed": args.seed}
        places, others = (
            excerpts(judged, names, tokenizer, n=args.prompts, seed=args.seed + k, **sizes)
            for k in range(2)
        )
        made = {NGRAM: by_ngram(ngram, places, tokenizer, **options)}
        made |= {
            name: by_model(path, places, tokenizer, **options) for name, path in models.items()
        }
        made[ELSEWHERE] = [[place.real] for place in others]
        systems = {system: statistics_of(rows) for system, rows in made.items()}
        found = distances(systems, statistics_of([[place.real] for place in places])[:, 0])
        short = {system: int(np.isnan(x[:, :, 0]).sum()) for system, x in systems.items()}
        parts += [
            f"{args.prompts} prompts of {args.prompt_notes} notes, {args.each} continuations of at "
            f"most {args.notes} notes each, temperature {TEMPERATURE}, min-p {MIN_P}, seed "
            f"{args.seed}. Shorter than {MIN_NOTES} notes, and not counted: "
            + ", ".join(f"{system} {n}" for system, n in short.items())
            + ".\n",
            markdown(distance_table(found)),
            markdown(nearer_table(found)),
        ]
        result |= {"distances": found, "short": short}
    parts.append(f"Made by `{' '.join(['python -m benchmarks.eval_continuation', *sys.argv[1:]])}` "
                 f"({program_version()}).\n")  # fmt: skip
    write_atomically(out / "results.md", "\n".join(parts))
    write_atomically(out / "results.json", json.dumps(result))
    print("\n".join(parts))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="folder of token shards with a validation split")
    parser.add_argument("--checkpoint", required=True, help="a language model")
    parser.add_argument(
        "--earlier", action="append", default=[], metavar="MODEL", help="another, or RUN@STEP"
    )
    parser.add_argument("--out", default="eval-out", help="folder for what it writes")
    parser.add_argument("--train-pieces", type=int, help="pieces that the n-gram counts (all)")
    parser.add_argument("--max-pieces", type=int, help="held-out pieces used (all)")
    parser.add_argument("--prompts", type=int, default=100, help="0: no continuations (100)")
    parser.add_argument("--each", type=int, default=2, help="continuations of a prompt (2)")
    parser.add_argument("--prompt-notes", type=int, default=120, help="notes of a prompt (120)")
    parser.add_argument("--notes", type=int, default=120, help="notes of a continuation (120)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"eval-continuation: {error}")
