"""The `aria-jax` command: finds the verb, imports only its module, prints user errors on one line.

A module offers each of its verbs as a `cli.Verb` of that name: `bench-suite` is BENCH_SUITE.
"""

import argparse
import importlib
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.errors import UserError, did_you_mean, disk_error, printable

if TYPE_CHECKING:
    from aria_jax.cli import Verb

# verb -> (module under aria_jax.cli, one line for --help). Nothing here imports jax.
VERBS = {
    "tokenize": ("convert", "MIDI file to token ids"),
    "detokenize": ("convert", "token ids to MIDI file"),
    "data": ("data", "build, inspect and sample training data"),
    "train": ("train", "pretrain, continue, contrastive, classify"),
    "compile": ("compile", "what a program takes on TPUs that are not here"),
    "generate": ("generate", "continue a performance"),
    "score": ("score", "negative log-likelihood of performances under a model"),
    "embed": ("embed", "one embedding per file, as Parquet"),
    "classify": ("score", "label files with a finetuned classifier"),
    "probe": ("probe", "how much a linear classifier reads from embeddings"),
    "retrieve": ("search", "retrieval metrics of embeddings: MRR, Hit@k"),
    "search": ("search", "the performances nearest to a query"),
    "bench-suite": ("probe", "every labelled task in one table, beside published figures"),
    "serve": ("serve", "play a duet in the browser; the models for programs"),
    "tokenizers": ("tokenizers", "the schemes of tokens, and what each loses"),
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


class Parser(argparse.ArgumentParser):
    """Mistakes become one `UserError`, with the nearest right word."""

    stray = ""
    """Option that a word without one was meant for, e.g. "--prompt"."""
    _given: Sequence[str] = ()

    def knows(self, option: str) -> bool:
        """Whether an argument that begins with dashes is, or begins, an option of this parser."""
        name = option.partition("=")[0]
        return any(known.startswith(name) for known in self._options())

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; keeps the arguments for `error`."""
        self._given = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises it."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            given, choices = found[1], [c.strip(" '") for c in found[2].split(",")]
            message = message[: found.start()] + (
                f"no {given!r}{did_you_mean(given, choices)} (one of {', '.join(choices)})"
            )
        elif found := re.match(r"unrecognized arguments: (.*)$", message):
            for action in self._actions:  # told by the sub-verb, whose options they are not
                if isinstance(action, argparse._SubParsersAction):
                    given = next((a for a in self._given if a in action.choices), None)
                    if given is not None:
                        action.choices[given].error(message)
            first = found[1].split()[0].partition("=")[0]
            message = f"unknown argument {found[1]}" + did_you_mean(first, self._options())
            if self.stray and not first.startswith("-"):
                message += f"; did you mean {self.stray} {first}?"
        elif found := re.match(r"argument (\S+): invalid (int|float) value: (.*)$", message):
            kind = "a whole number" if found[2] == "int" else "a number"
            message = f"{found[1]} {found[3]}: expected {kind}"
        elif found := re.match(r"argument (\S+): expected one argument", message):
            at = self._given.index(found[1]) if found[1] in self._given else -1
            if 0 <= at < len(self._given) - 1 and not self.knows(name := self._given[at + 1]):
                message += f", and {name} looks like an option: write {found[1]}={name}"
        elif message.startswith("the following arguments are required"):
            unknown = [a for a in self._given if a.startswith("--") and not self.knows(a)]
            for option in unknown:
                message += f"; unknown argument {option}" + did_you_mean(option, self._options())
        raise UserError(f"{self.prog.removeprefix('aria-jax ')}: {message}; see {self.prog} --help")

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def parse_with_settings(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of a verb whose settings, key=value, may stand between the options, too.

    Raises:
        UserError: --steps 5, which should be steps=5, and what argparse finds.
    """
    from aria_jax.config import full_name

    for at, option in enumerate(argv):
        if not option.startswith("--") or parser.knows(option):
            continue
        name, _, value = option.lstrip("-").replace("-", "_").partition("=")
        try:
            full_name(name)
        except UserError:
            continue
        behind = (text for text in argv[at + 1 :] if not text.startswith("--"))
        raise UserError(
            f"{parser.prog.removeprefix('aria-jax ')}: {option} is a setting, not an option; "
            f"did you mean {name}={value or next(behind, '…')}?"
        )
    return parser.parse_intermixed_args(argv)


_NEXT_TOKEN, _POOLED = ("pretrain", "continue"), ("contrastive", "classify")
_SLICED = (*_POOLED, "render")
_READ_BY = {
    "data.packing": _NEXT_TOKEN,
    "data.max_piece_tokens": _NEXT_TOKEN,
    "train.z_loss": (*_NEXT_TOKEN, "render"),
    "data.min_slice_notes": _SLICED,
    "data.max_slice_notes": _SLICED,
    "train.pooling": _POOLED,
    "train.temperature": ("contrastive",),
}
"""Tasks that a setting is for, where not for all; those of the section contrastive are, too."""


def name_without_effect(task: str, settings: Sequence[str]) -> None:
    """Says which settings of the command line a training task does not read."""
    from aria_jax.cli.console import note
    from aria_jax.config import full_name

    for setting in settings:
        name = full_name(setting.partition("=")[0])
        only = ("contrastive",) if name.startswith("contrastive.") else (task,)
        if task not in (tasks := _READ_BY.get(name, only)):
            note(f"aria-jax: warning: {setting} has no effect: it is for {' and '.join(tasks)}")


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    listing = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    return argparse.ArgumentParser(
        prog="aria-jax",
        usage="aria-jax VERB ... | --version",
        description="Learn from piano performances in MIDI.\n\nverbs:\n" + listing,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status.

    0 done, 1 it ran but failed, 2 the user's mistake, 130 Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    if given[0] in ("--version", "-V"):
        print(_version())
        return 0
    from aria_jax.cli.console import working

    try:
        with working(given[0]):
            return run_verb(given[0], given[1:])
    except UserError as error:
        print(f"aria-jax: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `aria-jax ... | head` is no error
        sys.stderr.close()
        return 0
    except OSError as error:
        if (said := disk_error(error)) is None:
            raise
        print(f"aria-jax: error: {printable(said)}", file=sys.stderr)
        return 2
    except Exception as error:
        if (said := out_of_memory(error)) is None:
            raise
        print(f"aria-jax: error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        told = "aria-jax: interrupted; run the same command again to go on"
        if argv is None:
            from aria_jax.cli.console import end_interrupted

            end_interrupted(told)
        print(told, file=sys.stderr)
        return 130


def out_of_memory(error: Exception) -> str | None:
    """What a user can do about an error of the memory; None for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return None
    found = re.search(r"allocat\w* (\d+) bytes", text)
    size = f" ({int(found[1]) / 2**30:.1f} GiB more were wanted)" if found else ""
    return (
        f"the memory does not suffice{size}: ask for less at once (a smaller batch, model or "
        "context, fewer --n, fewer --workers)"
    )


def run_verb(name: str, argv: Sequence[str]) -> int:
    """Runs a verb; its exit status. Raises what `main` tells the user."""
    if name not in VERBS:
        hint = did_you_mean(name, VERBS) or "; `aria-jax --help` lists them"
        raise UserError(f"unknown verb {name!r}{hint}")
    if "" in argv:  # as a path it would be the folder in which the command runs
        raise UserError(f"{name}: an argument is empty; is a variable of your shell not set?")
    # What libraries say about themselves is no news to a user; errors still are.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if name != "compile":  # which reads what the compiler writes meanwhile
        _keep_compiled()
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Told to the processes that start from here: what a Ctrl-C leaves behind is tidied up silently.
    sys.warnoptions.append("ignore:resource_tracker")
    module = importlib.import_module(f"aria_jax.cli.{VERBS[name][0]}")
    verb: Verb = getattr(module, name.replace("-", "_").upper())
    parser = Parser(
        prog=f"aria-jax {name}",
        description=verb.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    args = verb.parse(parser, argv)
    args.command_line = shlex.join(["aria-jax", name, *argv])  # reports say what made them
    from aria_jax.cli import run_once

    bring(args)
    for model in ("checkpoint", "embedding_checkpoint"):
        if path := getattr(args, model, None):  # before the seconds that loading jax takes
            from aria_jax.checkpoints import check_model

            check_model(path)
    return run_once(name, verb, args)


def _keep_compiled() -> None:
    """Programs that take a second or more to compile are kept on this disk for the next command."""
    from data_pipeline.storage import mirror

    folder = mirror() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written: every command compiles for itself
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))


MODELS = ("checkpoint", "embedding_checkpoint", "base", "init_from")
"""Arguments that name a model, which may be one of a hub."""


def bring(args: argparse.Namespace) -> None:
    """Makes a place of this disk of every argument with a scheme, and brings what lies there.

    Weights of a hub keep their name, and those that a training begins from are left to it: where
    it goes on, it needs none.

    Raises:
        UserError: an unknown scheme; no such bucket, no right to read it, or no answer; as
            `hub.local`.
    """
    from aria_jax.checkpoints import hub
    from aria_jax.cli.console import stage
    from data_pipeline import storage

    places: list[Path] = []

    def placed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(placed, value))
        if not isinstance(value, str | Path):
            return value
        name, equals, path = str(value).partition("=")  # NAME=FILE
        if equals and "/" not in name and storage.is_url(path):
            return f"{name}={placed(path)}"
        path, _, weight = str(value).rpartition(":")  # SHARDS:WEIGHT
        if storage.is_url(path) and weight.replace(".", "", 1).isdigit():
            return f"{placed(path)}:{weight}"
        if not storage.is_url(value):
            return value
        if hub.is_name(value):
            raise UserError(f"{value}: hf:// names weights, where --checkpoint or --init-from is")
        places.append(storage.place(value))
        return str(places[-1])

    for name, value in vars(args).items():
        if name in MODELS and hub.is_name(value):
            hub.written(value)
            if name != "init_from":
                bring_weights(value)
        elif name != "command_line":
            setattr(args, name, placed(value))
    for path in places:
        stage(f"bringing {printable(str(path))}")
        storage.fetch(path)


def bring_weights(source: str) -> None:
    """Downloads weights that are named hf://…, with progress; nothing for another name."""
    from aria_jax.checkpoints import hub
    from aria_jax.cli.console import note, progress_bar, stage

    if not hub.is_name(source):
        return
    stage(f"asking for {source}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with progress_bar(f"bringing {source}", "byte") as progress:
            hub.local(source, progress)
    for warning in told:
        note(f"aria-jax: warning: {warning.message}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    from aria_jax import __version__

    try:
        jax = version("jax")
    except PackageNotFoundError:
        jax = "missing"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"aria-jax {__version__} (Python {python}, jax {jax})"


if __name__ == "__main__":
    sys.exit(main())
