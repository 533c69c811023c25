"""`aria-jax bench-suite`: every labelled task in a folder, in one table beside the paper's."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aria_jax.cli.output import Writes, add_overwrite
from data_pipeline.artifact import write_atomically

DESCRIPTION = """\
Find every task that the labels in a folder make possible (genre, form, period, composer, pianist,
emotion; one data set per top folder), embed all files, probe each task, and print one table of
accuracy and macro-F1 in the shape of the paper's, its rows beside ours marked as quoted; then how
far each feature set is from the handcrafted note statistics, with intervals.

Feature sets: pitch-class histogram and handcrafted note statistics (always); with --checkpoint the
model, and the same network untrained; with --embeddings NAME=FILE any other model's. Labels come
from metadata files beside the MIDI files, {category: {split: {path: label}}} among the layouts. A
published split, there or as a label "split" of the files, is used, and judged on "test" where it
has one; otherwise 5-fold cross-validation that keeps compositions together.

examples:
  aria-jax bench-suite benchmarks_dir --out suite --checkpoint run2
  aria-jax bench-suite benchmarks_dir --checkpoint run2 --embeddings MERT=mert.parquet"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax bench-suite`."""
    from aria_jax.cli.embed import add_slicing

    parser.add_argument("dir", help="folder of labelled MIDI files")
    parser.add_argument("--out", default="bench-out", help="folder for embeddings and the table")
    parser.add_argument("--checkpoint", help="workdir of a contrastive run")
    parser.add_argument(
        "--embeddings", action="append", default=[], metavar="NAME=FILE", help="another model's"
    )
    parser.add_argument(
        "--classifier", "--readout", choices=("logistic", "linear", "knn"), default="logistic"
    )
    parser.add_argument("--metadata", help="labels (default: metadata files beside the MIDI files)")
    add_slicing(parser)
    parser.add_argument(
        "--pooling", choices=("eos", "mean"), help="default: as the model was trained"
    )
    parser.add_argument(
        "--min-per-class", type=int, default=10, help="leave smaller classes out (10)"
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes (1; 0: none)")
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (0)")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


WRITES = Writes(
    lambda args: [Path(args.out) / "results.md"],
    ("dir", "checkpoint", "embeddings", "metadata"),
    in_folder=True,
)


def run(args: argparse.Namespace) -> None:
    """Embeds, probes and prints."""
    from aria_jax.cli.console import print_result, progress_bar
    from aria_jax.embed.table import read_embeddings
    from aria_jax.eval.suite import find_tasks, markdown_table, rows_by_path, run_suite
    from aria_jax.report.page import program_version

    others = [_named(text) for text in args.embeddings]
    out = Path(args.out)
    files = {name: out / f"{name}.parquet" for name in ("pitch-class", "statistics")}
    for name, path in files.items():
        _embed(args, path, f"embed: {name}", *_baseline(name, args))
    if args.checkpoint:
        for name, (encode, settings) in _networks(args).items():
            files[name] = out / f"{name}.parquet"
            _embed(args, files[name], f"embed: {name}", encode, settings)
    table = read_embeddings(files["statistics"])
    tasks = find_tasks(
        table, min_per_class=args.min_per_class, published_split=_published_split(Path(args.dir))
    )
    features = {
        name: rows_by_path(read_embeddings(path), table.path, name)
        for name, path in (*files.items(), *others)
    }
    with progress_bar("probe", "probe") as progress:
        results = run_suite(
            tasks,
            features,
            classifier=args.classifier,
            min_per_class=args.min_per_class,
            seed=args.seed,
            progress=progress,
        )
    text = (
        f"{markdown_table(tasks, results)}\nMade by `{args.command_line}` ({program_version()}).\n"
    )
    write_atomically(out / "results.md", text)
    shown = {
        name: {task: result.summary() for task, result in row.items()}
        for name, row in results.items()
    }
    protocols = {task.name: task.protocol for task in tasks}
    result = {"results": shown, "protocols": protocols, "table": str(out / "results.md")}
    print_result(result, args.json, text)


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


def _baseline(name: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from aria_jax.embed.baselines import baseline_encoder
    from data_pipeline.midi import STANDARD
    from data_pipeline.tokenizer import Tokenizer

    settings = {
        "fingerprint": name,
        "tokenizer": "aria",
        "max_tokens": args.max_tokens,
        "reading": STANDARD,
    }
    return baseline_encoder(name, Tokenizer.preset("aria")), settings


def _networks(args: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The model, and the same architecture with the weights it might have started from."""
    from flax import nnx

    from aria_jax.checkpoints.models import load_model
    from aria_jax.config import ComputeConfig
    from aria_jax.embed.encode import model_encoder
    from aria_jax.models.heads import build_model
    from data_pipeline.tokenizer import Tokenizer

    loaded = load_model(args.checkpoint)
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    pooling = args.pooling or loaded.pooling
    settings = {
        "tokenizer": loaded.tokenizer,
        "max_tokens": min(args.max_tokens, loaded.config.max_seq_len),
        "pooling": pooling,
        "reading": loaded.reading,
    }
    untrained = build_model(loaded.config, ComputeConfig(), rngs=nnx.Rngs(params=args.seed))
    made = {
        "untrained": (untrained, f"untrained {loaded.config} seed {args.seed}"),
        "aria_jax": (loaded.model, loaded.fingerprint),
    }
    return {
        name: (model_encoder(model, pad_id, pooling), {"fingerprint": fingerprint, **settings})
        for name, (model, fingerprint) in made.items()
    }


def _embed(
    args: argparse.Namespace, out: Path, title: str, encode: Any, settings: dict[str, Any]
) -> None:
    from aria_jax.cli.console import progress_bar, warn_of_reading
    from aria_jax.embed.export import export
    from aria_jax.embed.pieces import Slicing, open_source

    slicing = Slicing(
        settings["tokenizer"], args.slice_notes, settings["max_tokens"], settings["reading"]
    )
    with TemporaryDirectory() as folder, progress_bar(title, "file") as progress:
        source = open_source(
            args.dir, slicing, spool=Path(folder) / "spool", metadata=args.metadata
        )
        warn_of_reading(source.reading, settings["reading"], args.checkpoint)
        export(
            source,
            encode,
            out,
            settings={**settings, "reading": source.reading, "slice_notes": args.slice_notes},
            origin=Path(args.dir).resolve(),
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
        )
