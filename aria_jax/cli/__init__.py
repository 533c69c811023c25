"""The aria-jax command; the only room that prints, parses arguments or exits.

Here: what a verb is, and the one rule for what it writes: the same is done, other things stay.

A verb says in `writes` which files it makes and which of its arguments are inputs. Beside the file
or folder that the user named, .NAME.identity.json keeps what they were made of, their digests and
what the verb printed. The same command run again prints that and does nothing more; one that would
make something else, or replace a file that is not its own, is refused before any slow work.

`data build`, `train` and `embed` keep their identities in what they make, and go by the same rule.
Arguments that several verbs take, and how they are checked, are here too.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.artifact import (
    Identity,
    There,
    file_digest,
    hashed,
    json_digest,
    listing_difference,
    look,
    new_folder,
    refuse_inside,
    rows_digest,
    write_atomically,
)
from data_pipeline.errors import UserError, printable

VERSION = 1
MAX_LISTED = 10_000
"""Files of a folder whose digests are kept beside an output, to name those that change."""
_NO_SETTINGS = {"out", "overwrite", "json", "workers", "command_line"}
"""Arguments that change nothing in what is written."""


@dataclass(frozen=True)
class Writes:
    """What a verb makes of what.

    Attributes:
        outputs: arguments -> the files and folders that it will make; none where it only prints.
        inputs: names of the arguments that name files, folders or models.
        in_folder: the first output lies in the folder that the user named.
        source: the argument among them into whose folders nothing may be written.
    """

    outputs: Callable[[argparse.Namespace], Sequence[str | Path]]
    inputs: tuple[str, ...] = ()
    in_folder: bool = False
    source: str = ""


@dataclass(frozen=True)
class Verb:
    """A verb, as the module that does it offers it to `cli.main`.

    Attributes:
        description: what --help says of it.
        add_arguments: adds its arguments to a parser.
        run: does it; the exit status, None for 0.
        writes: what it makes of what; None where it makes nothing, or what keeps its own identity.
        parse: (parser, argv) -> arguments.
    """

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    writes: Writes | None = None
    parse: Callable[..., argparse.Namespace] = argparse.ArgumentParser.parse_args


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Adds --overwrite."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there already and is not the same"
    )


_KNOWN_SUFFIXES = {
    ".csv", ".gz", ".html", ".jpg", ".json", ".jsonl", ".kar", ".mid", ".midi", ".mp3", ".npy",
    ".npz", ".parquet", ".pdf", ".png", ".safetensors", ".svg", ".tar", ".tgz", ".tsv", ".txt",
    ".wav", ".yaml", ".yml", ".zip",
}  # fmt: skip


def check_suffix(path: str, content: str, *suffixes: str) -> None:
    """Raises `UserError` where a file to write is named as if it held something else."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _KNOWN_SUFFIXES and suffix not in suffixes:
        raise UserError(f"{path}: this will be {content}, not {suffix}; name it …{suffixes[0]}")


def check_folder_name(path: str | Path) -> None:
    """Raises `UserError` where a folder to make is a file, or is named as if it were one."""
    name = Path(path)
    if (name.suffix.lower() in _KNOWN_SUFFIXES and not name.is_dir()) or name.is_file():
        raise UserError(f"{path} is a file, or named like one: this will be a folder; name another")


def numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers of a comma-separated argument, in ascending order."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text}: expected positive numbers such as 1,5,10")
    return sorted({int(part) for part in parts})


def add_compat(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --compat, which says how MIDI files are read."""
    from data_pipeline.midi import COMPAT, STANDARD

    parser.add_argument(
        "--compat",
        choices=(*COMPAT, STANDARD),
        help=f"read MIDI files as aria-utils does, faults included, or by the standard ({default})",
    )


def chosen_reading(compat: str | None, model_reading: str, model: object) -> str:
    """How to read files for a model: as --compat says, else as its corpus was read."""
    reading = compat or model_reading
    warn_of_reading(reading, model_reading, model)
    return reading


def warn_of_reading(reading: str, model_reading: str, model: object) -> None:
    """Says on stderr that files are not read as those of a model's corpus were."""
    if reading != model_reading:
        from aria_jax.cli.console import note

        note(
            f"aria-jax: warning: reading MIDI files by {reading}; those of {model} were read by "
            f"{model_reading}"
        )


def run_once(name: str, verb: Verb, args: argparse.Namespace) -> int:
    """Runs a verb unless what it would make is there; its exit status.

    Raises:
        UserError: something else is there, and --overwrite was not said.
    """
    writes = verb.writes
    outputs = [Path(output) for output in writes.outputs(args)] if writes is not None else []
    if writes is None or not outputs:
        return verb.run(args) or 0
    sources = getattr(args, writes.source, None) or []
    for folder in [sources] if isinstance(sources, str) else sources:
        refuse_inside(outputs[0], folder, "what it is made of")
    _files_below.cache_clear()  # folders may have changed since the verb before
    from aria_jax.cli.console import note, stage

    stage("comparing with what is there")
    identity = _identity(name, args, writes)
    if writes.in_folder or outputs[0].parent.is_file():
        check_folder_name(outputs[0].parent)
    record = outputs[0].absolute().parent / f".{outputs[0].name}.identity.json"
    if writes.in_folder:
        record = record.parent.parent / f".{record.parent.name}{record.name}"
    if storage.is_remote(outputs[0]):
        if not storage.is_remote(record.parent.parent):
            raise UserError(f"{outputs[0].parent}: this is a whole bucket; name a folder in it")
        for path in (record, *outputs):
            storage.fetch(path)
    before = _read(record)
    finished = _finished(record.parent, before, outputs)
    if not args.overwrite:
        _refuse_others_files(record.parent, before, outputs)
    given = {name: getattr(args, name, None) for name in writes.inputs}
    there = look(
        outputs[0],
        identity,
        finished=finished,
        overwrite=args.overwrite,
        details=lambda _: _changes(before.get("inputs", {}), given),
    )
    form = "json" if getattr(args, "json", False) else "text"
    printed = before.get("printed", {}) if finished == identity else {}
    if there is There.DONE and form in printed:
        print(printed[form], end="")
        note(f"{outputs[0]}: already made of the same: nothing to do")
        return 0
    with ExitStack() as stack:
        for folder in {output.parent for output in outputs}:
            stack.enter_context(new_folder(folder))
            if not os.access(folder, os.W_OK):
                raise UserError(
                    f"{folder}: you may not write here; change it with chmod u+w {folder}, or name "
                    "another place"
                )
        if record.is_file():
            storage.remove(record)
        if outputs[0].is_dir() and finished is not None:
            storage.remove(outputs[0])  # a model that a verb has made, not a run
        tee = stack.enter_context(redirect_stdout(_Tee(sys.stdout)))
        stage("starting")
        status = verb.run(args) or 0
        if status == 0:
            for path in [outputs[0].parent] if writes.in_folder else outputs:
                storage.upload(path)
                storage.fetch(path)  # of a model that was written there directly
            files = {
                os.path.relpath(path, record.parent): input_digest(path)
                for path in outputs
                if path.exists()
            }
            for name in before.get("files", {}).keys() - files.keys():
                stale = record.parent / name
                if stale.is_file():  # of what was overwritten
                    storage.remove(stale)
            kept: dict[str, Any] = {"identity": identity.to_json(), "files": files}
            kept["inputs"] = {
                name.replace("_", "-"): {"given": value, "files": _listed(value)}
                for name, value in given.items()
                if value
            }
            kept["printed"] = {**printed, form: tee.getvalue()}
            write_atomically(record, json.dumps(kept))
            storage.upload(record)
    return status


def _identity(verb: str, args: argparse.Namespace, writes: Writes) -> Identity:
    values = dict(vars(args))
    given = {name: values.pop(name) for name in writes.inputs if name in values}
    inputs = {name.replace("_", "-"): input_digest(value) for name, value in given.items() if value}
    # Where it lies is no setting: the outputs themselves are compared.
    out = {str(path) for path in writes.outputs(args)}
    settings = {
        name: value
        for name, value in values.items()
        if name not in _NO_SETTINGS and str(value) not in out
    }
    return Identity(f"the output of aria-jax {verb}", VERSION, inputs, settings)


def input_digest(value: Any) -> str:
    """Of a file or folder by content; of a model by its newest checkpoint; else of the words."""
    from aria_jax.checkpoints import model_digest, newest_step
    from data_pipeline.shards import MANIFEST

    if isinstance(value, list | tuple):
        return json_digest([input_digest(one) for one in value])
    path = Path(value)
    if not path.exists() and "=" in str(value):  # NAME=FILE
        path = Path(str(value).partition("=")[2])
    if (path / MANIFEST).is_file():
        return file_digest(path / MANIFEST)
    if not path.is_dir() or newest_step(path) is not None:
        return model_digest(path)
    return rows_digest(_files_below(path))


@cache
def _files_below(folder: Path) -> tuple[tuple[str, str | None], ...]:
    """(relative path, sha256) of every file, sorted by the bytes of the path; read once a verb."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    files.sort(key=lambda file: os.fsencode(file.relative_to(folder)))
    return tuple(
        (str(file.relative_to(folder)), digest) for file, digest in hashed(files, file_digest)
    )


def _listed(value: Any) -> list[tuple[str, str | None]] | None:
    """The files of a folder that is no model or corpus, as long as a record can name them all."""
    from aria_jax.checkpoints import newest_step
    from data_pipeline.shards import MANIFEST

    if isinstance(value, list | tuple) or not Path(value).is_dir():
        return None
    if (Path(value) / MANIFEST).is_file() or newest_step(value):
        return None
    files = list(islice(_files_below(Path(value)), MAX_LISTED + 1))
    return files if len(files) <= MAX_LISTED else None


def _changes(before: dict[str, Any], given: dict[str, Any]) -> dict[str, str]:
    """What can be said of each input that is not as it was."""
    said = {}
    for name, value in given.items():
        was = before.get(name := name.replace("_", "-"), {})
        now = _listed(value) if value else None
        if was.get("given") != value:
            said[name] = f"{was.get('given') or 'none'} → {value or 'none'}"
        elif was.get("files") is not None and now is not None:
            said[name] = f"{value}: {listing_difference(was['files'], now)}"
        else:
            said[name] = f"{value} has changed"
    return said


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return {}


def _finished(folder: Path, before: dict[str, Any], outputs: Sequence[Path]) -> Identity | None:
    """What the files are made of that are all there; None where one is missing."""
    files = before.get("files", {})
    if not files or not all((folder / name).exists() for name in files):
        return None
    return Identity.from_json(before.get("identity"))


def _refuse_others_files(folder: Path, before: dict[str, Any], outputs: Sequence[Path]) -> None:
    """Raises `UserError` for a file that another wrote, or changed since."""
    files = before.get("files", {})
    own = {Path(os.path.abspath(folder / name)): digest for name, digest in files.items()}
    for path in map(Path.absolute, outputs):
        if path.is_dir() and not any(path.iterdir()):
            continue
        # What others wrote is not read: it may be a whole disk.
        if path.exists() and (path not in own or own[path] != input_digest(path)):
            what = "changed since it was made" if path in own else "there already"
            raise UserError(f"{path}: {what}; choose another output, or --overwrite to replace it")


class _Tee(io.StringIO):
    """Takes what is printed, and prints it; names that are not UTF-8 as `printable`."""

    def __init__(self, screen: Any):
        super().__init__()
        self._screen = screen

    def write(self, text: str) -> int:
        self._screen.write(printable(text))
        return super().write(printable(text))

    def flush(self) -> None:
        self._screen.flush()


class ProgressSink:
    """Progress with losses, tokens per second and share of the peak FLOP/s."""

    def __init__(self, steps: int, report: Callable[..., None]):
        self._steps, self._report = steps, report
        self._shown: dict[str, str] = {}

    def write(self, step: int, metrics: Mapping[str, float], split: str) -> None:
        """Takes up what is known at `step`."""
        formats = {"tokens_per_s": ("tokens/s", ",.0f"), "loss": (f"{split} loss", ".3f")}
        formats["mfu"] = ("MFU", ".1%")
        for name, (label, shape) in formats.items():
            if name in metrics:
                self._shown[label] = format(metrics[name], shape)
        self._report(step, self._steps, ", ".join(f"{k} {v}" for k, v in self._shown.items()))

    def close(self) -> None:
        """Nothing to close: the progress ends with its context."""
