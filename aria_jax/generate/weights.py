"""A trained model's parameters in the form that decoding reads fastest."""

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
from jax.sharding import NamedSharding, PartitionSpec

from aria_jax.generate.quantize import DecodingMatrix, quantize
from aria_jax.kernels import narrow_cpu
from aria_jax.models.heads import Model
from data_pipeline.errors import UserError

Precision = Literal["float32", "bfloat16", "int8"]
LayerWeights = dict[str, Any]
"""One block: query, key, value, out, gate, up and down as `DecodingMatrix`, which stands in for an
array in a product, and the norms' vectors [D]."""


@flax.struct.dataclass
class DecoderWeights:
    """The whole network, one mapping per layer so that no step slices a stacked array.

    Attributes:
        embedding_VxD: token embeddings; their dtype is that of the activations.
        blocks: in order.
        norm_scale_D, norm_bias_D: the last norm.
        head: logits.
        adapter_ExD: maps a conditioning embedding to a first "token"; None where there is none.
        n_heads: attention heads.
        max_seq_len: positions the model was made for.
    """

    embedding_VxD: jax.Array
    blocks: tuple[LayerWeights, ...]
    norm_scale_D: jax.Array
    norm_bias_D: jax.Array
    head: DecodingMatrix
    adapter_ExD: jax.Array | None
    n_heads: int = flax.struct.field(pytree_node=False)
    max_seq_len: int = flax.struct.field(pytree_node=False)


@partial(jax.jit, static_argnames=("precision", "sharding"))
def _rows(
    matrix_IxO: jax.Array, *, precision: Precision, sharding: NamedSharding | None
) -> DecodingMatrix:
    rows_OxI = matrix_IxO.T
    if sharding is not None:
        rows_OxI = jax.lax.with_sharding_constraint(rows_OxI, sharding)
    on_cpu = precision != "float32" and sharding is None and narrow_cpu.on_cpu()
    if precision == "int8":
        return dataclasses.replace(quantize(rows_OxI), on_cpu=on_cpu)
    return DecodingMatrix(rows_OxI.astype(precision), on_cpu=on_cpu)


def _matrix(array: jax.Array, precision: Precision, index: tuple = ()) -> DecodingMatrix:
    """The matrix array[index] in its decoding form, spread over the mesh as the array is."""
    sharding = None
    if isinstance(array.sharding, NamedSharding) and array.sharding.mesh.size > 1:
        spec = [*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec))]
        taken = [*index, *[slice(None)] * (array.ndim - len(index))]
        inputs, outputs = (
            axis for axis, place in zip(spec, taken, strict=True) if isinstance(place, slice)
        )
        sharding = NamedSharding(array.sharding.mesh, PartitionSpec(outputs, inputs))
    return _rows(array[index], precision=precision, sharding=sharding)


def _block(stacked: dict[str, jax.Array], layer: int, precision: Precision) -> LayerWeights:
    every = slice(None)
    matrices: LayerWeights = {
        name: _matrix(stacked["qkv"], precision, (layer, every, part))
        for part, name in enumerate(("query", "key", "value"))
    }
    for name in ("out", "gate", "up", "down"):
        matrices[name] = _matrix(stacked[name], precision, (layer,))
    vectors = {name: array[layer] for name, array in stacked.items() if name.startswith("norm")}
    return {**matrices, **vectors}


def decoder_weights(model: Model, precision: Precision = "float32") -> DecoderWeights:
    """Copies a language model's parameters, sharded as they are, into `precision`.

    With "int8" the matrices of blocks and head are int8, everything else float32. Of a model on one
    CPU, where bfloat16 is slow at everything else, the same is true of "bfloat16".

    Raises:
        UserError: the model has no language head.
    """
    if model.config.head != "lm" or model.head is None:
        raise UserError(
            f"this checkpoint ends in the head {model.config.head!r}: generating and scoring need "
            "a language model, as `aria-jax train pretrain` makes"
        )
    stacked = model.backbone.blocks.stacked()
    head = _matrix(model.head[...], precision)
    activations = "float32" if precision == "int8" or head.on_cpu else precision
    adapter = None if model.adapter is None else model.adapter[...].astype(activations)
    return DecoderWeights(
        embedding_VxD=model.backbone.embedding[...].astype(activations),
        blocks=tuple(_block(stacked, i, precision) for i in range(model.config.n_layers)),
        norm_scale_D=model.backbone.norm_scale[...],
        norm_bias_D=model.backbone.norm_bias[...],
        head=head,
        adapter_ExD=adapter,
        n_heads=model.config.n_heads,
        max_seq_len=model.config.max_seq_len,
    )
