"""Checkpoints: an Orbax CheckpointManager directory of params, opt_state, ema and a JSON record.

The record holds the run's config, the tokenizer and the position: seed, epoch and step. Loaders
are random access, so row i of the stream depends on (seed, i) alone, and so do the keys of
dropout: any number of processes can go on from a position, which Grain's own iterator state does
not allow.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from aria_jax.config import ComputeConfig, ModelConfig, from_dict, to_dict
from aria_jax.interop.safetensors import import_model
from aria_jax.models.heads import Model, Parameters, abstract_model, split_model
from aria_jax.models.lora import Lora
from aria_jax.sharding import parameter_shardings
from aria_jax.train.adapters import Adapting, merged_with_base
from data_pipeline.errors import UserError
from data_pipeline.tokenizer import Tokenizer

DIRECTORY = "checkpoints"
Read = TypeVar("Read")


@dataclass(frozen=True)
class LoadedModel:
    """A model from disk.

    Attributes:
        model: with its weights.
        config: its architecture.
        tokenizer: preset of the tokenizer it was trained with.
        step: optimiser steps it was trained for.
        path: where it was read from.
        pooling: where the head was trained to read: "eos" or "mean".
    """

    model: Model
    config: ModelConfig
    tokenizer: str
    step: int
    path: str
    pooling: str = "eos"

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
        names = ("params", "opt_state", "ema", "record")
        self._manager = ocp.CheckpointManager(self.directory, item_names=names, options=options)
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first; incomplete writes are not listed."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: Parameters,
        record: dict[str, Any],
        *,
        opt_state: Any | None = None,
        ema: Parameters | None = None,
    ) -> None:
        """Starts writing; returns once the arrays may be changed. A step is written once."""
        if step in self._damaged:
            self._manager.delete(step)
            self._damaged.remove(step)
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(params),
            "record": ocp.args.JsonSave({**record, "step": step}),
        }
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardSave(jax.tree.leaves(opt_state))
        if ema is not None:
            items["ema"] = ocp.args.StandardSave(ema)
        # Forced: behind a damaged newer checkpoint Orbax would refuse.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def newest(self, read: Callable[[int], Read]) -> tuple[int, Read]:
        """The newest step that `read` can read, and what it read; warns about the others.

        Raises:
            UserError: none can be read, or `read` raised it.
        """
        for step in reversed(self.steps()):
            try:
                return step, read(step)
            except UserError:
                raise
            except Exception as error:  # Orbax raises anything on a damaged file
                reason = str(error).strip().partition("\n")[0]
                self._damaged.add(step)
                warnings.warn(
                    f"{self.directory}: checkpoint {step} is damaged, trying the one before "
                    f"({type(error).__name__}: {reason[:200]})",
                    stacklevel=2,
                )
        raise UserError(f"{self.directory}: no checkpoint here can be read; use a new --workdir")

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["record"]

    def restore(self, step: int, item: str, like: Any) -> Any:
        """Item "params", "opt_state" or "ema", laid out and typed like `like`.

        `like` holds ShapeDtypeStructs with shardings: any mesh, any number of processes, any float
        type.
        """
        if item != "opt_state":
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
            return self._manager.restore(step, args=args)[item]
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


def shapes_like(
    tree: Any, mesh: jax.sharding.Mesh | None, dtype: jax.typing.DTypeLike | None = None
) -> Any:
    """Shapes, types and shardings of parameters or optimiser state; without a mesh on one device.

    Args:
        dtype: what floating-point leaves become; None keeps theirs.
    """
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, tree)
    else:
        shardings = parameter_shardings(tree, mesh)

    def shape(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if cast else leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree, shardings)


def model_record(config: ModelConfig, tokenizer: str) -> dict[str, Any]:
    """The part of a checkpoint's record that `load_model` needs."""
    return {
        "model": to_dict(config),
        "tokenizer": {"preset": tokenizer, "hash": Tokenizer.preset(tokenizer).hash},
    }


def save_model(path: str | Path, model: Model, *, tokenizer: str = "aria", step: int = 0) -> None:
    """Writes a model as a checkpoint that `load_model`, `--checkpoint` and `--init-from` take."""
    checkpointer = Checkpointer(path)
    try:
        if checkpointer.steps():
            raise UserError(f"{path}: already holds checkpoints; name a new directory")
        checkpointer.save(step, split_model(model)[1], model_record(model.config, tokenizer))
    finally:
        checkpointer.close()


def load_model(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    compute: ComputeConfig | None = None,
    base: str | Path | None = None,
) -> LoadedModel:
    """The newest intact model of a run or of `save_model`, on one device or cut over a mesh.

    A run that keeps a moving average of its weights gives that average; one that trained adapters
    gives them merged into the weights they belong to. The weights of the lowest validation loss
    are a model of their own, in the folder `best` of the run's workdir.

    Args:
        dtype: of the weights, e.g. bfloat16; None keeps them as they were saved.
        base: where the weights that adapters belong to are now, if not where they were.

    Raises:
        UserError: no checkpoint there, or one that another version wrote, or adapters without
            their base.
    """
    checkpointer = _opened(Path(path))

    def read(step: int) -> LoadedModel:
        record = checkpointer.record(step)
        preset = record["tokenizer"]["preset"]
        if record["tokenizer"]["hash"] != Tokenizer.preset(preset).hash:
            raise UserError(f"{path}: trained with another version of the {preset} tokenizer")
        config = from_dict(ModelConfig, record["model"])
        merge, params = split_model(abstract_model(config, compute or ComputeConfig()))
        item = "ema" if record.get("ema") else "params"

        def restore(shapes: Parameters) -> Parameters:
            return checkpointer.restore(step, item, shapes_like(shapes, mesh, dtype))

        if (saved := record.get("lora")) is None:
            restored = restore(params)
        else:
            read_base = partial(read_model, mesh=mesh, dtype=dtype)
            restored = merged_with_base(
                saved, params, restore=restore, read_base=read_base, mesh=mesh, base=base
            )
        pooling = record.get("config", {}).get("train", {}).get("pooling", "eos")
        return LoadedModel(merge(restored), config, preset, step, str(path), pooling)

    try:
        return checkpointer.newest(read)[1]
    finally:
        checkpointer.close()


def load_adapters(path: str | Path) -> Lora:
    """The newest adapters of a run, without the weights they belong to.

    Raises:
        UserError: the run has no adapters, or trained a new head beside them.
    """
    checkpointer = _opened(Path(path))

    def read(step: int) -> Lora:
        record = checkpointer.record(step)
        if (saved := record.get("lora")) is None:
            raise UserError(f"{path}: trained all weights (no train.lora_rank): it has no adapters")
        adapting = Adapting.from_record(saved)
        params = split_model(
            abstract_model(from_dict(ModelConfig, record["model"]), ComputeConfig())
        )[1]
        shapes = adapting.shapes(params)
        if shapes["full"]:
            raise UserError(
                f"{path}: trained its {' and '.join(shapes['full'])} too, which is no adapter; "
                "use `aria-jax convert merge` to write the whole model"
            )
        item = "ema" if record.get("ema") else "params"
        return adapting.lora(checkpointer.restore(step, item, shapes_like(shapes, None)))

    try:
        return checkpointer.newest(read)[1]
    finally:
        checkpointer.close()


def _opened(path: Path) -> Checkpointer:
    """The checkpoints of a workdir that has some."""
    if not (path / DIRECTORY).is_dir():
        raise UserError(f"{path}: no checkpoint here (expected the --workdir of a training run)")
    checkpointer = Checkpointer(path)
    if not checkpointer.steps():
        checkpointer.close()
        raise UserError(f"{path}: its checkpoints folder is empty; was the run interrupted?")
    return checkpointer


def read_model(
    path: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    """The model of a run, of `save_model`, or of a published .safetensors file."""
    if Path(path).suffix == ".safetensors":
        return import_model(path)
    return load_model(path, mesh=mesh, dtype=dtype).model
