"""`aria-jax probe`: how much a linear classifier reads from embeddings."""

import argparse

DESCRIPTION = """\
Fit a logistic regression (C by inner cross-validation) on frozen embeddings and score files it has
not seen. Performances of one composition are never on both sides where the labels name
compositions. Intervals are 95 %, bootstrapped over files.

examples:
  aria-jax probe emb.parquet --label composer
  aria-jax probe emb.parquet --label composer --split-column split --plot confusion.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax probe`."""
    parser.add_argument("embeddings", help="Parquet made by `aria-jax embed`")
    parser.add_argument("--label", required=True, help="which label to predict")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--cv", type=int, default=5, metavar="K", help="folds (default: 5)")
    side.add_argument(
        "--split-column", metavar="LABEL", help='label that is "train" for the files to learn from'
    )
    parser.add_argument(
        "--min-per-class", type=int, default=10, help="leave smaller classes out (10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (0)")
    parser.add_argument("--plot", metavar="FILE.png", help="save the confusion matrix")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args: argparse.Namespace) -> None:
    """Probes and prints."""
    from aria_jax.cli.console import print_result
    from aria_jax.embed.table import read_embeddings
    from aria_jax.eval.probe import probe
    from data_pipeline.errors import UserError

    table = read_embeddings(args.embeddings)
    labels = table.column(args.label)
    if not any(labels):
        names = sorted({name for row in table.labels for name in row})
        raise UserError(
            f"{args.embeddings}: no label {args.label!r}; it has {', '.join(names) or 'none'}"
        )
    compositions = table.column("composition")
    result = probe(
        table.embedding,
        labels,
        groups=[c or path for c, path in zip(compositions, table.path, strict=True)],
        splits=table.column(args.split_column) if args.split_column else None,
        folds=args.cv,
        min_per_class=args.min_per_class,
        seed=args.seed,
    )
    if args.plot:
        from aria_jax.report.charts import confusion_matrix

        title = f"{args.label}: {result.accuracy:.1%} of {result.n_test} files"
        confusion_matrix(result.confusion, result.classes, title).savefig(args.plot, dpi=130)
    shown = {
        "label": args.label,
        "accuracy": result.accuracy,
        "accuracy_ci": result.accuracy_ci,
        "macro_f1": result.macro_f1,
        "macro_f1_ci": result.macro_f1_ci,
        "majority_accuracy": result.majority_accuracy,
        "per_class_f1": result.per_class_f1,
        "classes": result.classes,
        "confusion": result.confusion.tolist(),
        "n_train": result.n_train,
        "n_test": result.n_test,
        "left_out": result.left_out,
    }
    low, high = result.accuracy_ci
    lines = [
        f"accuracy {result.accuracy:.3f} ({low:.3f} to {high:.3f})  "
        f"macro-F1 {result.macro_f1:.3f}  majority {result.majority_accuracy:.3f}  "
        f"{result.n_test} files held out"
    ]
    lines += [f"  {name:<16} F1 {f1:.3f}" for name, f1 in result.per_class_f1.items()]
    if result.left_out:
        small = ", ".join(f"{name} ({n})" for name, n in result.left_out.items())
        lines.append(f"left out, fewer than {args.min_per_class} files: {small}")
    print_result(shown, args.json, "\n".join(lines))
