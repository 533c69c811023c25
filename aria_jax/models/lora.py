"""Low-rank adapters around any model's parameters (LoRA, arXiv 2106.09685).

An adapter adds a @ b * scale to a matrix and is all that is trained:

    lora = init_lora(params, rank=8, key=key)
    loss = lambda lora: loss_of(apply_lora(params, lora))       # the gradient is the adapter's
    params = apply_lora(params, lora)                           # merged: full weights again
"""

import json
from collections.abc import Sequence
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.models.heads import Parameters
from aria_jax.models.transformer import uniform_init
from data_pipeline.errors import UserError

DEFAULT_TARGETS = ("qkv", "out", "gate", "up", "down")
"""Every matrix of every block."""


@flax.struct.dataclass
class Lora:
    """The adapters of a model; a pytree to differentiate, optimise and shard.

    Attributes:
        a: by dotted parameter name, float32 [N, I, R] for stacked layers, else [I, R].
        b: likewise, [N, R, O] or [R, O]; the parameter's other axes are flattened into O.
        scale: the product is multiplied by it.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: float = flax.struct.field(pytree_node=False)

    @property
    def rank(self) -> int:
        """Columns of every a."""
        return next(iter(self.a.values())).shape[-1]

    @property
    def n_params(self) -> int:
        """Numbers in all adapters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self))


def _named(params: Parameters) -> dict[str, jax.Array]:
    """Every leaf by its dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def _leading(name: str) -> int:
    """How many leading axes of a parameter number its layers."""
    return int("blocks" in name.split("."))


def init_lora(
    params: Parameters,
    *,
    rank: int,
    key: jax.Array,
    targets: Sequence[str] = DEFAULT_TARGETS,
    alpha: float | None = None,
) -> Lora:
    """Adapters that change nothing yet: a is random, b is zero.

    Args:
        params: of the model (arrays or shapes).
        rank: of each adapter.
        targets: last names of the parameters to adapt, e.g. ("qkv", "out").
        alpha: strength; scale is alpha / rank. By default alpha = rank.

    Raises:
        UserError: a target that is no matrix of the model, or a rank that is no restriction.
    """
    named = _named(params)
    chosen = {name: leaf for name, leaf in named.items() if name.rsplit(".", 1)[-1] in targets}
    found = {name.rsplit(".", 1)[-1] for name in chosen}
    if not targets or found != set(targets):
        known = sorted({name.rsplit(".", 1)[-1] for name in named if named[name].ndim >= 2})
        raise UserError(
            f"cannot adapt {', '.join(set(targets) - found) or 'nothing'}: "
            f"the model has the matrices {', '.join(known)}"
        )
    a, b = {}, {}
    for number, (name, leaf) in enumerate(sorted(chosen.items())):
        stack, inputs, outputs = _sizes(name, leaf)
        if not 0 < rank <= min(inputs, outputs):
            raise UserError(
                f"lora rank {rank} must lie between 1 and {min(inputs, outputs)}, "
                f"the lesser side of {name}"
            )
        a[name] = uniform_init(jax.random.fold_in(key, number), (*stack, inputs, rank), inputs)
        b[name] = jnp.zeros((*stack, rank, outputs))
    return Lora(a=a, b=b, scale=(rank if alpha is None else alpha) / rank)


def _sizes(name: str, leaf: jax.Array) -> tuple[tuple[int, ...], int, int]:
    stack = leaf.shape[: _leading(name)]
    if leaf.ndim - len(stack) < 2:
        raise UserError(f"{name} is no matrix: it cannot have a low-rank adapter")
    inputs, *outputs = leaf.shape[len(stack) :]
    return stack, inputs, int(np.prod(outputs))


def apply_lora(params: Parameters, lora: Lora) -> Parameters:
    """The parameters with the adapters merged in; dtypes stay. Pure, differentiable in `lora`.

    Raises:
        UserError: the adapters were made for another model.
    """
    named = _named(params)
    for name, a in lora.a.items():
        if name not in named or _sizes(name, named[name])[1] != a.shape[-2]:
            raise UserError(f"these adapters belong to another model: {name} does not fit")

    def adapted(path, leaf: jax.Array) -> jax.Array:
        name = ".".join(str(part.key) for part in path)
        if name not in lora.a:
            return leaf
        change = (lora.a[name] @ lora.b[name]) * lora.scale
        return (leaf.astype(jnp.float32) + change.reshape(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(adapted, params)


def save_lora(path: str | Path, lora: Lora) -> None:
    """Writes the adapters alone, as safetensors."""
    from safetensors.numpy import save_file

    tensors = {f"{name}.{side}": np.ascontiguousarray(factor)
               for side in ("a", "b") for name, factor in getattr(lora, side).items()}  # fmt: skip
    save_file(tensors, str(path), metadata={"aria_jax.lora": json.dumps({"scale": lora.scale})})


def load_lora(path: str | Path) -> Lora:
    """Reads what `save_lora` wrote.

    Raises:
        UserError: not there, or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = (file.metadata() or {}).get("aria_jax.lora")
            names = file.keys()
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    if metadata is None:
        raise UserError(f"{path}: holds no LoRA adapters")
    sides = {
        side: {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(f".{side}")}
        for side in ("a", "b")
    }
    return Lora(**sides, scale=json.loads(metadata)["scale"])
