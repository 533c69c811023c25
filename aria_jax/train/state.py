"""The first state of a run: restored, given weights, or random; always born on the mesh."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.checkpoints.models import base_weights, lora_record, read_model
from aria_jax.config import RunConfig
from aria_jax.models.heads import (
    Model,
    abstract_model,
    init_sharded,
    parameter_specs,
    split_model,
)
from aria_jax.models.lora import LoraTraining
from aria_jax.models.parameters import Parameters, parameter_shardings
from aria_jax.sharding import mirrored_shardings
from aria_jax.train.start import Start, refuse_changed_run
from aria_jax.train.step import TrainState, new_state
from data_pipeline.errors import UserError

Merge = Callable[[Parameters], Model]


def abstract_state(config: RunConfig, mesh: jax.sharding.Mesh) -> tuple[Merge, TrainState]:
    """The model's `merge` function, and the state's shapes with their shardings; no memory."""
    merge, params = split_model(abstract_model(config.model, config.compute))
    state = jax.eval_shape(partial(new_state, config), params)

    def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return merge, jax.tree.map(placed, state, state_shardings(config, state, mesh))


def state_shardings(
    config: RunConfig, state: TrainState, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> TrainState:
    """How a state is sharded: weights as they declare it, what the optimiser keeps likewise."""
    trained, frozen = parameter_specs(config.model), None
    if (lora := LoraTraining.of(config)) is not None:
        trained, frozen = lora.split_specs(trained)
    params = parameter_shardings(trained, mesh)
    return TrainState(
        params,
        mirrored_shardings(state.opt_state, state.params, params, mesh),
        None if state.ema is None else params,
        None if frozen is None else parameter_shardings(frozen, mesh),
    )


def first_state(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    start: Start,
    checkpointer: Checkpointer,
    record: dict[str, Any],
) -> tuple[Merge, TrainState, int]:
    """`merge`, the state that `start` asks for, and the number of steps it has behind it.

    Args:
        record: what the run would write into its checkpoints, held against what is there; a run
            that trains adapters puts in what they are adapters of.
    """
    merge, like = abstract_state(config, mesh)
    lora, read = LoraTraining.of(config), partial(read_model, mesh=mesh)
    if start.kind == "resume":
        step, state = checkpointer.newest(
            partial(_restored, checkpointer, like, record, Path(str(start.path)))
        )
        if lora is not None:
            saved = record["lora"] = checkpointer.record(step)["lora"]
            base_params = base_weights(Path(saved["base"]), saved, read)
            frozen = jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding),
                {name: base_params[name] for name in like.frozen or {}},
                like.frozen,
            )
            state = replace(state, frozen=frozen)
        return merge, state, step
    if lora is not None and start.path is None:
        raise UserError(
            f"train.lora_rank={lora.rank} adapts weights that are there already: "
            "name them with --init-from"
        )
    key = jax.random.key(config.train.seed)
    params = split_model(init_sharded(config.model, config.compute, key, mesh))[1]
    if start.path is not None:
        source = read(start.path)
        params = _with_weights_of(params, source, config, start.path)
        if lora is not None:
            record["lora"] = lora_record(lora, start.path, split_model(source)[1])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return merge, jax.jit(partial(new_state, config), out_shardings=shardings)(params), 0


def _restored(
    checkpointer: Checkpointer, like: TrainState, record: dict[str, Any], path: Path, step: int
) -> TrainState:
    """All but frozen weights, which no checkpoint holds."""
    refuse_changed_run(checkpointer.record(step), record, path)
    return TrainState(
        checkpointer.restore(step, "params", like.params),
        checkpointer.restore(step, "opt_state", like.opt_state),
        None if like.ema is None else checkpointer.restore(step, "ema", like.ema),
    )


def _with_weights_of(
    params: Parameters, source: Model, config: RunConfig, path: Path
) -> Parameters:
    """`params` with the backbone of `source`, and its head and adapter where of the same kind."""
    theirs = split_model(source)[1]
    same_head = (source.config.head, source.config.class_names) == (
        config.model.head,
        config.model.class_names,
    )
    chosen = {**params, "backbone": theirs["backbone"]}
    if same_head and "head" in theirs:
        chosen["head"] = theirs["head"]
    if "adapter" in params and "adapter" in theirs:
        chosen["adapter"] = theirs["adapter"]
    elif "adapter" in params and config.train.lora_rank:
        raise UserError(f"{path} has no adapter for a condition, which model.emb_size asks for")
    for (name, ours), found in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(chosen), strict=True
    ):
        if ours.shape != found.shape:
            raise UserError(
                f"{path}: {jax.tree_util.keystr(name)} has shape {found.shape}, this run needs "
                f"{ours.shape}; choose the preset the weights were trained with"
            )
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), chosen, params)
