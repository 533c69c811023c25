"""`aria-jax tokenize`: MIDI file to token ids."""

import argparse

DESCRIPTION = """\
Print the token ids of a MIDI file on one line, or as JSON {"ids": [...], "n_notes": N, "preset",
"reading": "standard" or "aria-utils", "repaired": why a file that is cut was read in part, or ""}.

examples:
  aria-jax tokenize nocturne.mid
  aria-jax tokenize nocturne.mid --json > ids.json
  aria-jax tokenize half_a_download.mid --repair"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax tokenize`."""
    from aria_jax.cli.console import add_compat

    parser.add_argument("file", help="MIDI file")
    parser.add_argument("--preset", default="aria", help="aria or pedal (default: aria)")
    parser.add_argument("--solo-piano", action="store_true", help="drop other instruments")
    add_compat(parser, "default: standard")
    parser.add_argument(
        "--repair", action="store_true", help="of a file that is cut, take what is before the break"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Tokenises and prints."""
    import sys

    from aria_jax.cli.console import print_result
    from data_pipeline.cleaning import Cleaning
    from data_pipeline.errors import UserError
    from data_pipeline.midi import STANDARD, compat_of, read_midi, reading_name
    from data_pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.preset(args.preset)
    try:
        performance = read_midi(
            args.file, compat=compat_of(args.compat or STANDARD), repair=args.repair
        )
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    if performance.repaired:
        print(f"{args.file}: repaired: {performance.repaired}", file=sys.stderr)
    performance = Cleaning(solo_piano=args.solo_piano).clean(performance)
    ids = tokenizer.encode(performance).tolist()
    result = {
        "ids": ids,
        "n_notes": len(performance.notes),
        "preset": args.preset,
        "reading": reading_name(performance.compat),
        "repaired": performance.repaired,
    }
    print_result(result, args.json, " ".join(map(str, ids)))
