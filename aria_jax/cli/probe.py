"""`aria-jax probe`: how much a simple classifier reads from embeddings."""

import argparse
from typing import Any

from aria_jax.cli.output import Writes, add_overwrite

DESCRIPTION = """\
Fit a classifier on frozen embeddings and score files it has not seen. Performances of one
composition are never on both sides where the labels name compositions. Intervals are 95 %,
bootstrapped over files. With rows per slice (`embed --per-slice`) it learns from slices and judges
files by the mean of theirs.

With --split-column it learns from "train" and judges each other split by itself, "test" first.

Classifiers: logistic (logistic regression, C by inner cross-validation), linear (a linear layer
trained as the reference trains it), knn (vote of the five nearest).

EMB may come from any model: Parquet with a column "embedding" of lists, or NPZ with an array
"embedding"; labels are its text columns, or --metadata joined by the column "path".

examples:
  aria-jax probe emb.parquet --label composer
  aria-jax probe emb.parquet --label composer --split-column split --plot confusion.png
  aria-jax probe emb.parquet --label pianist --classifier knn --few-shot 1,2,5,10
  aria-jax probe mert.npz --label composer --metadata midis/metadata.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax probe`."""
    parser.add_argument("embeddings", metavar="EMB", help="Parquet or NPZ file of embeddings")
    parser.add_argument("--label", required=True, help="which label to predict")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--cv", type=int, default=5, metavar="K", help="folds (default: 5)")
    side.add_argument(
        "--split-column", metavar="LABEL", help='label that is "train" for the files to learn from'
    )
    parser.add_argument(
        "--classifier", "--readout", choices=("logistic", "linear", "knn"), default="logistic"
    )
    parser.add_argument("--metadata", help="labels to join by path (JSON or CSV)")
    parser.add_argument(
        "--group-column", default="composition", help="label kept on one side (composition)"
    )
    parser.add_argument(
        "--min-per-class", type=int, default=10, help="leave smaller classes out (10)"
    )
    parser.add_argument(
        "--few-shot", metavar="N,N,…", help="also the score from so many files of each class"
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (0)")
    parser.add_argument("--plot", metavar="FILE.png", help="save the confusion matrix")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


WRITES = Writes(lambda args: [args.plot] if args.plot else [], ("embeddings", "metadata"))


def run(args: argparse.Namespace) -> None:
    """Probes and prints."""
    from dataclasses import asdict

    from aria_jax.cli.console import numbers, print_result, progress_bar
    from aria_jax.embed.table import read_embeddings, with_metadata
    from aria_jax.eval.probe import few_shot, held_out_splits, probe
    from data_pipeline.errors import UserError, did_you_mean

    if args.cv < 2:
        raise UserError(f"--cv {args.cv}: at least 2 folds are needed")
    table = read_embeddings(args.embeddings)
    if args.metadata:
        table = with_metadata(table, args.metadata)
    names = table.label_names()
    for wanted in filter(None, (args.label, args.split_column)):
        if wanted not in names:
            hint, known = did_you_mean(wanted, names), ", ".join(names) or "none"
            raise UserError(f"{args.embeddings}: no label {wanted!r}{hint}; it has {known}")
    files = table.files()
    groups = [c or f for c, f in zip(table.column(args.group_column), files, strict=True)]
    splits = table.column(args.split_column) if args.split_column else None
    options = {
        "groups": groups,
        "splits": splits,
        "files": files,
        "folds": args.cv,
        "min_per_class": args.min_per_class,
        "seed": args.seed,
    }
    labels = table.column(args.label)
    judged = held_out_splits(splits) if splits else [None]
    by_split = {}
    for split in judged or [None]:
        with progress_bar("probe", "fold") as progress:
            by_split[split] = probe(
                table.embedding,
                labels,
                classifier=args.classifier,
                judge=split,
                progress=progress,
                **options,
            )
    result = next(iter(by_split.values()))
    curve = []
    if args.few_shot:
        curve = few_shot(table.embedding, labels, numbers(args.few_shot, "--few-shot"), **options)
    if args.plot:
        from aria_jax.report.charts import confusion_matrix
        from aria_jax.report.page import program_version

        title = f"{args.label}: {result.accuracy:.1%} of {result.n_test} files"
        figure = confusion_matrix(result.confusion, result.classes, title)
        made_by = f"{args.command_line} ({program_version()})"
        figure.text(0.01, -0.02, made_by, fontsize=6, color="#777777")
        figure.savefig(args.plot, dpi=130, bbox_inches="tight")
    shown = {
        "label": args.label,
        "classifier": args.classifier,
        **result.summary(),
        "per_class_f1": result.per_class_f1,
        "few_shot": [asdict(point) for point in curve],
        "splits": {name: r.summary() for name, r in by_split.items() if name is not None},
    }
    texts = [_text(r, curve if r is result else [], args) for r in by_split.values()]
    print_result(shown, args.json, "\n\n".join(texts))


def _text(result: Any, curve: list, args: argparse.Namespace) -> str:
    low, high = result.accuracy_ci
    lines = [f"split {result.split}:"] if result.split is not None else []
    lines += [
        f"accuracy {result.accuracy:.3f} ({low:.3f} to {high:.3f})  "
        f"macro-F1 {result.macro_f1:.3f} ({result.macro_f1_ci[0]:.3f} to "
        f"{result.macro_f1_ci[1]:.3f})  majority {result.majority_accuracy:.3f}  "
        f"{result.n_test} files held out",
        f"  {'':<16} {'precision':>9} {'recall':>7} {'F1':>6} {'files':>6}",
    ]
    lines += [
        f"  {name:<16} {row['precision']:9.3f} {row['recall']:7.3f} {row['f1']:6.3f} {row['n']:6}"
        for name, row in result.per_class.items()
    ]
    for point in curve:
        lines.append(
            f"  from {point.shots:>3} files of each class: accuracy {point.accuracy:.3f} "
            f"± {point.accuracy_std:.3f}, macro-F1 {point.macro_f1:.3f}"
        )
    if result.left_out:
        small = ", ".join(f"{name} ({n})" for name, n in result.left_out.items())
        lines.append(f"left out, fewer than {args.min_per_class} files: {small}")
    if result.shared_groups:
        lines.append(
            f"beware: {result.shared_groups} compositions are on both sides of this split; "
            "without --split-column they are kept apart"
        )
    return "\n".join(lines)
