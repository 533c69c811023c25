"""`aria-jax classify`: label files with a finetuned classifier."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aria_jax.cli.output import Writes, add_overwrite
from data_pipeline.artifact import write_atomically

if TYPE_CHECKING:
    from aria_jax.eval.predict import Prediction

DESCRIPTION = """\
Label every MIDI file of a folder or .tar (or every piece of token shards) with a model trained by
`aria-jax train classify`. Consecutive slices of 300 notes are classified, and a file gets the mean
of their probabilities, weighted by their tokens. Where the files have the label already (--label),
the predictions are scored, those about files that the model learnt from apart. Files that cannot be
read are named; the rest goes on.

examples:
  aria-jax classify my_midis --checkpoint run3/best
  aria-jax classify held_out --checkpoint run3/best --label composer --out answers.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax classify`."""
    from aria_jax.cli.console import add_compat
    from aria_jax.cli.embed import add_slicing

    parser.add_argument("source", help="folder of MIDI files, .tar of them, or token shards")
    parser.add_argument("--checkpoint", required=True, help="workdir of a classify run")
    parser.add_argument("--label", help="score the answers against this label of the files")
    parser.add_argument("--split", help='only pieces of this split of token shards, e.g. "val"')
    parser.add_argument("--out", metavar="FILE.jsonl", help="write a line a file: probabilities")
    parser.add_argument("--metadata", help="labels (default: metadata.json beside the files)")
    add_slicing(parser)
    add_compat(parser, "default: as the model's corpus was read")
    parser.add_argument(
        "--pooling", choices=("eos", "mean"), help="default: as the model was trained"
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes (1; 0: none)")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


WRITES = Writes(lambda args: [args.out] if args.out else [], ("source", "checkpoint", "metadata"))


def run(args: argparse.Namespace) -> None:
    """Classifies and prints."""
    from aria_jax.cli.console import check_suffix, print_result
    from aria_jax.eval.predict import Prediction
    from data_pipeline.errors import UserError

    if args.out:
        check_suffix(args.out, "a file of JSON lines", ".jsonl", ".json")
    if not Path(args.source).exists():
        raise UserError(f"{args.source}: no such folder or archive")
    names, corpus, found = _predictions(args)
    predictions = [
        one
        for one in found
        if isinstance(one, Prediction) and args.split in (None, one.labels.get("split"))
    ]
    rejected = [one for one in found if not isinstance(one, Prediction)]
    result: dict[str, Any] = {
        "n_files": len(predictions),
        "n_rejected": len(rejected),
        "classes": list(names),
        "answers": {one.path: names[one.predicted] for one in predictions},
    }
    lines = [
        f"{one.path}: {names[one.predicted]} ({one.probabilities.max():.2f})" for one in predictions
    ]
    lines += [f"{one.path}: not read ({one.message})" for one in rejected]
    warnings: list[str] = []
    if args.label:
        scores, more, warnings = _scores(args, names, corpus, predictions)
        result |= scores
        lines += more
    if args.out:
        _write(Path(args.out), names, predictions)
    print_result(result, args.json, "\n".join(lines), warnings)


def _scores(
    args: argparse.Namespace,
    names: tuple[str, ...],
    corpus: str,
    predictions: "list[Prediction]",
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Scores as JSON, lines and warnings; files that the model learnt from are apart."""
    from aria_jax.eval.predict import score_predictions, training_files
    from data_pipeline.errors import UserError

    warnings = []
    try:
        learnt = training_files(corpus) if corpus else frozenset()
    except UserError:
        learnt = frozenset()
        corpus = ""
    if not corpus:
        warnings.append(
            f"{args.checkpoint} does not say which files it learnt from, or they are gone: some of "
            "these may be among them"
        )
    seen = [one for one in predictions if one.sha256 in learnt]
    held_out = [one for one in predictions if one.sha256 not in learnt]
    groups = {
        "held out": score_predictions(held_out, args.label, names),
        "learnt from": score_predictions(seen, args.label, names),
    }
    found = {name: scores for name, scores in groups.items() if scores.n_scored}
    if not found:
        raise UserError(f"no file of {args.source} has a {args.label} of {', '.join(names)}")
    if n_seen := groups["learnt from"].n_scored:
        rest = "they are scored apart" if "held out" in found else "this says nothing of new files"
        warnings.append(f"the model learnt from {n_seen} of these files ({corpus}): {rest}")
    as_json = {
        name.replace(" ", "_"): {
            "accuracy": one.accuracy,
            "macro_f1": one.macro_f1,
            "n_scored": one.n_scored,
            "confusion": one.confusion.tolist(),
        }
        for name, one in found.items()
    }
    lines = [
        f"accuracy {one.accuracy:.3f}  macro-F1 {one.macro_f1:.3f}  {one.n_scored} files with a "
        f"known {args.label}" + (f" that the model {name}" if name == "learnt from" else "")
        for name, one in found.items()
    ]
    return {**next(iter(as_json.values())), **as_json}, lines, warnings


def _predictions(args: argparse.Namespace) -> tuple[tuple[str, ...], str, list[Any]]:
    """Names of the classes, the training corpus, and what is said of each file."""
    from aria_jax.checkpoints.models import load_model
    from aria_jax.cli.console import chosen_reading, progress_bar, stage
    from aria_jax.cli.embed import reading_of_source
    from aria_jax.embed.encode import class_encoder
    from aria_jax.embed.pieces import Slicing, open_source
    from aria_jax.eval.predict import predict
    from aria_jax.sharding import local_mesh
    from data_pipeline.tokenizer import Tokenizer

    mesh = local_mesh()
    stage("loading the model")
    loaded = load_model(args.checkpoint, mesh=mesh)
    stage("reading the files")
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    encode = class_encoder(loaded.model, pad_id, args.pooling or loaded.pooling, mesh=mesh)
    max_tokens = min(args.max_tokens, loaded.config.max_seq_len)
    reading = chosen_reading(args.compat, loaded.reading, args.checkpoint)
    slicing = Slicing(loaded.tokenizer, args.slice_notes, max_tokens, reading)
    with TemporaryDirectory() as folder, progress_bar("classify", "file") as progress:
        source = open_source(
            args.source, slicing, spool=Path(folder) / "spool", metadata=args.metadata
        )
        reading_of_source(args, source, reading)
        found = list(predict(source, encode, workers=args.workers, progress=progress))
    return loaded.config.class_names, loaded.corpus, found


def _write(out: Path, names: tuple[str, ...], predictions: list[Any]) -> None:
    rows = [
        {
            "path": one.path,
            "answer": names[one.predicted],
            "probabilities": dict(zip(names, one.probabilities.round(6).tolist(), strict=True)),
        }
        for one in predictions
    ]
    write_atomically(out, "".join(json.dumps(row) + "\n" for row in rows))
