"""The programs that run on accelerators, as shapes: what training, embedding and decoding compile;
and what each costs.

They are the very functions that run later, on shape structs with shardings: no array is made.

The text of a compiled one says: collectives, cycles, FLOPs of kernels. What the compiler does not
count comes by formula: loops after their first turn, the splash kernel, the pass that fills a
gradient cache; and what the mathematics needs.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from aria_jax.aot.hlo import COLLECTIVES, collective_bytes, shapes
from aria_jax.config import RunConfig
from aria_jax.generate.cache import LayerCache, PromptCache, cache_sharding, decode_step, prefill
from aria_jax.generate.weights import abstract_decoder_weights
from aria_jax.losses.cross_entropy import loss_chunk
from aria_jax.models import Parameters, abstract_parameters
from aria_jax.models.heads import model_of, parameter_specs
from aria_jax.presets import Chip
from aria_jax.sharding import batch_sharding, platform, replicated
from aria_jax.train.loop import check_batch
from aria_jax.train.objectives import loss_function
from aria_jax.train.plan import forward_flops_per_token
from aria_jax.train.state import Network, abstract_state, shardings_of
from aria_jax.train.step import make_train_step
from aria_jax.train.tasks import batch_shapes
from data_pipeline.errors import UserError

Task = Literal["pretrain", "continue", "contrastive", "classify", "embed", "prefill", "decode"]
TRAINING = ("pretrain", "continue", "contrastive", "classify")

_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1
"""Cycles of an operation that the TPU compiler has no estimate for."""
_KERNEL = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
ATTENTION_EFFICIENCY = 0.7
"""Assumed share of the time that splash attention keeps the matrix units busy."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of the flash backward pass over the forward's: five matrix products instead of two."""


@dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of its arguments, placed on a mesh.

    Attributes:
        tokens: read or made by one call, over all devices.
        training: has a backward pass.
    """

    function: Any  # jitted
    arguments: tuple
    tokens: int
    training: bool


def program(config: RunConfig, task: Task, mesh: Mesh) -> Program:
    """The program of a task: one optimiser step, one batch of embeddings, a prompt, or a token.

    Batch and length are `data.global_batch` and `data.seq_len`; "decode" holds a prompt of half
    that length and caches for the other half.

    Raises:
        UserError: rows do not divide over the devices.
    """
    if task in TRAINING:
        return _training(config, mesh)
    if task == "embed":
        return _embedding(config, mesh)
    return _prefill(config, mesh) if task == "prefill" else _decoding(config, mesh)


def with_layers(config: RunConfig, n_layers: int) -> RunConfig:
    """`config` with so few layers, unrolled: the compiler counts a loop's body only once."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_layers=n_layers),
        compute=dataclasses.replace(config.compute, scan_layers=False),
    )


def _dtype(config: RunConfig) -> Literal["float32", "bfloat16"]:
    """What the program computes in: on the chips here, "auto" is bfloat16."""
    return "float32" if config.compute.dtype == "float32" else "bfloat16"


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """The shape of an array, typed as one: the decoder's containers hold arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _on(mesh: Mesh, shape: jax.ShapeDtypeStruct, spec: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=spec)


def _training(config: RunConfig, mesh: Mesh) -> Program:
    check_batch(config, mesh.shape)
    network = Network.of(config)
    state = abstract_state(config, network, mesh)
    shapes = batch_shapes(config)
    batch = {name: _on(mesh, shape, batch_sharding(mesh)) for name, shape in shapes.items()}
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    loss = loss_function(config, mesh)
    step = make_train_step(config, network.build, loss, shardings_of(state))
    views = 2 if config.task == "contrastive" else 1
    tokens = views * config.data.global_batch * config.data.seq_len
    return Program(step, (state, batch, number), tokens, training=True)


def _rows(config: RunConfig, mesh: Mesh) -> int:
    rows, ways = config.data.global_batch, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise UserError(f"data.global_batch={rows} does not divide over {ways} devices")
    return rows


def _embedding(config: RunConfig, mesh: Mesh) -> Program:
    rows, length = _rows(config, mesh), config.data.seq_len
    merge = model_of(config.model, config.compute)
    weights = abstract_parameters(parameter_specs(config.model), mesh, _dtype(config))
    cut = batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=cut)
    ends = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=cut)

    def embed(params: Parameters, tokens: jax.Array, ends: jax.Array) -> jax.Array:
        return merge(params).pooled(tokens, ends)

    return Program(jax.jit(embed), (weights, tokens, ends), rows * length, training=False)


def _prefill(config: RunConfig, mesh: Mesh) -> Program:
    length, whole = config.data.seq_len, replicated(mesh)
    prompt = jax.ShapeDtypeStruct((length,), jnp.int32, sharding=whole)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    weights = abstract_decoder_weights(config.model, mesh, _dtype(config))
    arguments = (weights, prompt, number)
    return Program(jax.jit(prefill), arguments, length, training=False)


def _decoding(config: RunConfig, mesh: Mesh) -> Program:
    rows, slots, whole = config.data.global_batch, config.data.seq_len // 2, replicated(mesh)
    m, dtype = config.model, _dtype(config)

    def caches(rows: int) -> tuple[LayerCache, ...]:
        cut = cache_sharding(mesh, rows, m.n_heads)
        keys = _array((rows, m.n_heads, slots, m.d_head), dtype, cut)
        values = _array((rows, m.n_heads, m.d_head, slots), dtype, cut)
        return (LayerCache(keys, values),) * m.n_layers

    number = _array((), jnp.int32, whole)
    visible = _array((1, slots), jnp.bool_, whole)
    prompt = PromptCache(layers=caches(1), visible_PxT=visible, next_position=number)
    token = _array((rows,), jnp.int32, whole)
    weights = abstract_decoder_weights(m, mesh, dtype)
    arguments = (weights, prompt, caches(rows), token, number)
    # The generated cache is updated in place, as the sampling loop does.
    return Program(jax.jit(decode_step, donate_argnums=2), arguments, rows, training=False)


def flops_per_token(config: RunConfig) -> dict[str, float]:
    """Of the forward pass, by part."""
    return forward_flops_per_token(config.model, config.data.seq_len, config.train.pooling)


def uncounted_loss_flops(config: RunConfig, task: Task, made: Program, mesh: Mesh) -> float:
    """Of the chunks after the first of the vocabulary loss; per chip and call."""
    if task not in ("pretrain", "continue"):
        return 0.0
    ways = mesh.size // mesh.shape["tensor"]
    with jax.set_mesh(mesh):
        chunk_tokens = loss_chunk(platform())
    chunks = -(-made.tokens // (config.train.grad_accumulation * ways * chunk_tokens))
    head = 3 * flops_per_token(config)["head"]
    return head * made.tokens / mesh.size * (1 - 1 / max(chunks, 1))


def attention_flops(config: RunConfig, made: Program, mesh: Mesh) -> float:
    """Of the splash kernel, which the compiler does not count; per chip and call."""
    forward = flops_per_token(config)["attention"]
    again = 1.0 if config.compute.remat in ("full", "offload") else 0.0
    passes = 1.0 + again + BACKWARD_ATTENTION if made.training else 1.0
    return forward * passes * made.tokens / mesh.size


def packed_attention_flops(flops: float, d_head: int, chip: Chip) -> float:
    """FLOPs of the packed kernel's forward pass by its cost estimate, which counts the zeros of the
    other heads and idle matrix units, given those that attention needs.
    """
    from aria_jax.kernels.packed_attention import MXU_UTILISATION

    return flops * chip.matrix_unit / d_head / MXU_UTILISATION["forward"]


def uses_splash(config: RunConfig, task: Task, mesh: Mesh) -> bool:
    """Whether attention is the splash kernel there."""
    from aria_jax.kernels.attention import MIN_SPLASH_LENGTH, suits_packed

    if task in ("prefill", "decode") or config.data.seq_len < MIN_SPLASH_LENGTH:
        return False
    shape = config.data.global_batch, config.data.seq_len, config.model.d_model
    with jax.set_mesh(mesh):
        packed = suits_packed(shape, config.model.n_heads)
    chosen = config.compute.attention
    return chosen == "splash" or (chosen == "auto" and not packed)


def cached_flops(config: RunConfig, task: Task, made: Program, mesh: Mesh) -> dict[str, float]:
    """Of gradient caching, which embeds a contrastive batch once more before it goes through the
    parts; per chip and call.
    """
    again = task == "contrastive" and config.train.grad_accumulation > 1
    parts = flops_per_token(config)
    return {name: again * flops * made.tokens / mesh.size for name, flops in parts.items()}


def needed_flops(config: RunConfig, made: Program, *, causal: bool = True) -> float:
    """What the mathematics of one call needs, over all chips.

    Args:
        causal: counts the visible half of the scores; else all of them, as many publications do.
    """
    parts = flops_per_token(config)
    if not causal:
        parts["attention"] *= 2
    return (3 if made.training else 1) * sum(parts.values()) * made.tokens


def attention_efficiency(d_head: int, chip: Chip) -> float:
    """Assumed share of the peak that splash attention reaches on the scores it must compute.

    Products of queries and keys sum over the width of a head, those of weights and values have
    that many columns: heads narrower than the matrix unit leave the rest of it idle.
    """
    return ATTENTION_EFFICIENCY * min(d_head / chip.matrix_unit, 1.0)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of each kind of collective in HLO text; bytes per device and call.

    A collective counts the larger of what it takes and what it gives; asynchronous ones count
    once, at their start. Each operation counts once, also within a loop.
    """
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if (match := _OPERATION.search(line)) is None:
            continue
        made, kind, started = match.groups()
        taken = line[match.end() :].partition(")")[0]
        size = collective_bytes(kind, bool(started), shapes(made), shapes(taken))
        number, total = found.get(kind, (0, 0))
        found[kind] = (number + 1, total + size)
    return found


def moved_bytes(found: dict[str, tuple[int, int]]) -> float:
    """What a device sends for such collectives: sums are reduced and handed round."""
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in found.items())


def cycles(text: str) -> int:
    """Sum of what a TPU's compiler estimates for each operation; the body of a loop counts once."""
    return sum(n for n in map(int, _CYCLES.findall(text)) if n < _UNKNOWN)


def kernel_flops(text: str) -> float:
    """Sum of the cost estimates that kernels brought along."""
    return float(sum(map(int, _KERNEL.findall(text))))
