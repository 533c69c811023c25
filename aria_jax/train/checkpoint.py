"""Checkpoints: an Orbax CheckpointManager directory of params, opt_state and a JSON record.

The record holds the run's config, the tokenizer and the data position. The position is the step
(with the seed in the config): loaders are random access, so element i of the stream depends on
(seed, i) alone and any number of processes can go on from it, which Grain's own iterator state
does not allow.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from aria_jax.config import ComputeConfig, ModelConfig, from_dict, to_dict
from aria_jax.models.heads import Model, Parameters, abstract_model, split_model
from aria_jax.sharding import parameter_shardings
from data_pipeline.errors import UserError
from data_pipeline.tokenizer import Tokenizer

DIRECTORY = "checkpoints"


@dataclass(frozen=True)
class LoadedModel:
    """A model from disk.

    Attributes:
        model: with its weights.
        config: its architecture.
        tokenizer: preset of the tokenizer it was trained with.
        step: optimiser steps it was trained for.
        path: where it was read from.
    """

    model: Model
    config: ModelConfig
    tokenizer: str
    step: int
    path: str

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of config, step and a sample of each weight: tells two models apart."""
        digest = hashlib.sha256(json.dumps([to_dict(self.config), self.step]).encode())
        for leaf in jax.tree.leaves(split_model(self.model)[1]):
            digest.update(np.asarray(leaf.reshape(-1)[:1024]).tobytes())
        return digest.hexdigest()[:16]


class Checkpointer:
    """The checkpoints of one run; writes in the background, a write is all or nothing."""

    def __init__(self, workdir: str | Path, keep: int = 3):
        self.directory = (Path(workdir) / DIRECTORY).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        names = ("params", "opt_state", "record")
        self._manager = ocp.CheckpointManager(self.directory, item_names=names, options=options)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, params: Parameters, opt_state: Any | None, record: dict[str, Any]
    ) -> None:
        """Starts writing; returns once the arrays may be changed. A step is written once."""
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(params),
            "record": ocp.args.JsonSave({**record, "step": step}),
        }
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardSave(jax.tree.leaves(opt_state))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["record"]

    def restore_params(self, step: int, like: Parameters) -> Parameters:
        """Weights, laid out and typed like `like` (arrays or ShapeDtypeStructs with sharding)."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["params"]

    def restore_opt_state(self, step: int, like: Any) -> Any:
        """Optimiser state, laid out like `like`."""
        leaves, structure = jax.tree.flatten(like)
        args = ocp.args.Composite(opt_state=ocp.args.StandardRestore(leaves))
        restored = self._manager.restore(step, args=args)["opt_state"]
        return jax.tree.unflatten(structure, restored)

    def wait(self) -> None:
        """Returns when everything is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and lets go of the directory."""
        self._manager.close()


def abstract_parameters(model: Model, mesh: jax.sharding.Mesh | None) -> Parameters:
    """Shapes, types and shardings of a model's weights; on one device without a mesh."""
    params = split_model(model)[1]
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, params)
    else:
        shardings = parameter_shardings(params, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )


def model_record(config: ModelConfig, tokenizer: str) -> dict[str, Any]:
    """The part of a checkpoint's record that `load_model` needs."""
    return {
        "model": to_dict(config),
        "tokenizer": {"preset": tokenizer, "hash": Tokenizer.preset(tokenizer).hash},
    }


def save_model(path: str | Path, model: Model, *, tokenizer: str = "aria", step: int = 0) -> None:
    """Writes a model as a checkpoint that `load_model`, `--checkpoint` and `--init-from` take."""
    checkpointer = Checkpointer(path)
    if checkpointer.steps():
        checkpointer.close()
        raise UserError(f"{path}: already holds checkpoints; name a new directory")
    checkpointer.save(step, split_model(model)[1], None, model_record(model.config, tokenizer))
    checkpointer.close()


def load_model(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    compute: ComputeConfig | None = None,
) -> LoadedModel:
    """The newest model of a run or of `save_model`, on one device or cut over a mesh.

    Raises:
        UserError: no checkpoint there, or one that another version wrote.
    """
    path = Path(path)
    if not (path / DIRECTORY).is_dir():
        raise UserError(f"{path}: no checkpoint here (expected the --workdir of a training run)")
    checkpointer = Checkpointer(path)
    try:
        if not checkpointer.steps():
            raise UserError(f"{path}: its checkpoints folder is empty; was the run interrupted?")
        step = checkpointer.steps()[-1]
        record = checkpointer.record(step)
        preset = record["tokenizer"]["preset"]
        if record["tokenizer"]["hash"] != Tokenizer.preset(preset).hash:
            raise UserError(f"{path}: trained with another version of the {preset} tokenizer")
        config = from_dict(ModelConfig, record["model"])
        model = abstract_model(config, compute or ComputeConfig())
        merge, _ = split_model(model)
        params = checkpointer.restore_params(step, abstract_parameters(model, mesh))
        return LoadedModel(merge(params), config, preset, step, str(path))
    finally:
        checkpointer.close()
