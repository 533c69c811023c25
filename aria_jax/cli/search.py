"""`aria-jax search`: the performances nearest to a query."""

import argparse
from pathlib import Path
from typing import Any

from aria_jax.cli.output import Writes, add_overwrite

DESCRIPTION = """\
Embed a MIDI file as `aria-jax embed` embedded the others, and list the files (or slices) nearest
to it by cosine similarity, each with the share of random pairs of EMB that are further apart: what
is near depends on the model. Exact, and fast enough for a million rows; --index keeps the vectors
beside EMB for many searches in a large file (pip install 'aria-jax[search]'). --html writes a page
on which query and hits can be seen and played; it needs the MIDI files, and where EMB was made of
token shards, --midi says where they are.

examples:
  aria-jax search query.mid emb.parquet --checkpoint run2
  aria-jax search query.mid emb.parquet --checkpoint run2 -k 5 --html near.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax search`."""
    from aria_jax.cli.console import add_compat

    parser.add_argument("query", metavar="QUERY.mid", help="MIDI file to start from")
    parser.add_argument("embeddings", metavar="EMB", help="made by `aria-jax embed`")
    parser.add_argument("--checkpoint", required=True, help="the model that made EMB")
    parser.add_argument("-k", type=int, default=10, help="how many to list (10)")
    parser.add_argument(
        "--index", action="store_true", help="search in EMB.faiss, made the first time"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a page to see and play what was found"
    )
    parser.add_argument(
        "--midi", metavar="DIR", help="where the MIDI files are (default: where they were embedded)"
    )
    add_compat(parser, "default: as the files of EMB were read")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


WRITES = Writes(
    lambda args: [args.html] if args.html else [],
    ("query", "embeddings", "checkpoint", "midi"),
)


def run(args: argparse.Namespace) -> None:
    """Searches and prints."""
    import hashlib

    import numpy as np

    from aria_jax.cli.console import chosen_reading, print_result
    from aria_jax.embed.search import random_similarities, search
    from aria_jax.embed.single import performance_encoder
    from aria_jax.embed.table import read_settings
    from data_pipeline.errors import UserError, check_file
    from data_pipeline.midi import compat_of, read_midi

    if args.k < 1:
        raise UserError(f"-k {args.k} must be at least 1")
    check_file(args.embeddings, "an embeddings file of `aria-jax embed`")
    settings = read_settings(Path(args.embeddings))
    if settings is None or "slice_notes" not in settings:
        raise UserError(f"{args.embeddings}: not made by `aria-jax embed`")
    reading = chosen_reading(args.compat, settings["reading"], args.embeddings)
    query = read_midi(args.query, compat=compat_of(reading))
    encoder = performance_encoder(
        args.checkpoint,
        slice_notes=settings["slice_notes"],
        max_tokens=settings["max_tokens"],
        pooling=settings.get("pooling", "eos"),
    )
    if encoder.fingerprint != settings["fingerprint"]:
        raise UserError(
            f"{args.embeddings} was made by another model than {args.checkpoint} "
            f"({settings['fingerprint']}, not {encoder.fingerprint}); embed the files again"
        )
    hits = search(encoder(query), args.embeddings, args.k, index=args.index)
    pairs = random_similarities(args.embeddings)
    digest = hashlib.sha256(Path(args.query).read_bytes()).hexdigest()
    shown = [
        {
            "rank": rank,
            "score": hit.score,
            "quantile": float(np.searchsorted(pairs, hit.score) / len(pairs))
            if len(pairs)
            else None,
            "path": hit.path,
            "labels": hit.labels,
            "same_file": hit.sha256 == digest,
        }
        for rank, hit in enumerate(hits, start=1)
    ]
    lines = ["     cosine  further apart"]
    for row in shown:
        share = "" if row["quantile"] is None else f"{row['quantile']:.1%}"
        itself = "  (the query itself)" if row["same_file"] else ""
        lines.append(f"{row['rank']:>3}  {row['score']:.4f}  {share:>13}  {row['path']}{itself}")
    warnings = _write_page(args, query, shown, settings) if args.html else []
    if args.html:
        lines.append(f"page: {args.html}")
    result = {"query": args.query, "hits": shown, "html": args.html}
    print_result(result, args.json, "\n".join(lines), warnings)


def _write_page(
    args: argparse.Namespace, query: Any, shown: list[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """Writes the page; says whose MIDI files it could not find."""
    from aria_jax.embed.table import read_origin
    from aria_jax.report.page import Provenance
    from aria_jax.report.search_page import Found, write_search_page
    from data_pipeline.midi import resolve_pedal

    origin = read_origin(Path(args.embeddings))
    folder = Path(args.midi or origin)
    found = []
    for row in shown:
        file, performance = _performance(folder, row["path"], settings)
        found.append(Found(**{k: row[k] for k in _ROW}, file=file, performance=performance))
    missing = (
        f"its MIDI file is not in {folder}; name the folder that was embedded, or of which the "
        "shards were made, with --midi DIR"
    )
    made_by = Provenance(
        args.command_line,
        {
            "embeddings": f"{args.embeddings}, made from {origin or 'an unknown place'}",
            "model": f"{args.checkpoint} ({settings['fingerprint']})",
            "slices": f"{settings['slice_notes']} notes, at most {settings['max_tokens']} tokens",
        },
    )
    write_search_page(
        args.html, Path(args.query), resolve_pedal(query), found, missing=missing, made_by=made_by
    )
    lost = sum(hit.performance is None for hit in found)
    return [f"{lost} of {len(found)} are on the page without music: {missing}"] * (lost > 0)


_ROW = ("score", "quantile", "path", "labels", "same_file")


def _performance(folder: Path, path: str, settings: dict[str, Any]) -> tuple[Path | None, Any]:
    """The file of a row, and what of it the row stands for; None if it cannot be read."""
    import re

    from data_pipeline.errors import UserError
    from data_pipeline.midi import compat_of, read_midi, resolve_pedal
    from data_pipeline.slices import with_tokens

    name, _, number = path.rpartition("#") if re.search(r"#\d+$", path) else (path, "", "")
    if not (folder / name).is_file():
        return None, None
    try:
        performance = read_midi(folder / name, compat=compat_of(settings["reading"]))
    except UserError:
        return None, None
    if number:
        start, n_notes = int(number) * settings["slice_notes"], settings["slice_notes"]
        performance = with_tokens(performance).slice_notes(start, start + n_notes)
    return folder / name, resolve_pedal(performance)
