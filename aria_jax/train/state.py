"""The first state of a run: restored, given weights, or random; always born on the mesh."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from aria_jax.checkpoints import model_path
from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.checkpoints.models import base_weights, lora_record, read_model
from aria_jax.config import ComputeConfig, ModelConfig, OptimizerConfig, RunConfig
from aria_jax.models import Parameters, Specs, abstract_parameters
from aria_jax.models.heads import (
    Model,
    init_sharded,
    model_of,
    parameter_specs,
    split_model,
    with_ordered_start,
    with_vocabulary,
)
from aria_jax.models.lora import LoraTraining
from aria_jax.sharding import mirrored_shardings
from aria_jax.train.init import InitFrom, check_resumable, source_record
from aria_jax.train.step import Build, TrainState, new_state
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer


@dataclass(frozen=True)
class Network:
    """What a run trains, what it leaves as it is, and the model that both make.

    Attributes:
        trained, frozen: specs of the parameters; nothing is frozen unless adapters are trained.
        split: whole weights -> (trained, frozen); traceable.
        build: the inverse, as a model; traceable.
    """

    trained: Specs
    frozen: Specs
    split: Callable[[Parameters], tuple[Parameters, Parameters]]
    build: Build

    @classmethod
    def of(cls, config: RunConfig) -> "Network":
        """The network of `config`: all its weights, or adapters around them."""
        return _network(config.model, config.compute, LoraTraining.of(config), config.train.seed)


@lru_cache(maxsize=8)
def _network(
    model: ModelConfig, compute: ComputeConfig, lora: LoraTraining | None, seed: int
) -> Network:
    """One for the same settings: what is compiled of its functions is compiled once."""
    merge, specs = model_of(model, compute), parameter_specs(model)
    if lora is None:
        return Network(specs, {}, lambda params: (params, {}), lambda params, _: merge(params))
    return Network(
        *lora.split_specs(specs),
        partial(lora.split, specs, key=jax.random.key(seed)),
        lambda trained, frozen: merge(lora.join(trained, frozen)),
    )


def abstract_state(config: RunConfig, network: Network, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, types and shardings of a state; no memory.

    Weights are sharded as they declare it, what the optimiser keeps of each likewise.
    """
    params, frozen = (
        abstract_parameters(specs, mesh) for specs in (network.trained, network.frozen)
    )
    state = jax.eval_shape(partial(new_state, config.optimizer), params, frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    opt_state = mirrored_shardings(state.opt_state, state.params, shardings, mesh)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return TrainState(
        params,
        jax.tree.map(placed, state.opt_state, opt_state),
        None if state.ema is None else params,
        frozen,
    )


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of every array of a state, or of its shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def first_state(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    init: InitFrom,
    checkpointer: Checkpointer,
    record: dict[str, Any],
    allow_change: Collection[str] = (),
) -> tuple[Network, TrainState, int]:
    """The network, the state that `init` asks for, and the number of steps it has behind it.

    Args:
        record: what the run would write into its checkpoints, held against what is there; takes
            up what the run began from, and what its adapters are adapters of.
        allow_change: see `check_resumable`.
    """
    network = Network.of(config)
    like = abstract_state(config, network, mesh)
    lora, read = LoraTraining.of(config), partial(read_model, mesh=mesh)
    if init.kind == "resume":
        step, state = checkpointer.newest(
            partial(_restored, checkpointer, like, record, Path(str(init.path)), allow_change)
        )
        saved = checkpointer.record(step)
        record |= {name: saved[name] for name in ("init_from", "lora") if name in saved}
        if lora is not None:
            base = model_path(saved["lora"]["base"])
            base_params = base_weights(base, saved["lora"], read, config.model)
            frozen = jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding),
                {name: base_params[name] for name in like.frozen},
                like.frozen,
            )
            state = replace(state, frozen=frozen)
        return network, state, checkpointer.record(step)["position"]["step"]
    if lora is not None and init.path is None:
        raise UserError(
            f"train.lora_rank={lora.rank} adapts weights that are there already: "
            "name them with --init-from"
        )
    record["init_from"] = None if init.path is None else source_record(init.path)
    key = jax.random.key(config.train.seed)
    params = split_model(init_sharded(config.model, config.compute, key, mesh))[1]
    if init.path is None and config.train.ordered_start:
        tokenizer = Tokenizer.preset(record["tokenizer"]["preset"])
        ordered = partial(with_ordered_start, config=config.model, tokenizer=tokenizer, key=key)
        params = jax.jit(ordered)(params)
    if init.path is not None:
        source = read(init.path)
        params = _with_weights_of(params, source, config, init.path)
        if lora is not None:
            record["lora"] = lora_record(lora, init.path, split_model(source)[1])
    return network, _state_of(config, network, like, params), 0


def random_state(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[Network, TrainState]:
    """The network and a state of random weights, below adapters too; for timing, not training."""
    network = Network.of(config)
    key = jax.random.key(config.train.seed)
    params = split_model(init_sharded(config.model, config.compute, key, mesh))[1]
    return network, _state_of(config, network, abstract_state(config, network, mesh), params)


def _state_of(
    config: RunConfig, network: Network, like: TrainState, params: Parameters
) -> TrainState:
    """The state of a run that begins with these weights, sharded as `like`."""
    begin = _first_state(config.optimizer, network.split)
    return jax.jit(begin, out_shardings=shardings_of(like))(params)


@lru_cache(maxsize=8)
def _first_state(
    optimizer: OptimizerConfig, split: Callable[[Parameters], tuple[Parameters, Parameters]]
) -> Callable[[Parameters], TrainState]:
    """Whole weights -> the state of a run that begins with them."""
    return lambda params: new_state(optimizer, *split(params))


def _restored(
    checkpointer: Checkpointer,
    like: TrainState,
    record: dict[str, Any],
    path: Path,
    allow_change: Collection[str],
    step: int,
) -> TrainState:
    """All but frozen weights, which no checkpoint holds."""
    check_resumable(checkpointer.record(step), record, path, allow_change)
    return TrainState(
        checkpointer.restore(step, "params", like.params),
        checkpointer.restore(step, "opt_state", like.opt_state),
        None if like.ema is None else checkpointer.restore(step, "ema", like.ema),
    )


def _with_weights_of(
    params: Parameters, source: Model, config: RunConfig, path: Path | str
) -> Parameters:
    """`params` with the backbone of `source`, and its head and adapter where of the same kind."""
    source_params, n_new = with_vocabulary(
        split_model(source)[1], source.config, config.model, params
    )
    if n_new:
        warnings.warn(
            f"{path} has no weights for {n_new:,} of the {config.model.n_rows:,} token ids of this "
            "run; they start from random ones",
            stacklevel=2,
        )
    same_head = (source.config.head, source.config.class_names) == (
        config.model.head,
        config.model.class_names,
    )
    chosen = {**params, "backbone": source_params["backbone"]}
    if same_head and "head" in source_params:
        chosen["head"] = source_params["head"]
    if "adapter" in params and "adapter" in source_params:
        chosen["adapter"] = source_params["adapter"]
    elif "adapter" in params and config.train.lora_rank:
        raise UserError(f"{path} has no adapter for a condition, which model.emb_size asks for")
    for (name, needed), given in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(chosen), strict=True
    ):
        if needed.shape != given.shape:
            raise UserError(
                f"{path}: {jax.tree_util.keystr(name)} has shape {given.shape}, this run needs "
                f"{needed.shape}; choose the preset the weights were trained with"
            )
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), chosen, params)
