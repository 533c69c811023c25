"""`aria-jax probe` and `aria-jax bench-suite`: what simple classifiers read from embeddings."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aria_jax.cli import Verb, Writes, add_overwrite, numbers, warn_of_reading
from data_pipeline.artifact import write_atomically

_PROBE = """\
Fit a classifier on frozen embeddings and score files it has not seen. Performances of one
composition are never on both sides where the labels name compositions. Intervals are 95 %,
bootstrapped over compositions; with --seeds, scores are means over so many seeds. With rows per
slice (`embed --per-slice`) it learns from slices and judges files by the mean of theirs.

With --split-column it learns from "train" and judges each other split by itself, "test" first.

Classifiers: logistic (logistic regression, C by inner cross-validation), forest (a random forest),
best (the better of these two in inner validation), linear (a linear layer trained as the reference
trains it), knn (vote of the five nearest).

EMB may come from any model: Parquet with a column "embedding" of lists, or NPZ with an array
"embedding"; labels are its text columns, or --metadata joined by the column "path".

examples:
  aria-jax probe emb.parquet --label composer
  aria-jax probe emb.parquet --label composer --split-column split --plot confusion.png
  aria-jax probe emb.parquet --label pianist --classifier knn --few-shot 1,2,5,10
  aria-jax probe mert.npz --label composer --metadata midis/metadata.json"""


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax probe`."""
    parser.add_argument("embeddings", metavar="EMB", help="Parquet or NPZ file of embeddings")
    parser.add_argument("--label", required=True, help="which label to predict")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--cv", type=int, default=5, metavar="K", help="folds (default: 5)")
    side.add_argument(
        "--split-column", metavar="LABEL", help='label that is "train" for the files to learn from'
    )
    _add_classifier(parser, "logistic")
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
    _add_seeds(parser, 1)
    parser.add_argument("--plot", metavar="FILE.png", help="save the confusion matrix")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def _add_classifier(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --classifier."""
    parser.add_argument(
        "--classifier",
        "--readout",
        choices=("logistic", "forest", "best", "linear", "knn"),
        default=default,
        help=f"default: {default}",
    )


def _add_seeds(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds --seeds and --seed."""
    parser.add_argument(
        "--seeds", type=int, default=default, help=f"how many to take the mean over ({default})"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first; of folds and bootstrap (0)")


def _probe(args: argparse.Namespace) -> None:
    """Probes and prints."""
    from dataclasses import asdict

    from aria_jax.cli.console import print_result, progress_bar, stage

    stage("loading the libraries")
    from aria_jax.embed.table import read_embeddings, with_metadata
    from aria_jax.eval.probe import few_shot, held_out_splits, probe
    from aria_jax.report import check_picture, confusion_matrix, save_chart
    from data_pipeline.errors import UserError, did_you_mean

    if args.plot:
        check_picture(args.plot)
    if args.cv < 2 or args.seeds < 1:
        raise UserError(f"--cv {args.cv}, --seeds {args.seeds}: at least 2 folds and 1 seed")
    shots = numbers(args.few_shot, "--few-shot") if args.few_shot else None
    stage("reading the embeddings")
    table = read_embeddings(args.embeddings)
    if args.metadata:
        table = with_metadata(table, args.metadata)
    names = table.label_names()
    # No compositions are no mistake; another label that is not there is one.
    grouped = args.group_column.replace("composition", "")
    for wanted in filter(None, (args.label, args.split_column, grouped)):
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
    stage("fitting")
    by_split = {}
    for split in judged or [None]:
        with progress_bar("probe", "fold") as progress:
            by_split[split] = probe(
                table.embedding,
                labels,
                classifier=args.classifier,
                repeats=args.seeds,
                judge=split,
                progress=progress,
                **options,
            )
    result = next(iter(by_split.values()))
    curve = few_shot(table.embedding, labels, shots, **options) if shots else []
    if args.plot:
        title = f"{args.label}: {result.accuracy:.1%} of {result.n_test} files"
        figure = confusion_matrix(result.confusion, result.classes, title)
        save_chart(figure, args.plot, args.command_line)
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


PROBE = Verb(
    _PROBE,
    _probe_arguments,
    _probe,
    Writes(lambda args: [args.plot] if args.plot else [], ("embeddings", "metadata")),
)


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
            + (f" (the smallest class has {point.fewest})" * (point.fewest < point.shots))
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


_BENCH_SUITE = """\
Find every task that labels make possible (genre, form, period, composer, pianist, emotion; one data
set per top folder), embed the files, probe each task, and print one table of accuracy and macro-F1
in the shape of the paper's, published figures below them and marked as quoted; then how far each
feature set is from the handcrafted note statistics and from the untrained network, with intervals.

Sources are folders and archives, read in place; one whose metadata file is for all of its files is
one data set. Feature sets: pitch-class histogram and handcrafted note statistics (always); with
--checkpoint the model, the model with the statistics beside it, and the same network untrained;
with --embeddings NAME=FILE any other model's. Data sets of one genre each make one task together.

Labels come from metadata files beside the MIDI files, {category: {split: {path: label}}} among the
layouts. A published split, there or as a label "split" of the files, is used, and judged on "test"
where it has one (--cross-validate NAME: not that of this data set); otherwise cross-validation that
keeps compositions together, five times with other seeds (--folds, --seeds). Of PiJAMA the pianists
of 20 pieces or more are taken, of GiantMIDI the 30 most frequent composers. By default each feature
set has the better of logistic regression and a random forest, chosen by inner validation.

examples:
  aria-jax bench-suite benchmarks_dir --out suite --checkpoint run2
  aria-jax bench-suite benchmarks_dir --checkpoint run2 --embeddings MERT=mert.parquet
  aria-jax bench-suite asap pijama.tar.xz giantmidi.tar.xz --max-per-class 200 --checkpoint run2"""


MODEL = "aria_jax"
"""The row of the model."""


def _bench_suite_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax bench-suite`."""
    from aria_jax.cli.embed import add_pool_slices, add_slicing

    parser.add_argument("sources", nargs="+", metavar="DIR_OR_ARCHIVE", help="labelled MIDI files")
    parser.add_argument("--out", default="bench-out", help="folder for embeddings and the table")
    parser.add_argument("--checkpoint", help="workdir of a contrastive run")
    parser.add_argument(
        "--embeddings", action="append", default=[], metavar="NAME=FILE", help="another model's"
    )
    _add_classifier(parser, "best")
    parser.add_argument("--folds", type=int, default=5, help="of cross-validation (5)")
    _add_seeds(parser, 5)
    parser.add_argument(
        "--cross-validate",
        action="append",
        default=[],
        metavar="NAME",
        help="data set whose published split is not used",
    )
    parser.add_argument("--metadata", help="labels (default: metadata files beside the MIDI files)")
    add_slicing(parser)
    add_pool_slices(parser)
    parser.add_argument(
        "--pooling", choices=("eos", "mean"), help="default: as the model was trained"
    )
    parser.add_argument(
        "--min-per-class", type=int, default=10, help="leave smaller classes out (10)"
    )
    parser.add_argument(
        "--max-per-class", type=int, metavar="N", help="draw so many files of a class, at most"
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes (1; 0: none)")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def _bench_suite(args: argparse.Namespace) -> None:
    """Embeds, probes and prints."""
    import numpy as np

    from aria_jax.cli.console import print_result, progress_bar, stage

    stage("loading the libraries")
    from aria_jax.cli.embed import check_slicing, counting, slicing_in
    from aria_jax.embed.encode import trained_and_untrained
    from aria_jax.embed.pieces import open_sources
    from aria_jax.embed.table import read_embeddings
    from aria_jax.eval.suite import BASELINE, find_tasks, markdown_table, rows_by_path, run_suite
    from aria_jax.report import program_version
    from data_pipeline.errors import UserError

    check_slicing(args)
    if args.folds < 2 or args.seeds < 1:
        raise UserError(f"--folds {args.folds}, --seeds {args.seeds}: at least 2 folds and 1 seed")
    if args.pooling and not args.checkpoint:
        raise UserError("--pooling has no effect without --checkpoint: what is counted has none")
    others = [_named(text) for text in args.embeddings]
    out = Path(args.out)
    files = {name: out / f"{name}.parquet" for name in ("pitch-class", BASELINE)}
    warnings: list[str] = []
    with TemporaryDirectory() as folder:
        stage("listing the files")
        source = open_sources(
            args.sources,
            slicing_in(counting(BASELINE, args)[1]),
            folder=Path(folder),
            metadata=args.metadata,
        )
        for name, path in files.items():
            warnings += _embed(args, source, path, name, *counting(name, args))
        table = read_embeddings(files[BASELINE])
        tasks = find_tasks(
            table,
            min_per_class=args.min_per_class,
            max_per_class=args.max_per_class,
            published_split=_published_split(Path(args.sources[0])),
            cross_validate=args.cross_validate,
            seed=args.seed,
        )
        needed = sorted({int(row) for task in tasks for row in task.rows})
        if args.checkpoint:
            wanted = source.only({table.path[row] for row in needed})
            stage("loading the model")
            asked = {n: getattr(args, n) for n in ("slice_notes", "max_tokens", "pooling", "seed")}
            for name, made in trained_and_untrained(args.checkpoint, MODEL, **asked).items():
                files[name] = out / f"{name}.parquet"
                warnings += _embed(args, wanted, files[name], name, *made)
    features = {
        name: rows_by_path(read_embeddings(path), table.path, name, needed)
        for name, path in (*files.items(), *others)
    }
    stage("fitting")
    notes = []
    if args.checkpoint and args.classifier in ("linear", "knn"):
        notes.append(f"No row of model and statistics together: {args.classifier} does not scale.")
    elif args.checkpoint:
        features[f"{MODEL} + {BASELINE}"] = np.hstack([features[MODEL], features[BASELINE]])
    with progress_bar("probe", "fit") as progress:
        results = run_suite(
            tasks,
            features,
            classifier=args.classifier,
            folds=args.folds,
            repeats=args.seeds,
            seed=args.seed,
            progress=progress,
        )
    made_by = f"Made by `{args.command_line}` ({program_version()})."
    text = "\n".join([markdown_table(tasks, results), *notes, *warnings, made_by]) + "\n"
    write_atomically(out / "results.md", text)
    shown = {
        name: {task: result.summary() for task, result in row.items()}
        for name, row in results.items()
    }
    task_notes = {task.name: list(task.notes) for task in tasks}
    result = {"results": shown, "notes": task_notes, "table": str(out / "results.md")}
    print_result({**result, "warnings": warnings}, args.json, text, warnings)


BENCH_SUITE = Verb(
    _BENCH_SUITE,
    _bench_suite_arguments,
    _bench_suite,
    Writes(
        lambda args: [Path(args.out) / "results.md"],
        ("sources", "checkpoint", "embeddings", "metadata"),
        in_folder=True,
        source="sources",
    ),
)


def _published_split(source: Path) -> bool:
    """Whether a label "split" is the data set's own: token shards may have been divided by us."""
    from data_pipeline.shards import MANIFEST, load_manifest

    if not (source / MANIFEST).is_file():
        return True
    return bool(load_manifest(source).get("published_split"))


def _named(text: str) -> tuple[str, Path]:
    from data_pipeline.errors import UserError

    name, equals, path = text.partition("=")
    if not equals or not name or not Path(path).is_file():
        raise UserError(f"--embeddings {text}: expected NAME=FILE of embeddings (Parquet or NPZ)")
    return name, Path(path)


def _embed(
    args: argparse.Namespace,
    source: Any,
    out: Path,
    name: str,
    encode: Any,
    settings: dict[str, Any],
) -> list[str]:
    """Writes one feature set; what had better be known of it."""
    from aria_jax.cli.console import progress_bar
    from aria_jax.cli.embed import slicing_in
    from aria_jax.embed.export import export

    sliced = source.sliced(slicing_in(settings))
    warn_of_reading(sliced.reading, settings["reading"], args.checkpoint)
    with progress_bar(f"embed: {name}", "file") as progress:
        summary = export(
            sliced,
            encode,
            out,
            settings={**settings, "reading": sliced.reading},
            origin=Path(args.sources[0]).resolve() if len(args.sources) == 1 else "",
            pool=args.pool_slices,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
        )
    if not summary.n_rejected:
        return []
    return [
        f"{name}: {summary.n_rejected} of {summary.n_files} files could not be read and are left "
        f"out, see {out}.rejected.jsonl"
    ]
