"""The `aria-jax` command: finds the verb, imports only its module, prints user errors on one line.

A verb module defines `DESCRIPTION`, `add_arguments(parser)` and `run(args) -> int | None`; and
`PARSE`, a method of ArgumentParser, where `parse_args` will not do.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from data_pipeline.errors import UserError

# verb -> (module under aria_jax.cli, one line for --help). Nothing here imports jax.
VERBS = {
    "tokenize": ("tokenize", "MIDI file to token ids"),
    "detokenize": ("detokenize", "token ids to MIDI file"),
    "data": ("data", "build, inspect and sample training data"),
    "train": ("train", "pretrain, continue, contrastive, classify"),
    "compile": ("compile", "what a program takes on TPUs that are not here"),
    "generate": ("generate", "continue a performance"),
    "score": ("score", "negative log-likelihood of performances under a model"),
    "embed": ("embed", "one embedding per file, as Parquet"),
    "classify": ("classify", "label files with a finetuned classifier"),
    "probe": ("probe", "how much a linear classifier reads from embeddings"),
    "retrieve": ("retrieve", "retrieval metrics of embeddings: MRR, Hit@k"),
    "search": ("search", "the performances nearest to a query"),
    "bench-suite": (
        "bench_suite",
        "every labelled task in a folder, in one table beside the paper's",
    ),
    "convert": ("convert", "weights from and to published PyTorch checkpoints"),
    "listening-test": ("listening_test", "blinded A/B pages, and the analysis of their votes"),
    "demo": ("demo", "the whole story on a small corpus, ending in an HTML report"),
}

EPILOG = """\
examples:
  aria-jax demo demo-out                                  everything, in minutes, without a GPU
  aria-jax data build my_midis my_data                    tokenise a folder
  aria-jax train pretrain --data my_data --workdir run1   train on it
  aria-jax embed my_midis emb.parquet --checkpoint run1   one vector per file

`aria-jax VERB --help` explains each verb."""


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    listing = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    return argparse.ArgumentParser(
        prog="aria-jax",
        usage="aria-jax VERB ...",
        description="Learn from piano performances in MIDI.\n\nverbs:\n" + listing,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0 done, 1 it ran but failed, 2 user error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    verb = argv[0]
    try:
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`aria-jax --help` lists them"
            raise UserError(f"unknown verb {verb!r}: {hint}")
        module = importlib.import_module(f"aria_jax.cli.{VERBS[verb][0]}")
        verb_parser = argparse.ArgumentParser(
            prog=f"aria-jax {verb}",
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb_parser)
        parse = getattr(module, "PARSE", argparse.ArgumentParser.parse_args)
        return module.run(parse(verb_parser, argv[1:])) or 0
    except UserError as error:
        print(f"aria-jax: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `aria-jax ... | head` is no error
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("aria-jax: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
