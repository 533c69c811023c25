"""A trained model's parameters in the form that decoding reads fastest."""

from functools import partial
from typing import Literal

import flax.struct
import jax
from jax.sharding import NamedSharding, PartitionSpec

from aria_jax.generate.quantize import Int8Matrix, quantize
from aria_jax.models.heads import Model
from data_pipeline.errors import UserError

Precision = Literal["float32", "bfloat16", "int8"]
MATRICES = ("qkv", "out", "gate", "up", "down")


@flax.struct.dataclass
class DecoderWeights:
    """The whole network, one mapping per layer so that no step slices a stacked array.

    Attributes:
        embedding_VxD: token embeddings; their dtype is that of the activations.
        blocks: `models.transformer.LayerWeights` in order; matrices may be `Int8Matrix`.
        norm_scale_D, norm_bias_D: the last norm.
        head_DxV: logits.
        adapter_ExD: maps a conditioning embedding to a first "token"; None where there is none.
        n_heads: attention heads.
        max_seq_len: positions the model was made for.
    """

    embedding_VxD: jax.Array
    blocks: tuple[dict[str, jax.Array | Int8Matrix], ...]
    norm_scale_D: jax.Array
    norm_bias_D: jax.Array
    head_DxV: jax.Array | Int8Matrix
    adapter_ExD: jax.Array | None
    n_heads: int = flax.struct.field(pytree_node=False)
    max_seq_len: int = flax.struct.field(pytree_node=False)


@partial(jax.jit, static_argnames=("layer", "precision", "sharding"))
def _of_layer(stacked, *, layer: int, precision: Precision, sharding: NamedSharding | None):
    return _in_precision(_placed(stacked[layer], sharding), precision)


@partial(jax.jit, static_argnames="precision")
def _in_precision(matrix: jax.Array, precision: Precision) -> jax.Array | Int8Matrix:
    return quantize(matrix) if precision == "int8" else matrix.astype(precision)


def _placed(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def _layer_sharding(stacked: jax.Array) -> NamedSharding | None:
    """How one layer of a stacked parameter is spread: as the stack, without its first axis."""
    if not isinstance(stacked.sharding, NamedSharding) or stacked.sharding.mesh.size == 1:
        return None
    return NamedSharding(stacked.sharding.mesh, PartitionSpec(*stacked.sharding.spec[1:]))


def decoder_weights(model: Model, precision: Precision = "float32") -> DecoderWeights:
    """Copies a language model's parameters, sharded as they are, into `precision`.

    With "int8" the matrices of blocks and head are int8, everything else float32.

    Raises:
        UserError: the model has no language head.
    """
    if model.config.head != "lm" or model.head is None:
        raise UserError(
            f"this checkpoint ends in the head {model.config.head!r}: generating and scoring need "
            "a language model, as `aria-jax train pretrain` makes"
        )
    stacked = model.backbone.blocks.stacked()
    blocks = tuple(
        {
            name: _of_layer(
                array,
                layer=layer,
                precision=precision if name in MATRICES else "float32",
                sharding=_layer_sharding(array),
            )
            for name, array in stacked.items()
        }
        for layer in range(model.config.n_layers)
    )
    activations: Precision = "float32" if precision == "int8" else precision
    return DecoderWeights(
        embedding_VxD=_in_precision(model.backbone.embedding[...], activations),
        blocks=blocks,
        norm_scale_D=model.backbone.norm_scale[...],
        norm_bias_D=model.backbone.norm_bias[...],
        head_DxV=_in_precision(model.head[...], precision),
        adapter_ExD=None
        if model.adapter is None
        else _in_precision(model.adapter[...], activations),
        n_heads=model.config.n_heads,
        max_seq_len=model.config.max_seq_len,
    )
