"""What a run would take, told before it starts: `aria-jax train … --dry-run`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from aria_jax.config import ModelConfig, RunConfig
from aria_jax.losses.cross_entropy import loss_chunk
from aria_jax.models import parameter_count
from aria_jax.models.heads import head_width, parameter_specs
from aria_jax.presets import Chip
from aria_jax.sharding import MESH_AXES
from aria_jax.train.state import Network, abstract_state
from aria_jax.train.step import TrainState
from data_pipeline.errors import UserError

ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        parameters: number of weights.
        flops_per_token: forward and backward.
        tokens_per_step, tokens: of one optimiser step and of the run, padding included.
        epochs: passes over the training split.
        mesh: devices per axis.
        memory: bytes per device by part; all but "activations" are exact, that one is a formula.
        hbm: bytes a device has; None where that is not known.
        assumed_mfu: share of the chips' peak FLOP/s to plan with.
        hours: for all steps; None with neither a data sheet nor a measured step.
        step_seconds: of one step, measured; None where time goes by formula.
    """

    parameters: int
    flops_per_token: float
    tokens_per_step: int
    tokens: int
    epochs: float
    mesh: dict[str, int]
    memory: dict[str, int]
    hbm: float | None
    assumed_mfu: float
    hours: float | None
    step_seconds: float | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the memory of a device suffices; None where it is not known."""
        return None if self.hbm is None else sum(self.memory.values()) <= self.hbm


def plan(
    config: RunConfig,
    *,
    n_examples: int,
    n_devices: int,
    chip: Chip | None,
    assumed_mfu: float = ASSUMED_MFU,
) -> Plan:
    """The plan of `config`, resolved against its data, on `n_devices` chips of one kind.

    Args:
        n_examples: rows of one epoch.
        chip: data sheet of the devices; None for CPUs.

    Raises:
        UserError: the mesh does not fit the devices, or a weight does not divide over it.
    """
    sizes = _mesh_sizes(config, n_devices)
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    network = Network.of(config)
    tokens = tokens_per_step(config) * config.train.steps
    flops = train_flops_per_token(config)
    return Plan(
        parameters=parameter_count(parameter_specs(config.model)),
        flops_per_token=flops,
        tokens_per_step=tokens_per_step(config),
        tokens=tokens,
        epochs=config.train.steps * config.data.global_batch / max(n_examples, 1),
        mesh=sizes,
        memory=_memory(config, abstract_state(config, network, mesh), sizes, chip),
        hbm=None if chip is None else chip.hbm,
        assumed_mfu=assumed_mfu,
        hours=None
        if chip is None
        else tokens * flops / (chip.flops * n_devices * assumed_mfu) / 3600,
    )


def plan_text(config: RunConfig, made: Plan, basis: str) -> str:
    """The plan for people to read; `basis` says what its time rests on, or why there is none."""
    gib, total = 2**30, sum(made.memory.values())
    mesh = " × ".join(f"{axis} {size}" for axis, size in made.mesh.items())
    compute, accumulation = config.compute, config.train.grad_accumulation
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in made.memory.items())
    room = "" if made.hbm is None else f" of {made.hbm / gib:.0f} GiB"
    verdict = {None: "", True: ": fits", False: ": DOES NOT FIT"}[made.fits]
    stays = "" if compute.dtype == "float32" else " (weights, softmax and losses in float32)"
    lines = [
        f"task         {config.task}, {config.train.steps:,} steps",
        f"model        {made.parameters:,} parameters",
        f"compute      {made.flops_per_token / 1e9:.3g} GFLOPs a token, forward and backward",
        f"batch        {made.tokens_per_step:,} tokens per step",
        f"data         {made.tokens:,} tokens, {made.epochs:.2f} epochs",
        f"mesh         {mesh}",
        f"computed in  {compute.dtype}{stays}, remat {compute.remat}, {accumulation} parts a step",
        f"memory       {total / gib:.2f} GiB per device{room}{verdict} "
        f"({parts}; activations by formula: `aria-jax compile` asks the compiler)",
    ]
    if made.hours is None:
        lines.append(f"time         unknown: {basis}")
    else:
        short = made.hours < 1
        time = f"{made.hours * 60:.1f} minutes" if short else f"{made.hours:,.1f} hours"
        lines.append(f"time         {time} {basis}")
    return "\n".join(lines)


def _mesh_sizes(config: RunConfig, n_devices: int) -> dict[str, int]:
    sizes = dataclasses.asdict(config.mesh)
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    filled = {axis: n_devices // known if size == -1 else size for axis, size in sizes.items()}
    if int(np.prod(list(filled.values()))) != n_devices:
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"{asked} do not multiply to {n_devices} devices")
    return {axis: filled[axis] for axis in MESH_AXES}


def _memory(
    config: RunConfig, state: TrainState, sizes: dict[str, int], chip: Chip | None
) -> dict[str, int]:
    def size(part: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(part)
        )

    # Adapters are added to a copy of the frozen weights, whose gradients become the adapters'.
    weights, frozen = size(state.params), size(state.frozen)
    return {
        "parameters": weights + 2 * frozen,
        "gradients": weights + frozen,
        "optimizer": size(state.opt_state) + size(state.ema),
        "activations": _activations(config, sizes, "cpu" if chip is None else chip.platform),
    }


def _activations(config: RunConfig, sizes: dict[str, int], platform: str) -> int:
    """Bytes held for the backward pass, by formula: what `remat` keeps, and one block at work."""
    m = config.model
    d, ff = m.d_model, m.d_model * m.ff_mult
    itemsize = 2 if config.compute.dtype == "bfloat16" else 4
    rows_over = sizes["data"] * sizes["fsdp"] * sizes["sequence"]
    tokens = tokens_per_step(config) / config.train.grad_accumulation / rows_over
    wide = (4 * d + 3 * ff) / sizes["tensor"]
    # Of a block's input, queries, keys, values, attention and its projection; gate and up.
    products = d + (5 * d + 2 * ff) / sizes["tensor"]
    kept = {"none": 6 * d + 2 * wide, "dots": products, "full": d, "offload": 0}
    held = m.n_layers * tokens * kept[config.compute.remat] * itemsize
    at_work = tokens * (6 * d + 2 * wide) * itemsize
    logits = min(loss_chunk(platform), tokens) * m.n_rows * 4 * 2 if m.head == "lm" else 0
    return int(held + at_work + logits)


def forward_flops_per_token(
    model: ModelConfig, seq_len: int, pooling: str = "eos"
) -> dict[str, float]:
    """FLOPs of one token's forward pass in a causal sequence, by part.

    A multiplication and an addition are two. Attention counts the visible half of the scores
    (2 · L/2 for the scores and as much for the values, times d_model). The vocabulary head works
    on every token; other heads on one position of a sequence, for which, with pooling "eos", the
    last layer needs no more than keys and values of the others.
    """
    d, ff, n = model.d_model, model.d_model * model.ff_mult, model.n_layers
    block, head = 2.0 * (4 * d * d + 3 * d * ff), 2.0 * d * head_width(model)
    whole = {"blocks": n * block, "attention": 2.0 * n * seq_len * d, "head": head}
    if model.head == "lm":
        return whole
    if pooling != "eos":
        return {**whole, "head": head / seq_len}
    return {
        "blocks": (n - 1) * block + 2.0 * 2 * d * d,
        "attention": 2.0 * (n - 1) * seq_len * d,
        "head": head / seq_len,
    }


def train_flops_per_token(config: RunConfig) -> float:
    """Forward and backward, without what `compute.remat` computes again (so MFU, not HFU)."""
    pooling = config.train.pooling
    return 3 * sum(forward_flops_per_token(config.model, config.data.seq_len, pooling).values())


def tokens_per_step(config: RunConfig) -> int:
    """Positions of one optimiser step, padding included; a contrastive pair is two sequences."""
    views = 2 if config.task == "contrastive" else 1
    return views * config.data.global_batch * config.data.seq_len
