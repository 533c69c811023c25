"""How a run begins: the one place where resuming, finetuning and starting afresh are told apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aria_jax.checkpoints.manager import DIRECTORY, Checkpointer
from aria_jax.config import RunConfig, from_dict, to_dict
from data_pipeline.errors import UserError

# What may differ when a run is resumed: none of it changes what the steps so far have computed,
# but for the order in which floating-point numbers are summed.
FREE = {
    "mesh",
    "compute",
    "data.workers",
    "train.steps",
    "train.epochs",
    "train.grad_accumulation",
    "train.eval_every",
    "train.eval_batches",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.profile_steps",
    "train.max_bad_steps",
}


@dataclass(frozen=True)
class Start:
    """What was decided, and the sentence that says so."""

    kind: Literal["resume", "checkpoint", "published", "scratch"]
    path: Path | None
    sentence: str


def decide(workdir: Path, init_from: str | Path | None, checkpointer: Checkpointer) -> Start:
    """Chooses how to begin:

    1. the run's own workdir has a checkpoint: resume it (`init_from` was its beginning, not ours);
    2. `init_from` is a checkpoint: start from its weights;
    3. `init_from` is a published .safetensors file: convert it and start from its weights;
    4. otherwise: from scratch.

    Raises:
        UserError: `init_from` is neither a checkpoint nor a .safetensors file.
    """
    if steps := checkpointer.steps():
        return Start("resume", workdir, f"resuming {workdir} at step {steps[-1]}")
    if init_from is None:
        return Start("scratch", None, "starting from scratch: random weights")
    path = Path(init_from)
    if path.suffix == ".safetensors" and path.is_file():
        return Start("published", path, f"starting from the published weights {path}")
    if (path / DIRECTORY).is_dir():
        return Start("checkpoint", path, f"starting from the weights of {path}")
    raise UserError(f"--init-from {path}: neither a checkpoint nor a .safetensors file")


def refuse_changed_run(saved: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Raises `UserError` naming each setting that differs from the run to be resumed.

    Args:
        saved: record of the checkpoint, with "config" and "tokenizer".
        now: the same of the run about to start.
    """
    complete = to_dict(from_dict(RunConfig, saved["config"]))  # new settings have their defaults
    before = _flat({**complete, "tokenizer": saved["tokenizer"]})
    after = _flat({**now["config"], "tokenizer": now["tokenizer"]})
    changed = [
        f"{key}: was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not {key, key.split(".")[0]} & FREE
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(changed)}); "
            "set them back, or choose another --workdir"
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
