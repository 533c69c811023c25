"""`aria-jax retrieve`: retrieval metrics of embeddings."""

import argparse

DESCRIPTION = """\
How early a cosine search over embeddings finds what belongs together: mean reciprocal rank (MRR)
and Hit@k, over one set (each row searches all others) or two (--against).

--by path: does a slice find another slice of its own file? (embed with --per-slice)
--by composition (or any other label): does a performance find another performance of the same
composition? Rows of the same file do not count, neither for nor against.

examples:
  aria-jax retrieve slices.parquet --by path
  aria-jax retrieve emb.parquet --by composition --json
  aria-jax retrieve queries.parquet --against emb.parquet --by composition"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax retrieve`."""
    parser.add_argument("embeddings", metavar="EMB", help="Parquet or NPZ file of embeddings")
    parser.add_argument(
        "--by", default="path", help='"path" or the label that belongs together (default: path)'
    )
    parser.add_argument("--against", metavar="EMB2", help="search in this file instead")
    parser.add_argument("--metadata", help="labels to join by path (JSON or CSV)")
    parser.add_argument("-k", default="1,5,10", help="which Hit@k (default: 1,5,10)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    from dataclasses import asdict

    from aria_jax.cli.console import numbers, print_result
    from aria_jax.embed.table import read_embeddings, with_metadata
    from aria_jax.eval.retrieval import retrieval
    from data_pipeline.errors import UserError, did_you_mean

    ks = numbers(args.k, "-k")
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
        text += f"; {result.n_without:,} more have no right answer to find"
    print_result({"by": args.by, **asdict(result)}, args.json, text)
