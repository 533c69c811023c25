"""`aria-jax tokenizers`: the schemes of tokens, and what each makes of the same files."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aria_jax.cli import Verb, Writes, add_compat, add_overwrite, input_digest

if TYPE_CHECKING:
    from aria_jax.cli.tokenizers_study import Trained
    from data_pipeline.midi import Performance
    from data_pipeline.tokenizers import Tokenizer
    from data_pipeline.tokenizers.comparison import SchemeReport

_DESCRIPTION = """\
Schemes that turn MIDI into tokens. `data build --tokenizer NAME` takes any of them.

examples:
  aria-jax tokenizers list                        their names and sizes
  aria-jax tokenizers compare my_midis            how many tokens, and what a round trip loses"""

_COMPARE = """\
Encode and decode every MIDI file of a folder with each scheme. A note that comes back is matched by
instrument family, pitch and order; with sustain pedal folded into the notes, and a key that is
struck again ending its note before. Times are compared after the second performance is moved as a
whole, so that a scheme may begin with the bar. A file that cannot be read is named and left out,
and the exit status is then 1 (2 where nothing is left). --json prints one line:
{"n_files", "unreadable", "tokenizers": [{"name", "vocab_size", "tokens_per_note", "tokens_per_s",
"context_s" (music in 8,192 tokens), "encode_notes_per_s", "missing_percent", "added_percent",
"onset_error_ms", "onset_error_p95_ms", "duration_error_ms", "velocity_error",
"instruments_kept_percent", "pedals", …}]}.

With --train the same small network learns every scheme, each with as much compute as STEPS steps of
the first scheme take; "trained" then has a row for each scheme and seed: "nats_per_note" and
"nats_per_s" of held-out pieces, "valid_percent" of free samples, "probe_accuracy" of contrastive
embeddings. Stopped and run again, it goes on.

examples:
  aria-jax tokenizers compare my_midis --json
  aria-jax tokenizers compare my_midis --train 200 --label composer --out compared"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs list and compare."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{list,compare}")
    listing = verbs.add_parser("list", description="Name, vocabulary and source of each scheme.")
    compare = verbs.add_parser(
        "compare", description=_COMPARE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    compare.add_argument("midi_dir", help="folder of MIDI files (searched recursively), or one")
    compare.add_argument(
        "--tokenizers", metavar="A,B", help="only these (all whose packages are installed)"
    )
    compare.add_argument("--max-files", type=int, metavar="N", help="the first N files only")
    compare.add_argument(
        "--train", type=int, metavar="STEPS", help="also train a small network with each (--out)"
    )
    compare.add_argument("--seeds", type=int, help="networks of each scheme (3)")
    compare.add_argument("--label", help="of the files, that contrastive embeddings are probed for")
    compare.add_argument("--out", metavar="DIR", help="folder for report.html, and for what trains")
    add_compat(compare, "default: standard")
    add_overwrite(compare)
    for made in (listing, compare):
        made.add_argument("--json", action="store_true", help="print the result as one JSON line")


def _run(args: argparse.Namespace) -> int:
    """Runs the sub-verb."""
    return {"list": _list, "compare": _compare}[args.verb](args)


TOKENIZERS = Verb(
    _DESCRIPTION,
    _arguments,
    _run,
    Writes(  # a study with --train keeps an identity of its own
        lambda args: (
            [Path(args.out) / "report.html"]
            if args.verb == "compare" and args.out and not args.train
            else []
        ),
        ("midi_dir",),
        in_folder=True,
        source="midi_dir",
    ),
)


def _installed(names: list[str]) -> "tuple[list[Tokenizer], dict[str, str]]":
    """The tokenizers that can be built here, and why the others cannot."""
    from data_pipeline.errors import UserError
    from data_pipeline.tokenizers import Tokenizer

    found, missing = [], {}
    for name in names:
        try:
            found.append(Tokenizer.preset(name))
        except UserError as error:
            missing[name] = str(error)
    return found, missing


def _list(args: argparse.Namespace) -> int:
    from aria_jax.cli.console import print_result
    from data_pipeline.tokenizers import EVENTS, SCHEMES

    found, missing = _installed(list(SCHEMES))
    sizes = {one.preset_name: one.vocab_size for one in found}
    rows = [
        {
            "name": name,
            "about": text,
            "vocab_size": sizes.get(name),
            "hash": next((one.hash for one in found if one.preset_name == name), None),
            "missing": missing.get(name),
        }
        for name, text in SCHEMES.items()
    ]
    lines = [
        f"{name:<11} {sizes[name]:>6,} ids  {text}" if name in sizes else missing[name]
        for name, text in SCHEMES.items()
    ]
    series = {"name": "events", "about": EVENTS, "vocab_size": None, "hash": None, "missing": None}
    lines.append(f"{'events':<11} {'its own':>6} ids  {EVENTS}")
    print_result({"tokenizers": [*rows, series]}, args.json, "\n".join(lines))
    return 0


def _compare(args: argparse.Namespace) -> int:
    """Compares; 1 where some file could not be read."""
    from aria_jax.cli import tokenizers_study as study
    from aria_jax.cli.console import print_result, progress_bar, stage
    from aria_jax.cli.convert import listed_midi
    from data_pipeline.errors import UserError
    from data_pipeline.tokenizers import SCHEMES, Tokenizer
    from data_pipeline.tokenizers.comparison import compare

    _check(args)
    missing: dict[str, str] = {}
    stage("building the vocabularies")
    if args.tokenizers is not None:
        named = [name.strip() for name in args.tokenizers.split(",")]
        tokenizers = [Tokenizer.preset(name) for name in dict.fromkeys(named)]
    else:
        tokenizers, missing = _installed(list(SCHEMES))
    stage("listing the files")
    paths, unreadable = listed_midi([args.midi_dir])
    paths = paths[: args.max_files]
    if not paths:
        raise UserError("nothing to compare: " + "; ".join(unreadable))
    if args.label:
        _refuse_unknown_label(Path(args.midi_dir), paths, args.label)
    n_files, n_before = len(paths) + len(unreadable), len(unreadable)
    stage("reading and encoding")
    with progress_bar("compare", "file") as progress:
        reports = compare(
            _performances(paths, args.compat, unreadable),
            tokenizers,
            progress=lambda done: progress(done + len(unreadable) - n_before, len(paths)),
        )
    if len(unreadable) == n_files:
        raise UserError(f"none of the {n_files} files could be read: " + "; ".join(unreadable[:3]))
    trained, warned = _trained(args, Path(args.midi_dir), tokenizers)
    result: dict[str, Any] = {
        "n_files": n_files - len(unreadable),
        "unreadable": unreadable,
        "missing": missing,
        "tokenizers": [report.as_json() for report in reports],
    }
    text = table(reports)
    if args.train:
        result["trained"] = [asdict(one) for one in trained]
        text += "\n\n" + _markdown(*study.summary_rows(trained))
    if args.out:
        page = Path(args.out) / "report.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        example = next(_performances(paths, args.compat, []))
        study.write_report(page, reports, rows(reports), trained, example, args.command_line)
        text += f"\nopen {page}"
    warnings = [*missing.values(), *(f"left out: {text}" for text in unreadable), *warned]
    print_result(result, args.json, text, warnings)
    return 1 if unreadable else 0


def _trained(
    args: argparse.Namespace, folder: Path, tokenizers: "list[Tokenizer]"
) -> "tuple[list[Trained], list[str]]":
    """What the networks have learnt, and warnings; nothing without --train."""
    if not args.train:
        return [], []
    from aria_jax.cli.console import stage
    from aria_jax.cli.tokenizers_study import Study

    stage("reading the files")
    made = Study(
        midi_dir=folder,
        out=Path(args.out),
        steps=args.train,
        seeds=args.seeds or 3,
        label=args.label,
        digest=input_digest(folder),
        compat=args.compat,
    )
    return made.run(tokenizers)


def _check(args: argparse.Namespace) -> None:
    from data_pipeline.artifact import refuse_occupied
    from data_pipeline.errors import UserError

    for name, value in (
        ("max-files", args.max_files),
        ("train", args.train),
        ("seeds", args.seeds),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
    if args.train and not args.out:
        raise UserError("--train needs --out DIR, where the networks and the report are kept")
    if not args.train and (args.seeds or args.label):
        raise UserError("--seeds and --label have no effect without --train STEPS")
    if args.train and args.max_files:
        raise UserError("--train takes all files of the folder: leave --max-files out")
    if args.out:
        refuse_occupied(Path(args.out), "a comparison of tokenizers")


def _refuse_unknown_label(folder: Path, paths: list[Path], label: str) -> None:
    from data_pipeline.errors import UserError, did_you_mean
    from data_pipeline.metadata import IN_TEXTS, load_labels

    root = folder if folder.is_dir() else folder.parent
    table = load_labels(root)
    known = {name for path in paths for name in table.labels_for(path.relative_to(root).as_posix())}
    if label not in known and label not in IN_TEXTS:
        raise UserError(
            f"{folder}: no file has the label {label!r}{did_you_mean(label, sorted(known))}; they "
            f"have {', '.join(sorted(known)) or 'none'}. Labels stand in a metadata.csv beside the "
            "files"
        )


def _performances(
    paths: list[Path], compat: str | None, unreadable: list[str]
) -> "Iterator[Performance]":
    """What can be read and has notes; the rest is named in `unreadable`."""
    from data_pipeline.errors import InvalidMidi, printable
    from data_pipeline.midi import read_midi

    for path in paths:
        try:
            performance = read_midi(path, compat=compat)
            if not len(performance.notes):
                raise InvalidMidi("no-notes", f"{path}: no notes")
        except (InvalidMidi, OSError) as error:
            text = printable(str(error))
            unreadable.append(text if text.startswith(str(path)) else f"{path}: {text}")
            continue
        yield performance


_COLUMNS = {
    "vocab_size": ("ids", ",.0f"),
    "n_files": ("files", ",.0f"),
    "tokens_per_note": ("tokens/note", ".2f"),
    "tokens_per_s": ("tokens/s", ".1f"),
    "context_s": ("s in 8,192", ".0f"),
    "encode_notes_per_s": ("notes/s encoded", ",.0f"),
    "missing_percent": ("missing %", ".2f"),
    "added_percent": ("added %", ".2f"),
    "onset_error_ms": ("onset ms", ".1f"),
    "onset_error_p95_ms": ("onset p95", ".0f"),
    "duration_error_ms": ("duration ms", ".0f"),
    "velocity_error": ("velocity", ".1f"),
    "instruments_kept_percent": ("instruments %", ".0f"),
    "pedals": ("pedal", ""),
}


def rows(reports: "list[SchemeReport]") -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    cells = []
    for report in reports:
        values = [(getattr(report, name), form) for name, (_, form) in _COLUMNS.items()]
        shown = ["–" if value is None else format(value, form) for value, form in values]
        cells.append([report.name, *shown])
    return ["scheme", *(title for title, _ in _COLUMNS.values())], cells


def table(reports: "list[SchemeReport]") -> str:
    """The rows as Markdown."""
    return _markdown(*rows(reports))


def _markdown(header: list[str], cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
