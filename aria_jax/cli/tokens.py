"""`aria-jax tokenize` and `aria-jax detokenize`: between MIDI files and token ids."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from aria_jax.cli import Verb, Writes, add_overwrite

if TYPE_CHECKING:
    import numpy as np

_TOKENIZE = """\
Print the token ids of a MIDI file on one line, or as JSON {"ids": [...], "n_notes": N, "preset",
"reading": "standard" or "aria-utils", "repaired": why a file that is cut was read in part, or ""}.

examples:
  aria-jax tokenize nocturne.mid
  aria-jax tokenize nocturne.mid --json > ids.json
  aria-jax tokenize half_a_download.mid --repair"""


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
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


def _tokenize(args: argparse.Namespace) -> None:
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
        "n_notes": tokenizer.n_notes(ids),
        "preset": args.preset,
        "reading": reading_name(performance.compat),
        "repaired": performance.repaired,
    }
    print_result(result, args.json, " ".join(map(str, ids)))


TOKENIZE = Verb(_TOKENIZE, _tokenize_arguments, _tokenize)


_DETOKENIZE = """\
Write the MIDI file that token ids stand for. Reads what `aria-jax tokenize --json` and
`aria-jax generate --json` print, or a bare JSON list.

example:
  aria-jax detokenize ids.json out.mid"""


def _detokenize_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax detokenize`."""
    parser.add_argument("ids", help='JSON file: [6, 0, ...] or {"ids": [6, 0, ...]}')
    parser.add_argument("out", help="MIDI file to write")
    parser.add_argument("--preset", default="aria", help="aria or pedal (default: aria)")
    add_overwrite(parser)


def _detokenize(args: argparse.Namespace) -> None:
    """Detokenises and writes."""
    from aria_jax.cli.console import check_suffix
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


DETOKENIZE = Verb(
    _DETOKENIZE, _detokenize_arguments, _detokenize, Writes(lambda args: [args.out], ("ids",))
)


def read_ids(path: str) -> "np.ndarray":
    """Token ids of a JSON file, int64; what `aria-jax tokenize --json` prints, or a bare list.

    Raises:
        UserError: something else.
    """
    import numpy as np

    from data_pipeline.errors import UserError

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        ids = content["ids"] if isinstance(content, dict) else content
        if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]  # one continuation of `aria-jax generate --json`
        whole = isinstance(ids, list) and all(type(i) is int for i in ids)
    except (ValueError, KeyError, UnicodeDecodeError):
        whole = False
    if not whole:
        raise UserError(f'{path}: expected token ids as JSON, [6, 0, …] or {{"ids": [6, 0, …]}}')
    return np.array(ids, np.int64)
