"""`aria-jax data`: build, inspect and sample training data."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aria_jax.cli import Verb, Writes, add_compat, add_overwrite, check_folder_name

if TYPE_CHECKING:
    from data_pipeline.inspection import Inspection

DESCRIPTION = """\
Token shards are what training reads: a folder with ArrayRecord shards, an index, manifest.json and
rejected.jsonl (every file that was left out, and why).

examples:
  aria-jax data sample corpus                          real scores to try things on
  aria-jax data build my_midis my_data                 tokenise a folder or .tar
  aria-jax data inspect my_data --plot lengths.png     what is in it"""

BUILD = """\
Read, filter, tokenise and shard every MIDI file (.mid, .midi, .kar, .rmi, also with .gz after it)
of a folder, of an archive, or of Parquet with a column of MIDI bytes. Killed at any moment and run
again, it goes on, and ends with the same bytes; finished, it does nothing; where the files, their
labels or the settings have changed since, it says what, and builds with --overwrite. Files that
cannot be used, links that lead nowhere and whatever else is skipped are named in rejected.jsonl
with the reason; the rest goes on. The validation split holds whole compositions. Labels come from
metadata.json, .jsonl or .csv beside the files (Aria-MIDI, MAESTRO and ASAP layouts), the other
columns of Parquet, or --metadata; then from the names of files and folders, then from the text
inside the MIDI files. Where every piece has a label "split" (train, val or validation, test), that
is the split; a piece that is labelled test is never in a shard of train or val."""

DETAILS = """\
filters: "none" keeps all that can be read; "light" drops broken and degenerate files, "heavy" has
the reference's thresholds; or a JSON file such as {"silent_interval": {"max_silence_s": 30}}.
{table}
A performance is first cleaned (--solo-piano, --remove-instruments ...), then filtered, tokenised
and compared:
  --dedup exact   one piece for each content, whatever its ticks, tempo map, tracks and text
  --dedup near    and one for each performance, however transposed, stretched, trimmed, re-exported;
                  takes 400 bytes of memory a file
  --exclude OTHER   leave out what is a duplicate, by the same comparison, of a file of OTHER: an
                  evaluation set, say; rejected.jsonl names both
  --max-per-composition N   the N performances of a composition whose content hash is smallest
Aria-MIDI's "pruned" subset was made like --filters light --max-per-composition 10, its "deduped"
subset like --filters heavy --max-per-composition 1.
--runner ray (pip install 'aria-jax[ray]') does the work on the Ray cluster of RAY_ADDRESS, else on
a Ray of this machine. Every node must see the MIDI files under the same path; only this machine
needs the output folder. The corpus has the same bytes, also where a node dies under way."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs build, inspect and sample."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{build,inspect,sample}")

    def verb(name: str, text: str, details: str | None = None) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            description=text,
            epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print the result as one JSON line")
        return made

    build = verb("build", BUILD, DETAILS.replace("{table}", _filter_table()))
    build.add_argument(
        "midi_dir",
        help="folder (searched recursively), .zip, .tar (.gz, .bz2, .xz), .parquet or MIDI file; "
        "or .parquet of event series",
    )
    build.add_argument("out_dir", help="folder for the shards")
    build.add_argument("--workers", type=int, help="processes (default: one per core)")
    build.add_argument("--metadata", help="JSON or CSV of labels (default: beside the files)")
    build.add_argument(
        "--split-column",
        metavar="NAME",
        help="label whose train/val/test is followed (default: split, if every piece has it; none)",
    )
    build.add_argument("--filters", default="light", help="light, heavy, none or a file (light)")
    build.add_argument("--val-fraction", type=float, default=0.1, help="held out (0.1)")
    build.add_argument(
        "--tokenizer",
        "--preset",
        dest="preset",
        default="aria",
        metavar="NAME",
        help="scheme of tokens, see `aria-jax tokenizers list`; events, events:FILE.json or "
        "events:CORPUS for event series (aria)",
    )
    add_compat(build, "default: standard")
    build.add_argument(
        "--repair", action="store_true", help="of truncated files, take what is before the break"
    )
    build.add_argument("--solo-piano", action="store_true", help="drop other instruments")
    build.add_argument(
        "--remove-instruments",
        default="",
        metavar="A,B",
        help="families to drop, e.g. strings,pipe",
    )
    build.add_argument(
        "--pedal-threshold",
        type=int,
        default=64,
        metavar="N",
        help="half pedal: down from N on (64)",
    )
    build.add_argument(
        "--pedal-hysteresis",
        type=int,
        default=0,
        metavar="N",
        help="down from threshold + N on, up from threshold - N on (0)",
    )
    build.add_argument(
        "--remove-redundant-pedals", action="store_true", help="drop pedal events without effect"
    )
    build.add_argument(
        "--resolve-overlaps", action="store_true", help="end a note where its pitch begins again"
    )
    build.add_argument("--dedup", default="exact", help="exact, near or none (exact)")
    build.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="OTHER",
        help="leave out duplicates of another folder's or archive's files (may be repeated)",
    )
    build.add_argument("--max-per-composition", type=int, metavar="N", help="performances kept")
    build.add_argument("--shards", type=int, help="shards a split (default: by size)")
    build.add_argument("--runner", default="local", help="local or ray (local)")
    build.add_argument("--overwrite", action="store_true", help="replace another corpus there")

    inspect = verb("inspect", "Show what is in a folder of token shards.")
    inspect.add_argument("data_dir")
    inspect.add_argument("--plot", metavar="FILE.png", help="save a picture of lengths and labels")

    add_overwrite(inspect)

    sample = verb(
        "sample",
        "Render real, labelled, public-domain scores (from the music21 package) to MIDI.\n"
        "Needs: pip install 'aria-jax[demo]'. Run again, it goes on.",
    )
    sample.add_argument("out_dir", help="folder for the MIDI files and metadata.json")
    sample.add_argument("--per-composer", type=int, default=60, help="pieces at most (60)")
    sample.add_argument("--workers", type=int, default=2, help="processes (2)")
    add_overwrite(sample)


def _outputs(args: argparse.Namespace) -> list[Path]:
    """What is not a corpus, which has an identity of its own."""
    if args.verb == "sample":
        return [Path(args.out_dir) / "metadata.json"]
    return [Path(args.plot)] if args.verb == "inspect" and args.plot else []


def _filter_table() -> str:
    """The thresholds of the presets, a test a line."""
    from data_pipeline.filters import PRESETS

    def shown(thresholds: dict | None) -> str:
        if thresholds is None:
            return "-"
        if "test_params_list" in thresholds:  # several windows: one value each
            first, *_ = tests = thresholds["test_params_list"]
            return ", ".join(f"{name} {'/'.join(str(t[name]) for t in tests)}" for name in first)
        return ", ".join(f"{name} {value}" for name, value in thresholds.items())

    lines = []
    for name, thresholds in PRESETS["heavy"].items():
        light = PRESETS["light"].get(name)
        lines.append(f"  {name}\n    heavy: {shown(thresholds)}")
        lines.append(f"    light: {'the same' if light == thresholds else shown(light)}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    {"build": _build, "inspect": _inspect, "sample": _sample}[args.verb](args)


DATA = Verb(DESCRIPTION, add_arguments, run, Writes(_outputs, ("data_dir",), source="data_dir"))


def _build(args: argparse.Namespace) -> None:
    from aria_jax.cli.console import print_result, progress_bar, stage

    check_folder_name(args.out_dir)
    stage("listing the files, starting processes")
    from data_pipeline.build import build
    from data_pipeline.cleaning import Cleaning
    from data_pipeline.midi import STANDARD, compat_of

    with progress_bar("build", "file") as progress:
        summary = build(
            args.midi_dir,
            args.out_dir,
            workers=args.workers,
            filters=args.filters,
            metadata=args.metadata,
            split_column=args.split_column,
            val_fraction=args.val_fraction,
            tokenizer_preset=args.preset,
            compat=compat_of(args.compat or STANDARD),
            repair=args.repair,
            cleaning=Cleaning(
                solo_piano=args.solo_piano,
                remove_instruments=tuple(filter(None, args.remove_instruments.split(","))),
                pedal_threshold=args.pedal_threshold,
                pedal_hysteresis=args.pedal_hysteresis,
                remove_redundant_pedals=args.remove_redundant_pedals,
                resolve_overlaps=args.resolve_overlaps,
            ),
            dedup=args.dedup,
            exclude=args.exclude,
            max_per_composition=args.max_per_composition,
            shards=args.shards,
            runner=args.runner,
            overwrite=args.overwrite,
            progress=progress,
        )
    text = (
        f"{summary.out_dir}: {summary.n_accepted:,} of {summary.n_files:,} files, "
        f"{summary.hours:.1f} h, {summary.n_notes:,} notes, {summary.n_tokens:,} tokens; "
        f"{summary.n_train:,} train, {summary.n_val:,} val"
        + (f", {summary.n_test:,} test" if summary.n_test else "")
    )
    if summary.round_trip is not None:
        lost: dict[str, Any] = summary.round_trip
        text += (
            f"\nround trip: values off by {lost['value_mean']:.2%} of their channel's range on "
            f"average, by {lost['value_max']:.2%} at most, on {lost['worst_channel']} by "
            f"{lost['worst_mean']:.2%}; waits off by {lost['wait_mean']:.2%}, by "
            f"{lost['wait_max']:.2%} at most"
        )
    if summary.done_before:
        text += "\nalready built of the same files with the same settings: nothing to do"
    if summary.n_repaired:
        text += f"\n{summary.n_repaired:,} repaired: truncated files, read up to the break"
    if summary.n_rejected:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in summary.rejected.items())
        text += f"\n{summary.n_rejected:,} rejected ({reasons}): see {args.out_dir}/rejected.jsonl"
    print_result(dataclasses.asdict(summary), args.json, text, summary.warnings)


def _inspect(args: argparse.Namespace) -> None:
    from aria_jax.cli.console import print_result, stage
    from aria_jax.report import check_picture
    from data_pipeline.inspection import inspect

    if args.plot:
        check_picture(args.plot)
    stage("reading the corpus")
    found = inspect(args.data_dir)
    lines = [
        *_split_table(found.splits),
        *_length_table(found.length_histogram, found.notes_quantiles),
        *_coverage_table(found.coverage),
        *(line for label, counts in found.labels.items() for line in _label_table(label, counts)),
        *_rejection_table(found.rejected),
        f"read by: {found.reading}; repaired: {found.n_repaired:,} (truncated)",
    ]
    if found.first_lines:
        lines += [
            "",
            "tokens: " + ", ".join(f"{k} {n:,}" for k, n in found.kinds.items() if n),
            f"the first piece ({found.tokenizer} tokenizer) begins:",
            *("  " + line for line in found.first_lines),
        ]
    if args.plot:
        stage("drawing")
        _plot(args, found)
    print_result(dataclasses.asdict(found), args.json, "\n".join(lines))


_BAR = 40
_SHOWN_VALUES = 12
_MAX_VALUES = 60


def _split_table(splits: dict[str, dict[str, float]]) -> list[str]:
    columns = ("n_pieces", "hours", "n_notes", "n_tokens")
    total = {name: sum(counts[name] for counts in splits.values()) for name in columns}
    lines = [f"{'':<8}{'pieces':>12}{'hours':>12}{'notes':>16}{'tokens':>16}"]
    for split, row in {**splits, "total": total}.items():
        lines.append(
            f"{split:<8}{row['n_pieces']:>12,}{row['hours']:>12,.1f}"
            f"{row['n_notes']:>16,}{row['n_tokens']:>16,}"
        )
    return lines


def _bars(rows: dict[str, int], total: int) -> list[str]:
    """A line for each count: name, number, share, and a bar as long as the share of the largest."""
    width = max((len(name) for name in rows), default=0) + 2
    largest = max(rows.values(), default=1)
    return [
        f"  {name:<{width}}{n:>10,} {100 * n / max(total, 1):5.1f} %  "
        f"{'#' * -(-_BAR * n // largest)}"
        for name, n in rows.items()
    ]


def _length_table(histogram: dict[int, int], quantiles: list[int]) -> list[str]:
    names = ("shortest", "quartile", "median", "quartile", "longest")
    notes = ", ".join(f"{name} {n:,}" for name, n in zip(names, quantiles, strict=True))
    rows = {f"{bound // 2:,} to {bound - 1:,}": n for bound, n in histogram.items()}
    return ["", f"notes per piece: {notes}", "tokens per piece", *_bars(rows, sum(rows.values()))]


def _coverage_table(coverage: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line for each label: how many pieces have it, in all and in each split."""
    if not coverage:
        return ["", "labels: none"]
    splits = list(next(iter(coverage.values())))
    width = max(map(len, (*coverage, "labels: pieces"))) + 2
    lines = ["", f"{'labels: pieces':<{width}}" + "".join(f"{split:>20}" for split in splits)]
    for label, row in coverage.items():
        cells = (f"{row[split]['n_pieces']:,} {row[split]['percent']:6.1f} %" for split in splits)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def _label_table(label: str, counts: dict[str, int]) -> list[str]:
    total = sum(counts.values())
    shown = dict(list(counts.items())[:_SHOWN_VALUES])
    lines = ["", f"{label}: {len(counts):,} values on {total:,} pieces", *_bars(shown, total)]
    if rest := len(counts) - len(shown):
        lines.append(f"  and {rest:,} more")
    return lines


def _rejection_table(rejected: dict[str, int]) -> list[str]:
    if not rejected:
        return ["", "rejected: nothing"]
    total = sum(rejected.values())
    return ["", f"rejected: {total:,} files (named in rejected.jsonl)", *_bars(rejected, total)]


def _plot(args: argparse.Namespace, found: "Inspection") -> None:
    from aria_jax.report import corpus_chart, save_chart
    from data_pipeline.shards import TokenShards, load_manifest

    lengths = {
        split: TokenShards(args.data_dir, split).n_notes
        for split in load_manifest(args.data_dir)["splits"]
    }
    # A label that is different for every piece, such as a title, would be a wall of bars.
    top = {
        label: dict(list(counts.items())[:_SHOWN_VALUES])
        for label, counts in found.labels.items()
        if len(counts) <= _MAX_VALUES
    }
    save_chart(corpus_chart(lengths, top, "notes per piece"), args.plot, args.command_line)


def _sample(args: argparse.Namespace) -> None:
    from aria_jax.cli.console import print_result, progress_bar, stage
    from data_pipeline import storage
    from data_pipeline.artifact import refuse_occupied
    from data_pipeline.errors import UserError
    from data_pipeline.sample import sample

    check_folder_name(args.out_dir)
    refuse_occupied(args.out_dir, "the sample")
    if args.per_composer < 1 or args.workers < 0:
        raise UserError("--per-composer must be at least 1, --workers 0")
    stage("choosing scores, rendering the first")
    with progress_bar("render", "score") as progress:
        summary = sample(
            args.out_dir, per_composer=args.per_composer, workers=args.workers, progress=progress
        )
    storage.upload(Path(args.out_dir))
    counts = ", ".join(f"{name} {n}" for name, n in summary.per_composer.items())
    text = f"{args.out_dir}: {summary.n_pieces} pieces ({counts})"
    for score, reason in summary.failed:
        text += f"\nnot rendered: {score}: {reason}"
    print_result(dataclasses.asdict(summary), args.json, text)
