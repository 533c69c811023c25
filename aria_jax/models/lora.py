"""Low-rank adapters around any model's parameters (LoRA, arXiv 2106.09685).

An adapter adds a @ b * scale to a matrix and is all that is trained:

    lora = init_lora(parameter_specs(model.config), rank=8, key=key)
    loss = lambda lora: loss_of(apply_lora(params, lora))       # the gradient is the adapter's
    params = apply_lora(params, lora)                           # merged: full weights again
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from aria_jax.config import RunConfig
from aria_jax.models import (
    Parameters,
    ParameterSpec,
    Specs,
    named_specs,
    uniform_init,
)
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


def init_lora(
    specs: Specs,
    *,
    rank: int,
    key: jax.Array,
    targets: Sequence[str] = DEFAULT_TARGETS,
    alpha: float | None = None,
) -> Lora:
    """Adapters that change nothing yet: a is random, b is zero.

    Args:
        specs: of the model's parameters (`models.heads.parameter_specs`), or of some of them.
        rank: of each adapter.
        targets: last names of the parameters to adapt, e.g. ("qkv", "out").
        alpha: strength; scale is alpha / rank. By default alpha = rank.

    Raises:
        UserError: a target that is no matrix of the model, or a rank that is no restriction.
    """
    named = named_specs(specs)
    chosen = {name: spec for name, spec in named.items() if _last(name) in targets}
    found = {_last(name) for name in chosen}
    if not targets or found != set(targets):
        known = sorted({_last(name) for name, spec in named.items() if len(spec.layer_shape) > 1})
        raise UserError(
            f"cannot adapt {', '.join(set(targets) - found) or 'nothing'}: "
            f"the model has the matrices {', '.join(known)}"
        )
    a, b = {}, {}
    for number, (name, spec) in enumerate(chosen.items()):
        if len(spec.layer_shape) < 2:
            raise UserError(f"{name} is no matrix: it cannot have a low-rank adapter")
        stack, inputs = spec.shape[: spec.stacked], spec.layer_shape[0]
        outputs = math.prod(spec.layer_shape[1:])
        if not 0 < rank <= min(inputs, outputs):
            raise UserError(
                f"lora rank {rank} must lie between 1 and {min(inputs, outputs)}, "
                f"the lesser side of {name}"
            )
        a[name] = uniform_init(jax.random.fold_in(key, number), (*stack, inputs, rank), inputs)
        b[name] = jnp.zeros((*stack, rank, outputs))
    return Lora(a=a, b=b, scale=(rank if alpha is None else alpha) / rank)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def apply_lora(params: Parameters, lora: Lora) -> Parameters:
    """The parameters with the adapters merged in; dtypes stay. Pure, differentiable in `lora`.

    Raises:
        UserError: the adapters were made for another model.
    """
    missing = set(lora.a)

    def adapted(path: tuple, leaf: jax.Array) -> jax.Array:
        name = ".".join(str(part.key) for part in path)
        if name not in lora.a:
            return leaf
        missing.remove(name)
        a, b = lora.a[name], lora.b[name]
        stack = a.shape[:-2]
        inputs, outputs = leaf.shape[len(stack)], leaf.shape[len(stack) + 1 :]
        expected = ((*stack, inputs, lora.rank), (*stack, lora.rank, math.prod(outputs)))
        if leaf.shape[: len(stack)] != stack or (a.shape, b.shape) != expected:
            raise UserError(f"these adapters belong to another model: {name} does not fit")
        change = (a @ b) * lora.scale
        return (leaf.astype(jnp.float32) + change.reshape(leaf.shape)).astype(leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(adapted, params)
    if missing:
        raise UserError(f"these adapters belong to another model: it has no {min(missing)}")
    return merged


@dataclass(frozen=True)
class LoraTraining:
    """How a run adapts its base: what is trained, what is frozen.

    Such a run trains

        {"lora": {"a": {name: [...]}, "b": {name: [...]}}, "full": {"head": [...]}}

    Optimiser, moving average and checkpoints hold that only; the weights of the base are read
    from its own place again, which the checkpoint's record names.

    Attributes:
        rank, alpha, targets: see `init_lora`.
        full: top-level parameters that are trained whole, as the base does not have them: the new
            head of an embedding or class model.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    full: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig) -> "LoraTraining | None":
        """What `config` asks for; None where it trains all weights."""
        train = config.train
        if not train.lora_rank:
            return None
        return cls(
            rank=train.lora_rank,
            alpha=float(train.lora_rank if train.lora_alpha is None else train.lora_alpha),
            targets=train.lora_targets,
            full=() if config.model.head == "lm" else ("head", "log_temperature"),
        )

    @classmethod
    def from_record(cls, saved: dict[str, Any]) -> "LoraTraining":
        """The inverse of `record`."""
        lists = {name: tuple(saved[name]) for name in ("targets", "full")}
        return cls(rank=saved["rank"], alpha=saved["alpha"], **lists)

    def split(
        self, specs: Specs, params: Parameters, key: jax.Array
    ) -> tuple[Parameters, Parameters]:
        """(what is trained, what is frozen) of whole weights and their specs; traceable."""
        frozen = {name: part for name, part in params.items() if name not in self.full}
        full = {name: part for name, part in params.items() if name in self.full}
        lora = self._init(specs, key)
        return {"lora": {"a": lora.a, "b": lora.b}, "full": full}, frozen

    def split_specs(self, specs: Specs) -> tuple[Specs, Specs]:
        """(what is trained, what is frozen) of the specs of whole weights.

        Adapters are small: they are whole on every device.
        """
        lora = jax.eval_shape(partial(self._init, specs), jax.random.key(0))
        adapters = jax.tree.map(
            lambda leaf: ParameterSpec(leaf.shape, (None,) * leaf.ndim), {"a": lora.a, "b": lora.b}
        )
        full = {name: part for name, part in specs.items() if name in self.full}
        frozen = {name: part for name, part in specs.items() if name not in self.full}
        return {"lora": adapters, "full": full}, frozen

    def _init(self, specs: Specs, key: jax.Array) -> Lora:
        frozen = {name: part for name, part in specs.items() if name not in self.full}
        return init_lora(frozen, rank=self.rank, key=key, targets=self.targets, alpha=self.alpha)

    def join(self, trained: Parameters, frozen: Parameters) -> Parameters:
        """Whole weights with the adapters merged in; traceable."""
        return apply_lora({**frozen, **trained["full"]}, self.lora(trained))

    def lora(self, trained: Parameters) -> Lora:
        """The adapters alone."""
        return Lora(**trained["lora"], scale=self.alpha / self.rank)

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"targets": list(self.targets), "full": list(self.full)}
