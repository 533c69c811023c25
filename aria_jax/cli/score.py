"""`aria-jax score` and `aria-jax classify`: what a model says of performances."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aria_jax.cli import Verb, Writes, add_compat, add_overwrite, check_suffix, chosen_reading
from data_pipeline.artifact import write_atomically

if TYPE_CHECKING:
    import numpy as np

    from aria_jax.eval.classifiers import Prediction
    from data_pipeline.tokenizers import Tokenizer

_SCORE = """\
Negative log-likelihood of performances under a language model, in nats: the lower, the more the
model expected them. Pieces longer than the model's context are read in overlapping windows.

Takes MIDI files, folders of them, and token ids as JSON. A file that is not there or cannot be
read is named and left out, and the exit status is then 1 (2 where nothing is left). --json prints
one line per file:
{"path", "mean_nll", "n_tokens", "nll": [per token, from the second on], "notes": [per note]}.

examples:
  aria-jax score nocturne.mid waltz.mid --checkpoint run1
  aria-jax score my_midis --checkpoint run1 --json > scores.jsonl"""


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax score`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="MIDI file, folder or IDS.json")
    parser.add_argument("--checkpoint", required=True, metavar="C", help="workdir of a run")
    parser.add_argument("--context", type=int, help="tokens a window holds (the model's)")
    add_compat(parser, "default: as the model's corpus was read")
    parser.add_argument("--json", action="store_true", help="one JSON line per file")


def _score(args: argparse.Namespace) -> int:
    """Scores; 1 where some file was left out."""
    from aria_jax.cli.convert import listed_midi
    from data_pipeline.errors import UserError, about

    if args.context is not None and args.context < 2:
        raise UserError(
            f"--context {args.context}: a context of {args.context} predicts nothing; use 2 or more"
        )
    paths, left_out = listed_midi(args.files)
    if not paths:
        raise UserError("nothing to score: " + "; ".join(left_out))
    from aria_jax.cli.console import note, print_result, progress_bar, stage

    stage("loading jax")
    from aria_jax.checkpoints.models import load_model
    from aria_jax.generate.score import check_piece, score_pieces
    from data_pipeline.midi import compat_of
    from data_pipeline.tokenizers import Tokenizer

    stage("loading the model")
    loaded = load_model(args.checkpoint)
    if (args.context or 0) > loaded.config.max_seq_len:
        raise UserError(
            f"--context {args.context}: {args.checkpoint} sees {loaded.config.max_seq_len} tokens; "
            "longer pieces are read in overlapping windows"
        )
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    compat = compat_of(chosen_reading(args.compat, loaded.reading, args.checkpoint))
    stage("reading the files")
    pieces, named = [], []
    for path in paths:
        try:
            ids = _read(path, tokenizer, compat)
            check_piece(ids, loaded.config, tokenizer)
        except UserError as error:
            text = str(error)
            left_out.append(text if text.startswith(str(path)) else f"{path}: {text}")
            continue
        pieces.append(ids)
        named.append(path)
    for text in left_out:
        note(f"left out: {text}")
    n_named = len(pieces) + len(left_out)
    if not pieces:
        raise UserError(f"none of the {n_named} files could be read")
    stage("compiling")
    with about(args.checkpoint), progress_bar("score", "token") as progress:
        scores = score_pieces(
            loaded.model, tokenizer, pieces, context=args.context, progress=progress
        )
    for path, score in zip(named, scores, strict=True):
        result = {
            "path": str(path),
            "mean_nll": score.mean_nll,
            "n_tokens": len(score.nll),
            "nll": score.nll.tolist(),
            "notes": score.notes,
            "by_instrument": score.by_instrument,
        }
        text = f"{score.mean_nll:7.4f} nats/token  {len(score.nll):6d} tokens  {path}"
        if len(score.by_instrument) > 1:
            rows = score.by_instrument.items()
            each = (f"{name} {one['nats_per_note']:.2f} ({one['n_notes']:,})" for name, one in rows)
            text += f"\n        nats/note (notes): {', '.join(each)}"
        print_result(result, args.json, text)
    if left_out:
        note(f"{len(left_out)} of {n_named} files left out")
    return 1 if left_out else 0


SCORE = Verb(_SCORE, _score_arguments, _score)


def _read(path: Path, tokenizer: "Tokenizer", compat: str | None) -> "np.ndarray":
    """Ids of a MIDI or JSON file."""
    from aria_jax.cli.convert import read_ids
    from data_pipeline.midi import read_midi

    if path.suffix.lower() == ".json":
        return read_ids(str(path))
    return tokenizer.encode(read_midi(path, compat=compat)).astype(int)


_CLASSIFY = """\
Label every MIDI file of a folder or .tar (or every piece of token shards) with a model trained by
`aria-jax train classify`. Consecutive slices of 300 notes are classified, and a file gets the mean
of their probabilities, weighted by their tokens. Where the files have the label already (--label),
the predictions are scored, those about files that the model learnt from apart. Files that cannot be
read are named; the rest goes on.

examples:
  aria-jax classify my_midis --checkpoint run3/best
  aria-jax classify held_out --checkpoint run3/best --label composer --out predictions.jsonl"""


def _classify_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax classify`."""
    from aria_jax.cli.embed import add_slicing

    parser.add_argument("source", help="folder of MIDI files, .tar of them, or token shards")
    parser.add_argument("--checkpoint", required=True, help="workdir of a classify run")
    parser.add_argument("--label", help="score the predictions against this label of the files")
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


def _classify(args: argparse.Namespace) -> None:
    """Classifies and prints."""
    from aria_jax.cli.console import print_result, stage
    from aria_jax.cli.embed import check_slicing
    from data_pipeline.errors import UserError

    check_slicing(args)
    if args.out:
        check_suffix(args.out, "a file of JSON lines", ".jsonl", ".json")
    if args.metadata and not args.label and not args.split:
        raise UserError("--metadata has no effect without --label or --split, which are read there")
    if not Path(args.source).exists():
        raise UserError(f"{args.source}: no such folder or archive")
    stage("loading jax")
    from aria_jax.eval.classifiers import Prediction

    names, corpus, found = _predictions(args)
    predictions = [
        one
        for one in found
        if isinstance(one, Prediction) and args.split in (None, one.labels.get("split"))
    ]
    rejected = [one for one in found if not isinstance(one, Prediction)]
    if not predictions:
        raise UserError(f"{args.source}: {_no_predictions(args.split, found, rejected)}")
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


CLASSIFY = Verb(
    _CLASSIFY,
    _classify_arguments,
    _classify,
    Writes(
        lambda args: [args.out] if args.out else [],
        ("source", "checkpoint", "metadata"),
        source="source",
    ),
)


def _no_predictions(split: str | None, found: list[Any], rejected: list[Any]) -> str:
    """Why nothing is said of any file."""
    if len(rejected) == len(found):
        first = f", the first: {rejected[0].path} ({rejected[0].message})" if rejected else ""
        return f"none of the {len(found)} files could be read{first}"
    there = sorted({one.labels["split"] for one in found if one.labels.get("split")})
    known = f"there are {' and '.join(there)}" if there else "no file has a label split"
    return f"--split {split}: no file of it; {known}"


def _scores(
    args: argparse.Namespace,
    names: tuple[str, ...],
    corpus: str,
    predictions: "list[Prediction]",
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Scores as JSON, lines and warnings; files that the model learnt from are apart."""
    from aria_jax.eval.classifiers import score_predictions
    from data_pipeline.errors import UserError
    from data_pipeline.shards import TokenShards

    warnings = []
    learnt: set[str] = set()
    try:
        if corpus:
            shards = TokenShards(corpus, "train")
            learnt = {shards[i].meta["sha256"] for i in range(len(shards))}
    except UserError:
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
    found = {name: scores for name, scores in groups.items() if scores is not None}
    if not found:
        raise UserError(f"no file of {args.source} has a {args.label} of {', '.join(names)}")
    if "learnt from" in found:
        n_seen = found["learnt from"]["n_scored"]
        rest = "they are scored apart" if "held out" in found else "this says nothing of new files"
        warnings.append(f"the model learnt from {n_seen} of these files ({corpus}): {rest}")
    as_json = {name.replace(" ", "_"): one for name, one in found.items()}
    lines = [
        f"accuracy {one['accuracy']:.3f}  macro-F1 {one['macro_f1']:.3f}  {one['n_scored']} files "
        f"with a known {args.label}" + (f" that the model {name}" if name == "learnt from" else "")
        for name, one in found.items()
    ]
    return {**next(iter(as_json.values())), **as_json}, lines, warnings


def _predictions(args: argparse.Namespace) -> tuple[tuple[str, ...], str, list[Any]]:
    """Names of the classes, the training corpus, and what is said of each file."""
    from aria_jax.checkpoints.models import load_model
    from aria_jax.cli.console import progress_bar, stage
    from aria_jax.cli.embed import reading_of_source
    from aria_jax.embed.encode import class_encoder, slicing_of
    from aria_jax.embed.pieces import open_source
    from aria_jax.eval.classifiers import predict
    from aria_jax.sharding import local_mesh
    from data_pipeline.errors import about
    from data_pipeline.tokenizers import Tokenizer

    mesh = local_mesh()
    stage("loading the model")
    loaded = load_model(args.checkpoint, mesh=mesh)
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    with about(args.checkpoint):
        encode = class_encoder(loaded.model, pad_id, args.pooling or loaded.pooling, mesh=mesh)
    reading = chosen_reading(args.compat, loaded.reading, args.checkpoint)
    slicing = slicing_of(loaded, args.slice_notes, args.max_tokens, reading)
    stage("reading the files, compiling")
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
