"""The programs that run on accelerators, as shapes: what training, embedding and decoding compile.

They are the very functions that run later, on shape structs with shardings: no array is made.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from aria_jax.config import RunConfig
from aria_jax.generate.cache import LayerCache, PromptCache, cache_sharding, decode_step, prefill
from aria_jax.generate.weights import abstract_decoder_weights
from aria_jax.models.heads import abstract_model, parameter_specs, split_model
from aria_jax.models.parameters import Parameters, abstract_parameters
from aria_jax.sharding import batch_sharding, replicated
from aria_jax.train.loop import check_batch
from aria_jax.train.state import Network, abstract_state
from aria_jax.train.step import make_train_step
from aria_jax.train.tasks import batch_shapes, loss_function
from data_pipeline.errors import UserError

Task = Literal["pretrain", "continue", "contrastive", "classify", "embed", "prefill", "decode"]
TRAINING = ("pretrain", "continue", "contrastive", "classify")


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


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """The shape of an array, typed as one: the decoder's containers hold arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _on(mesh: Mesh, shape: jax.ShapeDtypeStruct, spec: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=spec)


def _training(config: RunConfig, mesh: Mesh) -> Program:
    check_batch(config, mesh)
    network = Network.of(config)
    state = abstract_state(config, network, mesh)
    shapes = batch_shapes(config)
    batch = {name: _on(mesh, shape, batch_sharding(mesh)) for name, shape in shapes.items()}
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    step = make_train_step(config, network.build, loss_function(config, mesh))
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
    merge, _ = split_model(abstract_model(config.model, config.compute))
    weights = abstract_parameters(parameter_specs(config.model), mesh, config.compute.dtype)
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
    weights = abstract_decoder_weights(config.model, mesh, config.compute.dtype)
    arguments = (weights, prompt, number)
    return Program(jax.jit(prefill), arguments, length, training=False)


def _decoding(config: RunConfig, mesh: Mesh) -> Program:
    rows, slots, whole = config.data.global_batch, config.data.seq_len // 2, replicated(mesh)
    m, dtype = config.model, config.compute.dtype

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
