"""`aria-jax search`: the performances nearest to a query."""

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Embed a MIDI file as `aria-jax embed` embedded the others, and list the files (or slices) nearest
to it by cosine similarity. Exact, and fast enough for a million rows; --index keeps the vectors
beside EMB for many searches in a large file (pip install 'aria-jax[search]'). --html writes a page
with piano rolls.

examples:
  aria-jax search query.mid emb.parquet --checkpoint run2
  aria-jax search query.mid emb.parquet --checkpoint run2 -k 5 --html near.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax search`."""
    parser.add_argument("query", metavar="QUERY.mid", help="MIDI file to start from")
    parser.add_argument("embeddings", metavar="EMB", help="made by `aria-jax embed`")
    parser.add_argument("--checkpoint", required=True, help="the model that made EMB")
    parser.add_argument("-k", type=int, default=10, help="how many to list (10)")
    parser.add_argument(
        "--index", action="store_true", help="search in EMB.faiss, made the first time"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with piano rolls")
    parser.add_argument(
        "--midi", metavar="DIR", help="where the MIDI files are (default: where they were embedded)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Searches and prints."""
    import hashlib

    from aria_jax.cli.console import print_result
    from aria_jax.embed.search import search
    from aria_jax.embed.single import performance_encoder
    from aria_jax.embed.table import read_settings
    from data_pipeline.errors import UserError
    from data_pipeline.midi import read_midi

    if args.k < 1:
        raise UserError(f"-k {args.k} must be at least 1")
    query = read_midi(args.query)
    settings = read_settings(Path(args.embeddings))
    if settings is None or "slice_notes" not in settings:
        raise UserError(f"{args.embeddings}: not made by `aria-jax embed`")
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
    digest = hashlib.sha256(Path(args.query).read_bytes()).hexdigest()
    if args.html:
        _write_page(args, query, hits, digest, settings["slice_notes"])
    shown = [
        {
            "rank": rank,
            "score": hit.score,
            "path": hit.path,
            "labels": hit.labels,
            "same_file": hit.sha256 == digest,
        }
        for rank, hit in enumerate(hits, start=1)
    ]
    lines = [
        f"{row['rank']:>3}  {row['score']:.4f}  {row['path']}"
        + ("  (the query itself)" if row["same_file"] else "")
        for row in shown
    ]
    if args.html:
        lines.append(f"page: {args.html}")
    print_result(
        {"query": args.query, "hits": shown, "html": args.html}, args.json, "\n".join(lines)
    )


def _write_page(args: argparse.Namespace, query: Any, hits: list, digest: str, notes: int) -> None:
    from aria_jax.embed.table import read_origin
    from aria_jax.report.search_page import Found, write_search_page

    folder = Path(args.midi or read_origin(Path(args.embeddings)))
    found = [
        Found(
            score=hit.score,
            path=hit.path,
            labels=hit.labels,
            performance=_performance(folder, hit.path, notes),
            same_file=hit.sha256 == digest,
        )
        for hit in hits
    ]
    write_search_page(args.html, Path(args.query).name, query, found)


def _performance(folder: Path, path: str, slice_notes: int) -> Any:
    """The file, or the slice of it, that a row stands for; None if it cannot be read."""
    import re

    from data_pipeline.errors import UserError
    from data_pipeline.midi import read_midi
    from data_pipeline.slices import with_tokens

    name, _, number = path.rpartition("#") if re.search(r"#\d+$", path) else (path, "", "")
    if not (folder / name).is_file():
        return None
    try:
        performance = read_midi(folder / name)
    except UserError:
        return None
    if not number:
        return performance
    return with_tokens(performance).slice_notes(
        int(number) * slice_notes, (int(number) + 1) * slice_notes
    )
