"""`aria-jax embed`: one embedding per file."""

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aria_jax.checkpoints import RELEASED_ENCODER
from aria_jax.cli import (
    Verb,
    add_compat,
    check_folder_name,
    check_suffix,
    chosen_reading,
    warn_of_reading,
)

if TYPE_CHECKING:
    from aria_jax.embed.export import ExportSummary
    from aria_jax.embed.pieces import Slicing, Source

DESCRIPTION = """\
Embed every MIDI file of a folder or archive (or every piece of token shards): consecutive slices of
300 notes (fewer where the model was trained on fewer), each embedded, averaged per file
(--pool-slices mean+std adds the standard deviation over slices: twice the numbers). Writes Parquet:
path, sha256, embedding, n_slices, n_notes, duration_ms, labels. Files that cannot be read are named
in OUT.rejected.jsonl; the rest goes on. Interrupted and run again, it goes on where it stopped;
where files or labels have changed since, labels are refreshed and only new and changed files
embedded. What another model made, or other settings, is replaced with --overwrite only.

Many hosts: run the same command on each, with OUT on a shared disk or in a bucket. Each takes one
part of 256 files after the other, and none waits for one that is slow or gone; --host-index and
--host-count say where in the list a host begins (processes started by `launch` know theirs).
--runner ray does so on the nodes of a Ray cluster. --parts writes a folder of Parquet files instead
of one, --float16 numbers of half the size. --baseline embeds by counting, to hold a model against.

examples:
  aria-jax embed my_midis emb.parquet                   with the released mini-embedding
  aria-jax embed my_midis emb.parquet --checkpoint run2
  aria-jax embed nocturne.mid waltz.mid emb.parquet --checkpoint run2
  aria-jax embed my_midis.tar emb.parquet --checkpoint run2 --bf16 --workers 8
  aria-jax embed my_data emb.parquet --checkpoint run2 --per-slice
  aria-jax embed gs://b/midis.tar gs://b/emb --checkpoint gs://b/run2 --parts --float16
  aria-jax embed my_data counts.parquet --baseline pitch-class"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax embed`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="source",
        help="folder, archive or Parquet of MIDI, token shards; or MIDI files",
    )
    parser.add_argument("out", help="Parquet file to write, with --parts a folder of them")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint",
        metavar="C",
        help="workdir of a contrastive run, or .safetensors (default: the released "
        f"{RELEASED_ENCODER})",
    )
    which.add_argument("--baseline", choices=("pitch-class", "statistics"), help="count instead")
    add_slicing(parser)
    add_compat(parser, "default: as the model's corpus was read")
    parser.add_argument("--metadata", help="labels (default: metadata.json beside the files)")
    parser.add_argument("--per-slice", action="store_true", help="one row per slice")
    parser.add_argument(
        "--pooling", choices=("eos", "mean"), help="default: as the model was trained"
    )
    add_pool_slices(parser)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes (1; 0: none)")
    parser.add_argument("--float16", action="store_true", help="write numbers of two bytes")
    parser.add_argument(
        "--parts", action="store_true", help="OUT is a folder, of a Parquet file for each 256 files"
    )
    parser.add_argument("--host-index", type=int, help="number of this host (0)")
    parser.add_argument("--host-count", type=int, help="hosts at work (1)")
    parser.add_argument(
        "--runner",
        choices=("local", "ray"),
        default="local",
        help="this process, or one on each GPU or node of the Ray cluster of RAY_ADDRESS",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace embeddings by another model there"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def add_pool_slices(parser: argparse.ArgumentParser) -> None:
    """Adds --pool-slices."""
    parser.add_argument(
        "--pool-slices",
        choices=("mean", "mean+std"),
        default="mean",
        help="what a file is of its slices: their mean (default), or with their deviation too",
    )


def add_slicing(parser: argparse.ArgumentParser) -> None:
    """Adds --slice-notes and --max-tokens."""
    from aria_jax.config import SLICE_NOTES, SLICE_TOKENS

    for option, default, what in (
        ("--slice-notes", SLICE_NOTES, "notes of a slice"),
        ("--max-tokens", SLICE_TOKENS, "tokens of a slice"),
    ):
        how = f"{what} ({default}, or fewer where the model was trained on fewer)"
        parser.add_argument(option, type=int, help=how)


def check_slicing(args: argparse.Namespace) -> None:
    """Raises `UserError` for slices of nothing, or less than no processes."""
    from data_pipeline.errors import UserError

    for name, least in (("slice_notes", 1), ("max_tokens", 2), ("workers", 0)):
        if (given := getattr(args, name)) is not None and given < least:
            raise UserError(f"--{name.replace('_', '-')} {given} must be at least {least}")


def reading_of_source(args: argparse.Namespace, source: "Source", reading: str) -> str:
    """How the files of `source` are read: as wanted, or as its shards were; says where they differ.

    Raises:
        UserError: --compat names another reading than the shards were built with.
    """
    from data_pipeline.errors import UserError

    if source.reading != reading and args.compat:
        raise UserError(
            f"the files of these shards were read by {source.reading}, which --compat "
            f"{args.compat} cannot change; leave it out, or give the MIDI files"
        )
    if args.checkpoint:
        warn_of_reading(source.reading, reading, args.checkpoint)
    return source.reading


def run(args: argparse.Namespace) -> None:
    """Embeds and writes."""
    from aria_jax.cli.console import print_result, progress_bar, stage

    _check(args)
    host_index, host_count = _host(args)
    _refuse_other_output(args)
    stage("loading the libraries" if args.baseline else "loading jax and the model")
    with ExitStack() as stack:
        helped_by = None
        if args.runner == "ray":
            import jax

            from aria_jax.embed.export import ray_helpers

            jax.config.update("jax_platforms", "cpu")  # the helpers want accelerators to themselves
            helped_by = stack.enter_context(ray_helpers(partial(_prepare, _movable(args))))
        encode, settings = _encoder(args)
        stage("listing the files")
        sharing = {"host_index": host_index, "host_count": host_count, "helped_by": helped_by}
        progress = stack.enter_context(progress_bar("embed", "file"))
        summary, warnings = _export(args, encode, settings, progress=progress, **sharing)
    made = {name: n for name, n in asdict(summary).items() if name != "done_before"}
    used = {name: settings[name] for name in ("fingerprint", "slice_notes", "max_tokens")}
    result = {"out": args.out, **made, **used, "warnings": warnings}
    text = f"{args.out}: {summary.n_rows} rows, from slices of {settings['slice_notes']} notes"
    if not summary.complete:
        text = "all parts are done; another host writes " + args.out
    if summary.done_before:
        text += "; already made of the same files and labels: nothing to do"
    elif summary.changes is not None:
        shown = {k: n for k, n in summary.changes.items() if n or k != "renamed"}
        text += "; " + ", ".join(f"{n:,} {kind}" for kind, n in shown.items())
    if summary.n_rejected:
        text += f"; {summary.n_rejected} files rejected, see {args.out}.rejected.jsonl"
    print_result(result, args.json, text, warnings)


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded; fills in the default model."""
    from aria_jax.cli.console import note
    from aria_jax.embed.table import SUMMARY
    from data_pipeline.artifact import refuse_inside
    from data_pipeline.errors import UserError

    args.parts = args.parts or (Path(args.out) / SUMMARY).is_file()
    if args.parts:
        check_folder_name(args.out)
    else:
        check_suffix(args.out, "a Parquet file", ".parquet")
    for source in args.sources:
        refuse_inside(args.out, source, "the folder that is embedded")
    if not args.checkpoint and not args.baseline:
        args.checkpoint = RELEASED_ENCODER
        note(f"model: the released {RELEASED_ENCODER} (--checkpoint takes one of yours)")
    check_slicing(args)
    if not args.parts and (not Path(args.out).name or Path(args.out).is_dir()):
        raise UserError(
            f"{args.out}: a folder is here; name the Parquet file to write in it, or --parts for a "
            "folder of them"
        )
    for option in ("pooling", "bf16"):
        if args.baseline and getattr(args, option):
            raise UserError(f"--{option} has no effect with --baseline, which counts: no model")
    if args.per_slice and args.pool_slices != "mean":
        raise UserError(f"--per-slice pools nothing: leave out --pool-slices {args.pool_slices}")
    if args.runner == "ray" and (args.host_index, args.host_count) != (None, None):
        raise UserError(
            "--runner ray numbers its hosts itself: leave out --host-index, --host-count"
        )


def _export(
    args: argparse.Namespace, encode: Any, settings: dict[str, Any], **sharing: Any
) -> tuple["ExportSummary", list[str]]:
    """Exports; also what had better be known of the labels."""
    from aria_jax.cli.console import stage
    from aria_jax.embed.export import export
    from aria_jax.embed.pieces import common_folder, open_source

    origin = common_folder(args.sources)
    with TemporaryDirectory() as folder:
        source = open_source(
            args.sources, slicing_in(settings), spool=Path(folder) / "spool", metadata=args.metadata
        )
        settings["reading"] = reading_of_source(args, source, settings["reading"])
        stage("counting" if args.baseline else "compiling")
        summary = export(
            source,
            encode,
            args.out,
            settings=settings,
            origin=origin.resolve(),
            per_slice=args.per_slice,
            pool=args.pool_slices,
            float16=args.float16,
            as_dataset=args.parts,
            workers=args.workers,
            overwrite=args.overwrite,
            **sharing,
        )
        return summary, list(source.warnings)


def _movable(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments as another machine understands them."""
    from data_pipeline import storage

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(one) for one in value]
        if value is None or storage.is_remote(value):
            return value and storage.url(value)
        return os.path.abspath(value) if os.path.exists(value) else value

    moved = argparse.Namespace(**vars(args))
    moved.sources, moved.checkpoint, moved.metadata = map(
        named, (args.sources, args.checkpoint, args.metadata)
    )
    moved.out = storage.url(args.out) if storage.is_remote(args.out) else os.path.abspath(args.out)
    return moved


def _prepare(args: argparse.Namespace) -> Callable[[int, int], "ExportSummary"]:
    """Loads the model in a process of a Ray cluster; see `ray_helpers`."""
    from aria_jax.cli.main import bring

    bring(args)
    encode, settings = _encoder(args)

    def help_with(number: int, count: int) -> "ExportSummary":
        return _export(
            args, encode, settings, host_index=number, host_count=count, helper=True
        )[0]  # fmt: skip

    return help_with


EMBED = Verb(DESCRIPTION, add_arguments, run)


def _refuse_other_output(args: argparse.Namespace) -> None:
    """What OUT can tell before the model is loaded."""
    from aria_jax.embed.table import SUMMARY, read_identity
    from data_pipeline.errors import UserError

    out = Path(args.out)
    if args.overwrite or not (out.is_file() or (out / SUMMARY).is_file()):
        return
    made = read_identity(out)
    if made is None or made.settings.get("per_slice") != args.per_slice:
        what = "a file that does not say what it was made of"
        if made is not None:
            what = "one row per " + ("slice" if made.settings.get("per_slice") else "file")
        raise UserError(f"{out}: holds {what}; choose another output, or --overwrite to replace it")
    counted = made.inputs["model"] in ("pitch-class", "statistics")
    if made.inputs["model"] != args.baseline and (counted or args.baseline):
        raise UserError(
            f"{out}: holds embeddings made otherwise (model: {made.inputs['model']} → "
            f"{args.baseline or args.checkpoint}); choose another output, or --overwrite to "
            "replace it"
        )


WAIT_FOR_HOSTS_S = 7 * 24 * 3600
"""How long a host that is done waits for the others, where the cluster keeps them together."""


def _host(args: argparse.Namespace) -> tuple[int | None, int]:
    """Number of this host and how many there are: as asked, or as `launch` says; None of 1."""
    from data_pipeline.errors import UserError

    given = (args.host_index, args.host_count)
    if given == (None, None):
        # Hosts share a disk and nothing else: no need to wait for each other as in training.
        told = [os.environ.get(f"ARIA_JAX_PROCESS_{name}", "") for name in ("INDEX", "COUNT")]
        given = (int(told[0]), int(told[1])) if all(map(str.isdecimal, told)) else (None, 1)
        if os.environ.get("ARIA_JAX_COORDINATOR") == "auto":  # only the cluster knows, as on a pod
            import jax

            from aria_jax.train.processes import join_processes

            join_processes(shutdown_timeout_s=WAIT_FOR_HOSTS_S)
            given = (jax.process_index(), jax.process_count())
    index, count = given[0], 1 if given[1] is None else given[1]
    if count < 1:
        raise UserError(f"--host-count {count} must be at least 1")
    if index is not None and not 0 <= index < count:
        raise UserError(f"--host-index must lie in 0..{count - 1}")
    return index, count


def _encoder(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The encoder, and all that its numbers depend on."""
    if args.baseline:
        from data_pipeline import storage
        from data_pipeline.shards import MANIFEST, load_manifest

        # Shards are counted in their own tokens.
        source = storage.place(args.sources[0])
        shards = len(args.sources) == 1 and (source / MANIFEST).is_file()
        scheme = load_manifest(source)["tokenizer"]["preset"] if shards else "aria"
        return counting(args.baseline, args, args.compat, scheme)
    from aria_jax.checkpoints.models import load_model
    from aria_jax.config import ComputeConfig
    from aria_jax.embed.encode import model_encoder, slicing_of
    from aria_jax.sharding import local_mesh
    from data_pipeline.errors import about
    from data_pipeline.tokenizers import Tokenizer

    mesh = local_mesh()
    compute = ComputeConfig(dtype="bfloat16" if args.bf16 else "float32")
    loaded = load_model(args.checkpoint, mesh=mesh, compute=compute)
    pooling = args.pooling or loaded.pooling
    pad_id = Tokenizer.preset(loaded.tokenizer).pad_id
    with about(args.checkpoint):
        encode = model_encoder(loaded.model, pad_id, pooling, mesh=mesh)
    reading = chosen_reading(args.compat, loaded.reading, args.checkpoint)
    return encode, {
        "fingerprint": loaded.fingerprint,
        **asdict(slicing_of(loaded, args.slice_notes, args.max_tokens, reading)),
        "pooling": pooling,
        "dtype": compute.dtype,
    }


def slicing_in(settings: dict[str, Any]) -> "Slicing":
    """How files were sliced for numbers of these settings."""
    from aria_jax.embed.pieces import Slicing

    return Slicing(*(settings[field.name] for field in fields(Slicing)))


def counting(
    name: str, args: argparse.Namespace, compat: str | None = None, scheme: str = "aria"
) -> tuple[Any, dict[str, Any]]:
    """The encoder of a baseline, and all that its numbers depend on."""
    from aria_jax.config import SLICE_NOTES, SLICE_TOKENS
    from aria_jax.embed.encode import baseline_encoder
    from aria_jax.embed.pieces import Slicing
    from data_pipeline.midi import STANDARD
    from data_pipeline.tokenizers import Tokenizer

    notes, tokens = args.slice_notes or SLICE_NOTES, args.max_tokens or SLICE_TOKENS
    slicing = Slicing(scheme, notes, tokens, compat or STANDARD)
    settings = {"fingerprint": name, **asdict(slicing)}
    return baseline_encoder(name, Tokenizer.preset(scheme)), settings
