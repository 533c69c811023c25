"""`aria-jax score`: negative log-likelihood of performances under a model."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Negative log-likelihood of performances under a language model, in nats: the lower, the more the
model expected them. Pieces longer than the model's context are read in overlapping windows.

Takes MIDI files, folders of them, and token ids as JSON. A file that is not there or cannot be
read is named and left out, and the exit status is then 1 (2 where nothing is left). --json prints
one line per file:
{"path", "mean_nll", "n_tokens", "nll": [per token, from the second on], "notes": [per note]}.

examples:
  aria-jax score nocturne.mid waltz.mid --checkpoint run1
  aria-jax score my_midis --checkpoint run1 --json > scores.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax score`."""
    from aria_jax.cli.console import add_compat

    parser.add_argument("files", nargs="+", metavar="FILE", help="MIDI file, folder or IDS.json")
    parser.add_argument("--checkpoint", required=True, metavar="C", help="workdir of a run")
    parser.add_argument("--context", type=int, help="tokens a window holds (the model's)")
    add_compat(parser, "default: as the model's corpus was read")
    parser.add_argument("--json", action="store_true", help="one JSON line per file")


def run(args: argparse.Namespace) -> int:
    """Scores; 1 where some file was left out."""
    from data_pipeline.errors import UserError

    paths, left_out = _listed(args.files)
    if not paths:
        raise UserError("nothing to score: " + "; ".join(left_out))
    from aria_jax.checkpoints.models import load_model
    from aria_jax.cli.console import chosen_reading, note, print_result, progress_bar, stage
    from aria_jax.generate.score import check_piece, score_pieces
    from data_pipeline.midi import compat_of
    from data_pipeline.tokenizer import Tokenizer

    stage("loading the model")
    loaded = load_model(args.checkpoint)
    tokenizer = Tokenizer.preset(loaded.tokenizer)
    compat = compat_of(chosen_reading(args.compat, loaded.reading, args.checkpoint))
    stage("reading the files")
    pieces, named = [], []
    for path in paths:
        try:
            ids = _read(path, tokenizer, compat)
            check_piece(ids, loaded.config.vocab_size)
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
    with progress_bar("score", "token") as progress:
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
        }
        text = f"{score.mean_nll:7.4f} nats/token  {len(score.nll):6d} tokens  {path}"
        print_result(result, args.json, text)
    if left_out:
        note(f"{len(left_out)} of {n_named} files left out")
    return 1 if left_out else 0


def _listed(names: list[str]) -> tuple[list[Path], list[str]]:
    """Files, with folders replaced by the MIDI files in them; and what is not there."""
    from data_pipeline.building.sources import no_midi_files, walk_folder

    paths: list[Path] = []
    left_out = []
    for name in map(Path, names):
        if name.is_dir():
            inside = list(walk_folder(name))
            paths += [name / entry.path for entry in inside if not entry.fault]
            left_out += [
                f"{name / entry.path}: {entry.fault} ({entry.detail})"
                for entry in inside
                if entry.fault
            ]
            if not inside:
                left_out.append(str(no_midi_files(name)))
        elif name.is_file():
            paths.append(name)
        else:
            left_out.append(f"{name}: no such file")
    return paths, left_out


def _read(path: Path, tokenizer, compat: str | None):
    """Ids of a MIDI or JSON file."""
    from aria_jax.cli.generate import read_ids
    from data_pipeline.midi import read_midi

    if path.suffix.lower() == ".json":
        return read_ids(str(path))
    return tokenizer.encode(read_midi(path, compat=compat)).astype(int)
