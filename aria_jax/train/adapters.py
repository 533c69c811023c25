"""Training low-rank adapters instead of all weights: what is trained, what frozen, on which base.

With `train.lora_rank` above 0 a run trains

    {"lora": {"a": {name: [...]}, "b": {name: [...]}}, "full": {"head": [...]}}

where "full" are the parts that the base does not have (the new head of an embedding or class
model). Optimiser, moving average and checkpoints hold that only; the weights of the base are read
from its own place again, which the checkpoint's record names.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.config import RunConfig
from aria_jax.models.heads import Model, Parameters, split_model
from aria_jax.models.lora import Lora, apply_lora, init_lora
from aria_jax.sharding import parameter_shardings, replicated
from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Adapting:
    """How a run adapts its base.

    Attributes:
        rank, alpha, targets: see `models.lora.init_lora`.
        full: top-level parameters that are trained whole.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    full: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig) -> "Adapting | None":
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
    def from_record(cls, saved: dict[str, Any]) -> "Adapting":
        """The inverse of `record`."""
        lists = {name: tuple(saved[name]) for name in ("targets", "full")}
        return cls(rank=saved["rank"], alpha=saved["alpha"], **lists)

    def split(self, params: Parameters, key: jax.Array) -> tuple[Parameters, Parameters]:
        """(what is trained, what is frozen) of whole weights; traceable."""
        frozen = {name: part for name, part in params.items() if name not in self.full}
        lora = init_lora(frozen, rank=self.rank, key=key, targets=self.targets, alpha=self.alpha)
        full = {name: part for name, part in params.items() if name in self.full}
        return {"lora": {"a": lora.a, "b": lora.b}, "full": full}, frozen

    def shapes(self, params: Parameters) -> Parameters:
        """Of what is trained, given whole weights or their shapes."""
        return jax.eval_shape(partial(self.split, key=jax.random.key(0)), params)[0]

    def join(self, trained: Parameters, frozen: Parameters) -> Parameters:
        """Whole weights with the adapters merged in; traceable."""
        return apply_lora({**frozen, **trained["full"]}, self.lora(trained))

    def lora(self, trained: Parameters) -> Lora:
        """The adapters alone."""
        return Lora(**trained["lora"], scale=self.alpha / self.rank)

    def record(self, base: Path, base_params: Parameters) -> dict[str, Any]:
        """What a checkpoint says of its adapters and of their base, as JSON types."""
        settings = asdict(self) | {"targets": list(self.targets), "full": list(self.full)}
        return {**settings, "base": str(base.absolute()), "fingerprint": fingerprint(base_params)}


def joined_weights(config: RunConfig, trained: Parameters, frozen: Parameters | None) -> Parameters:
    """The whole weights of a run, whether it trains adapters or everything."""
    adapting = Adapting.of(config)
    return trained if adapting is None or frozen is None else adapting.join(trained, frozen)


def merged_with_base(
    saved: dict[str, Any],
    params: Parameters,
    *,
    restore: Callable[[Parameters], Parameters],
    read_base: Callable[[Path], Model],
    mesh: jax.sharding.Mesh | None,
    base: str | Path | None = None,
) -> Parameters:
    """The whole weights of a checkpoint that holds adapters.

    Args:
        saved: `Adapting.record` of the checkpoint.
        params: shapes of the whole weights.
        restore: reads the adapters, given their shapes.
        read_base: reads a model.
        base: where the base is now, if not where it was.

    Raises:
        UserError: the base is gone, or has changed since.
    """
    adapting = Adapting.from_record(saved)
    place = Path(saved["base"] if base is None else base)
    theirs = base_weights(place, saved, read_base)
    frozen = {name: theirs[name] for name in params if name not in adapting.full}
    shardings = None
    if mesh is not None:
        shardings = parameter_shardings(params, mesh)
        frozen = jax.device_put(frozen, {name: shardings[name] for name in frozen})
    return jax.jit(adapting.join, out_shardings=shardings)(restore(adapting.shapes(params)), frozen)


def base_weights(
    place: Path, saved: dict[str, Any], read_base: Callable[[Path], Model]
) -> Parameters:
    """The weights at `place`, if they are those that the adapters of `saved` were trained on.

    Raises:
        UserError: they are not there, or not the same.
    """
    if not place.exists():
        raise UserError(
            f"{place} is gone, and this run holds only the adapters trained on it: put it back, "
            "or name its new place (aria-jax convert merge RUN OUT --base PLACE)"
        )
    params = split_model(read_base(place))[1]
    if fingerprint(params) != saved["fingerprint"]:
        raise UserError(
            f"{place} has changed since adapters were trained on it, so that the sum would be "
            "wrong; bring back the weights of that time"
        )
    return params


def fingerprint(params: Parameters) -> str:
    """Hex digest of a sample of each weight, at bfloat16 so that any float type gives the same."""

    def sample(params: Parameters) -> Sequence[jax.Array]:
        leaves = jax.tree.leaves(params)
        rows = [leaf[(0,) * (leaf.ndim - 1)][:64] if leaf.ndim else leaf[None] for leaf in leaves]
        return [row.astype(jnp.bfloat16).astype(jnp.float32) for row in rows]

    sharding = jax.tree.leaves(params)[0].sharding
    everywhere = None
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.Mesh
    ):
        everywhere = replicated(sharding.mesh)
    digest = hashlib.sha256()
    for row in jax.jit(sample, out_shardings=everywhere)(params):
        digest.update(np.asarray(row).tobytes())
    return digest.hexdigest()[:16]
