"""Decides between resume, warm start and random init, and what a resumed run may change."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aria_jax.checkpoints import (
    DIRECTORY,
    hub,
    model_digest,
    model_path,
    newest_record,
    newest_step,
)
from aria_jax.config import RunConfig, to_dict
from data_pipeline import storage
from data_pipeline.artifact import MAX_DIFFERENCES, Identity, json_digest
from data_pipeline.errors import UserError
from data_pipeline.loaders.mixture import Data, sources_of, written
from data_pipeline.settings import from_dict
from data_pipeline.shards import load_manifest

if TYPE_CHECKING:  # the command line decides before it imports jax
    from aria_jax.checkpoints.manager import Checkpointer

# What may differ when a run is resumed: none of it changes what the steps so far have computed,
# but for the order in which floating-point numbers are summed.
FREE = {
    "mesh",
    "compute",
    "data.workers",
    "data.sources",  # the corpus itself is compared, wherever it lies
    "train.steps",
    "train.epochs",
    "train.grad_accumulation",
    "train.eval_every",
    "train.eval_batches",
    "train.log_every",
    "train.trackers",
    "train.stall_minutes",
    "train.checkpoint_every",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.profile_steps",
    "train.max_bad_steps",
}

ALLOWABLE = {"data": "corpus", "dtype": "compute.dtype"}
"""What else may differ where it is asked for: the word for it, and what it means."""


@dataclass(frozen=True)
class InitFrom:
    """What was decided, and the message that says so."""

    kind: Literal["resume", "checkpoint", "published", "scratch"]
    path: Path | str | None  # a name of the hub stays one
    message: str


def resolve_init(
    workdir: Path, init_from: str | Path | None, checkpointer: "Checkpointer"
) -> InitFrom:
    """Chooses how to begin:

    1. the run's own workdir has a checkpoint: resume it (`init_from` was how it began);
    2. `init_from` is a checkpoint: start from its weights;
    3. `init_from` is a published .safetensors file, or hf://OWNER/NAME: start from its weights;
    4. otherwise: from scratch.

    Raises:
        UserError: `init_from` is neither a checkpoint nor a .safetensors file, or not what the run
            in the workdir began from.
    """
    if steps := checkpointer.steps():
        if init_from is not None:
            step, record = checkpointer.newest(checkpointer.record)
            check_same_init(record, step, init_from, workdir)
        return InitFrom("resume", workdir, f"resuming {workdir} at step {steps[-1]}")
    return init_of_new_run(init_from)


def init_of_new_run(init_from: str | Path | None) -> InitFrom:
    """How a new run begins.

    Raises:
        UserError: `init_from` is neither a checkpoint nor a .safetensors file, or holds nothing.
    """
    if init_from is None:
        return InitFrom("scratch", None, "starting from scratch: random weights")
    path = model_path(init_from)
    if path.suffix == ".safetensors" and path.is_file():
        _check_safetensors(path)
        if hub.is_name(init_from):
            message = f"starting from the published weights {hub.pinned(init_from)}"
            return InitFrom("published", hub.written(init_from), message)
        return InitFrom("published", path, f"starting from the published weights {path}")
    if (path / DIRECTORY).is_dir():
        if newest_step(path) is None:
            raise UserError(f"--init-from {path}: no complete checkpoint in {path / DIRECTORY}")
        return InitFrom("checkpoint", path, f"starting from the weights of {path}")
    raise UserError(f"--init-from {path}: neither a checkpoint nor a .safetensors file")


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if not file.keys():
                raise UserError(f"--init-from {path}: holds no weights")
    except SafetensorError as error:
        raise UserError(f"--init-from {path}: not a readable safetensors file ({error})") from None


def source_record(init_from: str | Path) -> dict[str, str]:
    """What a run's checkpoints say of the weights it began from."""
    said = {"path": _source_name(init_from), "digest": model_digest(init_from)}
    return {**said, "commit": hub.pinned(init_from)} if hub.is_name(init_from) else said


def _source_name(init_from: str | Path) -> str:
    """What weights are called on any machine."""
    if hub.is_name(init_from):
        return hub.written(init_from)
    return storage.url(model_path(init_from).resolve())


def check_same_init(
    record: dict[str, Any], step: int, init_from: str | Path, workdir: str | Path
) -> None:
    """Raises `UserError` unless the run in `workdir` began from `init_from`.

    The same command run again resumes: the same path, whatever became of it, or the same weights.

    Args:
        record: of the run's newest checkpoint, which is of `step`.
    """
    began = record.get("init_from") or {}
    if began.get("path") == _source_name(init_from):
        return
    if began.get("digest") == model_digest(init_from):
        return
    known = "init_from" in record
    was = began.get("path") or ("random weights" if known else "weights it does not name")
    raise UserError(
        f"{workdir} already holds a run that began from {was} and is at step {step}, so "
        f"--init-from {init_from} would do nothing; leave it out to resume that run, or choose "
        "another --workdir"
    )


def corpus_record(data: Data) -> dict[str, Any]:
    """What a run's checkpoints say of the corpus they were trained on, or of a mixture."""
    sources = sources_of(data)
    records = [_one_corpus(source.path) for source in sources]
    if len(sources) == 1:
        return records[0]
    parts = [
        {**record, "weight": source.weight} for record, source in zip(records, sources, strict=True)
    ]
    digest = json_digest([[part["digest"], round(part["weight"], 9)] for part in parts])
    return {"path": ", ".join(written(sources)), "digest": digest, "parts": parts}


def _one_corpus(data_dir: Path) -> dict[str, Any]:
    manifest = load_manifest(data_dir)
    made_of = {"n_files": manifest.get("source", {}).get("n_files"), **manifest.get("identity", {})}
    return {"path": storage.url(data_dir), "digest": json_digest(manifest), "made_of": made_of}


def check_resumable(
    saved: dict[str, Any],
    now: dict[str, Any],
    workdir: Path,
    allow_change: Collection[str] = (),
) -> None:
    """Raises `UserError` naming each setting that differs from the run to be resumed.

    Args:
        saved: record of the checkpoint, with "config", "tokenizer" and "corpus".
        now: the same of the run about to start.
        allow_change: of `ALLOWABLE`; what differs among them is warned of.
    """
    complete = to_dict(from_dict(RunConfig, saved["config"]))  # new settings have their defaults
    before = _flat({**complete, "tokenizer": saved["tokenizer"]})
    after = _flat({**now["config"], "tokenizer": now["tokenizer"]})
    fixed = {
        key
        for key in before.keys() | after.keys()
        if key == "compute.dtype" or not {key, key.split(".")[0]} & FREE
    }
    changed = {
        key: f"{key}: was {before.get(key)}, is {after.get(key)}"
        for key in sorted(fixed)
        if before.get(key) != after.get(key)
    }
    if "corpus" not in saved:
        warnings.warn(
            f"{workdir}: its checkpoints are of an earlier version and do not say which corpus "
            f"they were trained on; it is taken to be {now['corpus']['path']}",
            stacklevel=2,
        )
    elif saved["corpus"]["digest"] != now["corpus"]["digest"]:
        changed["corpus"] = _corpus_change(saved["corpus"], now["corpus"])
    for word in allow_change:
        if text := changed.pop(ALLOWABLE[word], None):
            warnings.warn(f"going on although it changed, as asked: {text}", stacklevel=2)
    if changed:
        words = [word for word, key in ALLOWABLE.items() if key in changed]
        ways = "set them back, or choose another --workdir"
        if len(words) == len(changed):
            ways += f", or go on all the same with --allow-change {','.join(words)}"
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(changed.values())}); {ways}"
        )


def compute_dtype(workdir: str | Path | None, accelerator: bool) -> Literal["float32", "bfloat16"]:
    """What `compute.dtype=auto` stands for: what the run in `workdir` began with, and for a new one
    bfloat16 wherever there are matrix units for it.
    """
    record = None if workdir is None else newest_record(workdir)
    began = ((record or {}).get("config") or {}).get("compute", {}).get("dtype", "auto")
    if began != "auto":
        return began
    return "bfloat16" if accelerator else "float32"


def _corpus_change(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Which corpus is another, and what it is made of that the first was not."""
    text = f"corpus: was {was['path']}, is {now['path']}"
    if was["path"] == now["path"]:
        text = f"corpus: {now['path']} was built anew since"
    before, made_of = was.get("made_of", {}), now.get("made_of", {})
    old, new = Identity.from_json(before), Identity.from_json(made_of)
    if old is None or new is None:
        return text
    counts = [before.get("n_files"), made_of.get("n_files")]
    details = {"files": "others", "labels": "others of these files"}
    if None not in counts and counts[0] != counts[1]:
        details["files"] = f"{counts[0]:,} → {counts[1]:,}"
    found = new.differences(old, details)[:MAX_DIFFERENCES]
    return f"{text} ({', '.join(found)})" if found else text


def check_allow_change(words: Collection[str]) -> None:
    """Raises `UserError` for a word that `ALLOWABLE` has not."""
    if unknown := sorted(set(words) - ALLOWABLE.keys()):
        raise UserError(
            f"--allow-change {','.join(unknown)}: expected one or more of {', '.join(ALLOWABLE)}"
        )


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for section, values in sections.items():
        if isinstance(values, dict):
            for name, value in values.items():
                flat[f"{section}.{name}"] = list(value) if isinstance(value, tuple) else value
        else:
            flat[section] = values
    return flat
