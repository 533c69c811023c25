"""`aria-jax classify`: label files with a finetuned classifier."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DESCRIPTION = """\
Label every MIDI file of a folder or .tar (or every piece of token shards) with a model trained by
`aria-jax train classify`. Consecutive slices of 300 notes are classified, and a file gets the mean
of their probabilities, weighted by their tokens. Where the files have the label already (--label),
the answers are scored. Files that cannot be read are named; the rest goes on.

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
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Classifies and prints."""
    from aria_jax.cli.console import print_result
    from aria_jax.eval.classification import accuracy, macro_f1
    from aria_jax.eval.predict import Prediction, confusion_of
    from data_pipeline.errors import UserError

    if not Path(args.source).exists():
        raise UserError(f"{args.source}: no such folder or archive")
    names, found = _answers(args)
    answers = [
        one
        for one in found
        if isinstance(one, Prediction) and args.split in (None, one.labels.get("split"))
    ]
    rejected = [one for one in found if not isinstance(one, Prediction)]
    result: dict[str, Any] = {
        "n_files": len(answers),
        "n_rejected": len(rejected),
        "classes": list(names),
        "answers": {one.path: names[one.answer] for one in answers},
    }
    lines = [f"{one.path}: {names[one.answer]} ({one.probabilities.max():.2f})" for one in answers]
    lines += [f"{one.path}: not read ({one.message})" for one in rejected]
    if args.label:
        counts = confusion_of(answers, args.label, names)
        if not counts.sum():
            raise UserError(f"no file of {args.source} has a {args.label} of {', '.join(names)}")
        scores = {"accuracy": accuracy(counts), "macro_f1": macro_f1(counts)}
        result |= {**scores, "n_scored": int(counts.sum()), "confusion": counts.tolist()}
        lines.append(
            f"accuracy {scores['accuracy']:.3f}  macro-F1 {scores['macro_f1']:.3f}  "
            f"{counts.sum()} files with a known {args.label}"
        )
    if args.out:
        _write(Path(args.out), names, answers)
    print_result(result, args.json, "\n".join(lines))


def _answers(args: argparse.Namespace) -> tuple[tuple[str, ...], list[Any]]:
    """Names of the classes, and what was said of each file."""
    from aria_jax.checkpoints.models import load_model
    from aria_jax.cli.console import chosen_reading, progress_bar
    from aria_jax.cli.embed import reading_of_source
    from aria_jax.embed.encode import class_encoder
    from aria_jax.embed.pieces import Slicing, open_source
    from aria_jax.eval.predict import predict
    from aria_jax.sharding import local_mesh
    from data_pipeline.tokenizer import Tokenizer

    mesh = local_mesh()
    loaded = load_model(args.checkpoint, mesh=mesh)
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
    return loaded.config.class_names, found


def _write(out: Path, names: tuple[str, ...], answers: list[Any]) -> None:
    rows = [
        {
            "path": one.path,
            "answer": names[one.answer],
            "probabilities": dict(zip(names, one.probabilities.round(6).tolist(), strict=True)),
        }
        for one in answers
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
