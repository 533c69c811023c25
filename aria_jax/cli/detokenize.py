"""`aria-jax detokenize`: token ids to MIDI file."""

import argparse

from aria_jax.cli.output import Writes, add_overwrite

DESCRIPTION = """\
Write the MIDI file that token ids stand for. Reads what `aria-jax tokenize --json` and
`aria-jax generate --json` print, or a bare JSON list.

example:
  aria-jax detokenize ids.json out.mid"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax detokenize`."""
    parser.add_argument("ids", help='JSON file: [6, 0, ...] or {"ids": [6, 0, ...]}')
    parser.add_argument("out", help="MIDI file to write")
    parser.add_argument("--preset", default="aria", help="aria or pedal (default: aria)")
    add_overwrite(parser)


WRITES = Writes(lambda args: [args.out], ("ids",))


def run(args: argparse.Namespace) -> None:
    """Detokenises and writes."""
    from aria_jax.cli.console import check_suffix
    from aria_jax.cli.generate import read_ids
    from data_pipeline.errors import UserError, check_file
    from data_pipeline.midi import write_midi
    from data_pipeline.tokenizer import Tokenizer

    check_suffix(args.out, "a MIDI file", ".mid", ".midi", ".kar")
    check_file(args.ids, "a JSON file of token ids")
    performance = Tokenizer.preset(args.preset).decode(read_ids(args.ids))
    if not len(performance.notes):
        raise UserError(
            f"{args.ids}: no notes in these tokens: a note is three, (instrument, pitch, velocity) "
            "(onset) (duration), and its instrument is announced before <S>"
        )
    try:
        write_midi(performance, args.out)
    except OSError as error:
        raise UserError(f"{args.out}: cannot write ({error.strerror})") from None
    print(f"{args.out}: {len(performance.notes)} notes")
