"""`aria-jax tokenize`: MIDI file to token ids."""

import argparse

DESCRIPTION = """\
Print the token ids of a MIDI file on one line, or as JSON {"ids": [...], "n_notes": N}.

examples:
  aria-jax tokenize nocturne.mid
  aria-jax tokenize nocturne.mid --json > ids.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax tokenize`."""
    parser.add_argument("file", help="MIDI file")
    parser.add_argument("--preset", default="aria", help="aria or pedal (default: aria)")
    parser.add_argument("--solo-piano", action="store_true", help="drop other instruments")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Tokenises and prints."""
    from aria_jax.cli.console import print_result
    from data_pipeline.cleaning import Cleaning
    from data_pipeline.errors import UserError
    from data_pipeline.midi import read_midi
    from data_pipeline.tokenizer import Tokenizer

    tokenizer = Tokenizer.preset(args.preset)
    try:
        performance = read_midi(args.file)
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    performance = Cleaning(solo_piano=args.solo_piano).clean(performance)
    ids = tokenizer.encode(performance).tolist()
    result = {"ids": ids, "n_notes": len(performance.notes), "preset": args.preset}
    print_result(result, args.json, " ".join(map(str, ids)))
