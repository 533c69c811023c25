"""Checkpoints: an Orbax CheckpointManager directory of params, opt_state, ema and a JSON record.

The record holds the run's config, the tokenizer and the position: seed, epoch and step. Loaders
are random access, so row i of the stream depends on (seed, i) alone, and so do the keys of
dropout: any number of processes can go on from a position, which Grain's own iterator state does
not allow.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from aria_jax.models.parameters import Parameters
from data_pipeline.errors import UserError

DIRECTORY = "checkpoints"
Read = TypeVar("Read")


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
