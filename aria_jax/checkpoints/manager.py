"""Checkpoints: an Orbax CheckpointManager directory of params, opt_state, ema and a JSON record.

The record holds the run's config, the tokenizer and the position: seed, epoch and step. Loaders
are random access, so row i of the stream depends on (seed, i) alone, and so do the keys of
dropout: any number of processes can go on from a position, which Grain's own iterator state does
not allow.

It also holds shape, type and checksum of every array and a digest of itself, since Orbax and
TensorStore miss flipped bits: what comes back is what was saved, or it is damaged. Records of
older versions have none, and are trusted.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from aria_jax.checkpoints import DIRECTORY
from aria_jax.checkpoints.sending import Outbox
from aria_jax.models import Parameters
from aria_jax.sharding import replicated
from data_pipeline import storage
from data_pipeline.artifact import json_digest
from data_pipeline.errors import UserError

Read = TypeVar("Read")

_FINE, _DAMAGED, _UNREADABLE = range(3)
_DAMAGE = re.compile(
    "DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|"
    "User-provided restore item and on-disk value metadata tree structures do not match|"
    "Requested shape: .* is not compatible with the stored shape"
)
"""TensorStore on bytes that are missing or cannot be decoded, and Orbax on metadata that
contradict the record."""
_UNDECODED = re.compile("Error decoding|ZSTD_decompress|[Cc]hecksum mismatch|CRC")
"""What TensorStore says of such bytes where it names no code: in a message that is not cut."""
_DAMAGED_METADATA = (UnicodeDecodeError, json.JSONDecodeError, KeyError, IndexError, TypeError,
                     AttributeError, NotImplementedError)  # fmt: skip
_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|[Oo]ut of memory")
_NO_ACCESS = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
_NO_ANSWER = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL|UNKNOWN")


class DamagedCheckpoint(UserError):
    """A checkpoint of which something is missing, or is not what was saved."""


class Checkpointer:
    """The checkpoints of one run; writes in the background, a write is all or nothing.

    Where a program has several processes, all of them call each method.

    Orbax writes to gs:// itself; what is for s3:// goes through this disk, see `sending.Outbox`.

    Args:
        keep: so many of the newest; older ones are removed.
        read_only: nothing there is made, removed or renamed.
    """

    def __init__(self, workdir: str | Path, keep: int = 3, *, read_only: bool = False):
        self.directory = (storage.place(workdir) / DIRECTORY).absolute()
        self._read_only = read_only
        root, self._outbox = str(self.directory), None
        if storage.is_remote(self.directory):
            storage.fetch(self.directory)
            url = storage.url(self.directory)
            if url.startswith("gs://"):
                root = url
            else:
                self._outbox = Outbox(self.directory, read_only)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only
        )
        names = ("params", "opt_state", "ema", "record")
        self._manager = ocp.CheckpointManager(root, item_names=names, options=options)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint as process 0 sees them, oldest first."""
        steps = sorted(self._manager.all_steps() if self._outbox is None else self._outbox.steps())
        if jax.process_count() == 1:
            return steps
        number = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        listed = np.array((steps + [0] * number)[:number], np.int32)
        return [int(step) for step in multihost_utils.broadcast_one_to_all(listed)]

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
        if step in self._manager.all_steps():
            return
        if self._outbox is not None:
            self._outbox.wait()
        trees: dict[str, Any] = {"params": params}
        if opt_state is not None:
            trees["opt_state"] = jax.tree.leaves(opt_state)
        if ema is not None:
            trees["ema"] = ema
        arrays = {name: _described(tree) for name, tree in trees.items()}
        record = json.loads(json.dumps({**record, "step": step, "arrays": arrays}))
        items: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in trees.items()}
        items["record"] = ocp.args.JsonSave({**record, "digest": json_digest(record)})
        if not self._manager.save(step, args=ocp.args.Composite(**items)):
            raise UserError(
                f"{self.directory}: step {step} is not saved behind step {self.steps()[-1]}"
            )
        if self._outbox is not None:
            self._outbox.send_after(self._manager.wait_until_finished)

    def newest(self, read: Callable[[int], Read]) -> tuple[int, Read]:
        """The newest step that `read` can read, and what it read.

        Damaged steps are passed over with a warning. Once one is found that is intact, they are
        renamed, so that their numbers can be saved again.

        Raises:
            UserError: all are damaged; or there is no memory, permission or connection to read
                one, or it holds arrays of other shapes; or `read` raised it.
        """
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except DamagedCheckpoint as damage:
                warnings.warn(f"{damage}; trying the one before", stacklevel=2)
                damaged.append(step)
                continue
            if damaged and not self._read_only:
                self._set_aside(damaged)
            return step, found
        raise UserError(f"{self.directory}: no checkpoint here can be read; use a new --workdir")

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint.

        Raises:
            UserError: it cannot be read, or belongs to another step.
        """
        path = self._manager.directory / str(step)

        def read() -> dict[str, Any]:
            handler = ocp.JsonCheckpointHandler()
            return handler.restore(path / "record", args=ocp.args.JsonRestore())

        record = self._together(step, read)
        digest = record.pop("digest", None)
        if digest not in (None, json_digest(record)):
            raise DamagedCheckpoint(self._damaged(step, "its record is not what was saved"))
        for of in (record, record.get("position", {})):
            if of.get("step", step) != step:
                raise UserError(
                    f"{path} is of step {of['step']}, by its record: give the folder that name"
                )
        return record

    def restore(self, step: int, item: str, like: Any) -> Any:
        """Item "params", "opt_state" or "ema", laid out and typed like `like`.

        `like` holds ShapeDtypeStructs with shardings: any mesh, any number of processes, any float
        type.

        Raises:
            UserError: see `newest`.
        """
        wanted, structure = jax.tree.flatten(like)
        target = wanted if item == "opt_state" else like
        path = self._manager.directory / str(step) / item
        if self._outbox is not None:
            storage.fetch(self.directory / str(step), lazily=False)
        described = self.record(step).get("arrays", {}).get(item, {})

        def read() -> Any:
            handler = ocp.StandardCheckpointHandler()
            there = {name: (tuple(shape), kind) for name, (shape, kind, _) in described.items()}
            if not there:  # of a version that did not describe them
                saved = _named(handler.metadata(path).tree)
                there = {name: (leaf.shape, leaf.dtype) for name, leaf in saved.items()}
            stored = _as_stored(target, there, str(path))
            return handler.restore(path, args=ocp.args.StandardRestore(stored))

        found = self._together(step, read)
        if described and described != _described(found):
            raise DamagedCheckpoint(self._damaged(step, f"{item} are not what was saved"))
        arrays = jax.tree.leaves(found)
        del found  # so that memory never holds all of it in two types
        for i, leaf in enumerate(wanted):
            arrays[i] = arrays[i].astype(leaf.dtype)
        return jax.tree.unflatten(structure, arrays)

    def wait(self) -> None:
        """Returns when everything is on the disk, or in the bucket."""
        self._manager.wait_until_finished()
        if self._outbox is not None:
            self._outbox.wait()

    def close(self) -> None:
        """Finishes writing and lets go of the directory."""
        self._manager.close()
        if self._outbox is not None:
            self._outbox.wait()

    def _together(self, step: int, read: Callable[[], Read]) -> Read:
        """What `read` reads in this process, unless one of all processes fails.

        No process waits for another while it reads.
        """
        status, failure = _FINE, None
        try:
            found = read()
        except Exception as error:
            status, failure = self._explained(step, error)
        statuses = [status]
        if jax.process_count() > 1:
            statuses = multihost_utils.process_allgather(np.int32(status)).tolist()
        if failure is not None:
            raise failure
        if _UNREADABLE in statuses:
            index = statuses.index(_UNREADABLE)
            raise UserError(f"process {index} cannot read checkpoint {step}; see what it says")
        if _DAMAGED in statuses:
            found_by = f"as process {statuses.index(_DAMAGED)} finds"
            raise DamagedCheckpoint(self._damaged(step, found_by))
        return found

    def _explained(self, step: int, error: Exception) -> tuple[int, Exception]:
        """Whether an error while reading is damage, and what to raise for it."""
        if isinstance(error, UserError):
            return _UNREADABLE, error
        causes = list(_causes(error))
        # Orbax's own error quotes the whole specification of an array, TensorStore's says why.
        told = next((str(c) for c in causes if "TensorStore details" not in str(c)), str(error))
        text = told.strip().partition("\n")[0][:300]

        def any_of(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)

        if any_of(MemoryError) or _NO_MEMORY.search(text):
            reason = f"not enough memory to read it ({type(error).__name__}: {text})"
        elif any_of(PermissionError) or _NO_ACCESS.match(text):
            reason = f"no permission to read it ({text})"
        elif any_of(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return _DAMAGED, DamagedCheckpoint(self._damaged(step, text))
        elif any_of(OSError) or _NO_ANSWER.match(text):  # among them lost connections and time-outs
            reason = f"it cannot be read now ({text})"
        elif any_of(*_DAMAGED_METADATA) or _DAMAGE.match(text) or _UNDECODED.search(told):
            return _DAMAGED, DamagedCheckpoint(self._damaged(step, text))
        else:
            return _UNREADABLE, error
        return _UNREADABLE, UserError(f"{self.directory / str(step)}: {reason}")

    def _damaged(self, step: int, reason: str) -> str:
        return f"{self.directory}: checkpoint {step} is damaged ({reason})"

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, so that nothing reads, counts or removes them any more."""
        for step in steps:
            aside = self.directory / f"{step}.damaged"
            if jax.process_index() == 0:
                number = 1
                while aside.exists() or storage.fetch(Path(aside)):
                    number += 1
                    aside = self.directory / f"{step}.damaged-{number}"
                storage.move(self.directory / str(step), aside)
            warnings.warn(f"the damaged checkpoint {step} is kept as {aside}", stacklevel=3)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()


def _described(tree: Any) -> dict[str, list]:
    """Shape, type and checksum of each array, by its dotted path; as JSON gives it back."""
    return {
        name: [list(leaf.shape), str(leaf.dtype), number]
        for (name, leaf), number in zip(_named(tree).items(), checksums(tree), strict=True)
    }


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksums(tree: Any) -> list[int]:
    """A number for each array, however it is sharded, that another value of any element changes."""
    leaves = jax.tree.leaves(tree)
    shardings = [leaf.sharding for leaf in leaves]
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    checksum = _checksum(replicated(mesh) if isinstance(mesh, Mesh) else None)
    return [int(checksum(leaf)) for leaf in leaves]  # one at a time, for the memory's sake


@cache
def _checksum(everywhere: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    """Sum modulo 2³² of each element's bits times an odd number of its index; compiled."""

    def part(x: jax.Array, first: int | jax.Array = 0) -> jax.Array:
        kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        index = jnp.full(x.shape, first, jnp.uint32)
        for axis in range(x.ndim):
            stride = math.prod(x.shape[axis + 1 :]) % 2**32
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    def whole(x: jax.Array) -> jax.Array:
        if x.ndim < 3:
            return part(x)
        # Layer by layer: products of all elements at once would take the memory of a copy.
        firsts = jnp.arange(len(x), dtype=jnp.uint32) * jnp.uint32(math.prod(x.shape[1:]) % 2**32)
        return jax.lax.map(lambda layer: part(*layer), (x, firsts)).sum(dtype=jnp.uint32)

    return jax.jit(whole, out_shardings=everywhere)


def _as_stored(like: Any, there: dict[str, tuple[tuple[int, ...], Any]], path: str) -> Any:
    """`like` in the types that are stored.

    Args:
        there: shape and type of each stored array.

    Raises:
        UserError: names every array that is missing, unknown or of another shape.
    """
    wanted = {name: leaf.shape for name, leaf in _named(like).items()}
    wrong = []
    for name in sorted(wanted.keys() | there.keys()):
        shape, _ = there.get(name, ("missing", None))
        if shape != wanted.get(name):
            wrong.append(f"{name} is {shape} there and {wanted.get(name, 'unknown')} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path}: another model's arrays: {'; '.join(wrong[:3])}{more}")
    leaves, structure = jax.tree.flatten(like)
    stored = [
        jax.ShapeDtypeStruct(leaf.shape, there[name][1], sharding=leaf.sharding)
        for name, leaf in zip(wanted, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, stored)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
