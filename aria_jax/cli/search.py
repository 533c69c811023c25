"""`aria-jax search` and `aria-jax retrieve`: what is near in embeddings, and how rightly so."""

import argparse
from pathlib import Path
from typing import Any

from aria_jax.cli import (
    Verb,
    Writes,
    add_compat,
    add_overwrite,
    check_suffix,
    chosen_reading,
    numbers,
)

_SEARCH = """\
Embed a MIDI file as `aria-jax embed` embedded the others, and list the files (or slices) nearest
to it by cosine similarity, each with the share of random pairs of EMB that are further apart: what
is near depends on the model. Exact: a million rows are read in seconds. --index keeps the vectors
beside EMB, for many searches: "exact" finds the same in milliseconds, "ivf" (pip install
'aria-jax[search]') most of it among ten million rows and more, and says how much. --html writes a
page on which query and hits can be seen and played; it needs the MIDI files, and where EMB was made
of token shards, --midi says where they are.

examples:
  aria-jax search query.mid emb.parquet --checkpoint run2
  aria-jax search query.mid emb.parquet --checkpoint run2 -k 5 --html near.html"""


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax search`."""
    parser.add_argument("query", metavar="QUERY.mid", help="MIDI file to start from")
    parser.add_argument("embeddings", metavar="EMB", help="made by `aria-jax embed`")
    parser.add_argument("--checkpoint", required=True, help="the model that made EMB")
    parser.add_argument("-k", type=int, help="how many to list (10)")
    parser.add_argument(
        "--index",
        nargs="?",
        const="exact",
        choices=("exact", "ivf"),
        help="search in EMB.index, made the first time: exact (default), or ivf for very many rows",
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


def _search(args: argparse.Namespace) -> None:
    """Searches and prints."""
    import hashlib

    import numpy as np

    from aria_jax.cli.console import print_result, stage
    from aria_jax.embed.search import Searcher, random_similarities
    from aria_jax.embed.table import read_settings
    from data_pipeline.errors import UserError, about
    from data_pipeline.midi import compat_of, read_midi

    if args.html:
        check_suffix(args.html, "a page", ".html", ".htm")
    elif args.midi:
        raise UserError("--midi has no effect without --html FILE, the page that plays the files")
    if args.k is not None and args.k < 1:
        raise UserError(f"-k {args.k} must be at least 1")
    settings = read_settings(args.embeddings)
    reading = chosen_reading(args.compat, settings["reading"], args.embeddings)
    query = read_midi(args.query, compat=compat_of(reading))
    stage("loading jax and the model")
    from aria_jax.embed.encode import encoder_of

    with about(args.checkpoint):
        encoder = encoder_of(args.embeddings, args.checkpoint)
    stage("embedding the query, compiling first")
    with about(args.query):
        vector = encoder(query)
    stage(f"searching, making {args.embeddings}.index first" if args.index else "searching")
    searcher = Searcher(args.embeddings, args.index)
    stage("searching")
    hits = searcher(vector, args.k or 10)
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
    if args.html:
        stage("writing the page")
    warnings = _write_page(args, query, shown, settings) if args.html else []
    if len(shown) < (args.k or 0):
        warnings.append(f"-k {args.k}: {args.embeddings} has {len(shown)} rows, which are all here")
    if args.html:
        lines.append(f"page: {args.html}")
    if searcher.about_index:
        lines.append(f"index: {searcher.about_index}")
    index = searcher.about_index or None
    result = {"query": args.query, "hits": shown, "html": args.html, "index": index}
    print_result(result, args.json, "\n".join(lines), warnings)


SEARCH = Verb(
    _SEARCH,
    _search_arguments,
    _search,
    Writes(
        lambda args: [args.html] if args.html else [],
        ("query", "embeddings", "checkpoint", "midi"),
    ),
)


def _write_page(
    args: argparse.Namespace, query: Any, shown: list[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """Writes the page; says whose MIDI files it could not find."""
    from aria_jax.embed.table import read_origin
    from aria_jax.report import Provenance
    from aria_jax.report.listening import Found, write_search_page
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
    from data_pipeline.tokenizers import Tokenizer

    name, _, number = path.rpartition("#") if re.search(r"#\d+$", path) else (path, "", "")
    if not (folder / name).is_file():
        return None, None
    try:
        performance = read_midi(folder / name, compat=compat_of(settings["reading"]))
    except UserError:
        return None, None
    if number:
        start, n_notes = int(number) * settings["slice_notes"], settings["slice_notes"]
        performance = Tokenizer.preset(settings["tokenizer"]).with_tokens(performance)
        performance = performance.slice_notes(start, start + n_notes)
    return folder / name, resolve_pedal(performance)


_RETRIEVE = """\
How early a cosine search over embeddings finds what belongs together: mean reciprocal rank (MRR)
and Hit@k, over one set (each row searches all others) or two (--against).

--by path: does a slice find another slice of its own file? (embed with --per-slice)
--by composition (or any other label): does a performance find another performance of the same
composition? Rows of the same file do not count, neither for nor against.

examples:
  aria-jax retrieve slices.parquet --by path
  aria-jax retrieve emb.parquet --by composition --json
  aria-jax retrieve queries.parquet --against emb.parquet --by composition"""


def _retrieve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax retrieve`."""
    parser.add_argument("embeddings", metavar="EMB", help="Parquet or NPZ file of embeddings")
    parser.add_argument(
        "--by", default="path", help='"path" or the label that belongs together (default: path)'
    )
    parser.add_argument("--against", metavar="EMB2", help="search in this file instead")
    parser.add_argument("--metadata", help="labels to join by path (JSON or CSV)")
    parser.add_argument("-k", default="1,5,10", help="which Hit@k (default: 1,5,10)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def _retrieve(args: argparse.Namespace) -> None:
    """Measures and prints."""
    from dataclasses import asdict

    from aria_jax.cli.console import print_result, stage

    stage("reading the embeddings")
    from aria_jax.embed.search import retrieval
    from aria_jax.embed.table import read_embeddings, with_metadata
    from data_pipeline.errors import UserError, did_you_mean

    ks = numbers(args.k, "-k")
    if args.metadata and args.by == "path":
        raise UserError("--metadata has no effect without --by LABEL, one of those in it")
    paths = [args.embeddings, *([args.against] if args.against else [])]
    tables = [read_embeddings(path) for path in paths]
    if args.metadata:
        tables = [with_metadata(table, args.metadata) for table in tables]
    if len({table.embedding.shape[1] for table in tables}) > 1:
        raise UserError("the two files hold embeddings of different widths, so of two models")
    keys = []
    for path, table in zip(paths, tables, strict=True):
        labels = table.label_names()
        if args.by != "path" and args.by not in labels:
            hint, known = did_you_mean(args.by, labels), ", ".join(labels) or "none"
            raise UserError(f"{path}: no label {args.by!r}{hint}; it has {known}")
        keys.append(table.files() if args.by == "path" else table.column(args.by))
    names = tables[0].path
    if args.by == "path" and not args.against and len(set(keys[0])) == len(names):
        raise UserError(
            f"{args.embeddings}: one row a file, so none has another of its own to find; embed "
            "with --per-slice, search in another file with --against, or compare by a label: --by "
            + (" or ".join(tables[0].label_names()) or "LABEL")
        )
    stage("comparing every row with all others")
    apart = None if args.by == "path" else [table.files() for table in tables]
    result = retrieval(
        tables[0].embedding,
        keys[0],
        candidates_NxE=tables[1].embedding if args.against else None,
        candidate_keys=keys[-1],
        apart=apart[0] if apart else None,
        candidate_apart=apart[-1] if apart else None,
        ks=ks,
    )
    hits = "  ".join(f"Hit@{k} {share:.3f}" for k, share in result.hits.items())
    text = (
        f"MRR {result.mrr:.3f} (chance {result.chance_mrr:.3f})  {hits}  "
        f"median rank {result.median_rank:.0f}\n"
        f"{result.n_queries:,} queries by {args.by} among {result.n_candidates:,} rows"
    )
    if result.n_without:
        text += f"; {result.n_without:,} more have no relevant row to find"
    print_result({"by": args.by, **asdict(result)}, args.json, text)


RETRIEVE = Verb(_RETRIEVE, _retrieve_arguments, _retrieve)
