"""A trained model's parameters in the form that decoding reads fastest.

One token at a time, every matrix product is a column of dot products; with each row in one piece
of memory a CPU reads the smaller matrices half again as fast. Int8 is weight-only: the conversion
is part of the product, by the compiler's fusion (TPU, GPU) or by `kernels.narrow_cpu`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aria_jax.config import ModelConfig
from aria_jax.kernels import narrow_cpu
from aria_jax.models import Parameters, abstract_parameters
from aria_jax.models.heads import Model, parameter_specs, split_model
from data_pipeline.errors import UserError

Precision = Literal["float32", "bfloat16", "int8"]
LayerWeights = dict[str, Any]
"""One block: qkv, out, gate, up and down as `DecodingMatrix`, which stands in for an array in a
product, and the norms' vectors [D]."""


@flax.struct.dataclass
class DecodingMatrix:
    """Stands in for an array [I, *outputs] wherever a block says `x @ weights[name].astype(dtype)`.

    Attributes:
        rows_OxI: float or int8, O being all outputs; on a mesh [*outputs, I], as it is spread along
            one of them.
        scale_O: float32; the matrix is rows * scale. None for floats.
        outputs: where one matrix is several side by side, their shape; () for that of the rows.
        on_cpu: whether rows are multiplied by `kernels.narrow_cpu`.
    """

    rows_OxI: jax.Array
    scale_O: jax.Array | None = None
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    on_cpu: bool = flax.struct.field(pytree_node=False, default=False)

    def astype(self, dtype: jnp.dtype) -> "DecodingMatrix":
        """Itself: the product takes the dtype of its other factor."""
        del dtype
        return self

    def __rmatmul__(self, x_ZxI: jax.Array) -> jax.Array:
        """x @ matrix, [..., *outputs] in the dtype of x."""
        rows_OxI = self.rows_OxI
        shape = (*x_ZxI.shape[:-1], *(self.outputs or rows_OxI.shape[:-1]))
        if self.on_cpu:
            x_RxI = x_ZxI.reshape(-1, x_ZxI.shape[-1])
            if len(x_RxI) <= narrow_cpu.most_rows(rows_OxI.dtype):
                return narrow_cpu.narrow_matmul(x_RxI, rows_OxI, self.scale_O).reshape(shape)
            # Fused into the product, the conversion would be done once for every row of x.
            rows_OxI = jax.lax.optimization_barrier(rows_OxI.astype(x_ZxI.dtype))
        # Not x @ rows.T: XLA's CPU backend would write the transposed matrix to memory first.
        last = (x_ZxI.ndim - 1,), (rows_OxI.ndim - 1,)
        y_ZxO = jax.lax.dot_general(x_ZxI, rows_OxI.astype(x_ZxI.dtype), (last, ((), ())))
        if self.scale_O is not None:
            y_ZxO = (y_ZxO * self.scale_O).astype(x_ZxI.dtype)
        return y_ZxO.reshape(shape)


def quantize(rows_OxI: jax.Array) -> DecodingMatrix:
    """The nearest int8 matrix: each row's greatest magnitude becomes 127."""
    greatest_O = jnp.max(jnp.abs(rows_OxI), axis=-1).astype(jnp.float32)
    scale_O = jnp.where(greatest_O > 0, greatest_O, 1.0) / 127
    return DecodingMatrix(jnp.round(rows_OxI / scale_O[..., None]).astype(jnp.int8), scale_O)


@flax.struct.dataclass
class DecoderWeights:
    """The whole network, one mapping per layer so that no step slices a stacked array.

    Attributes:
        embedding_VxD: token embeddings; their dtype is that of the activations.
        blocks: in order.
        norm_scale_D, norm_bias_D: the last norm.
        head: logits.
        adapter_ExD: maps a conditioning embedding to a first "token"; None where there is none.
        config: of the model; says which token ids have weights.
    """

    embedding_VxD: jax.Array
    blocks: tuple[LayerWeights, ...]
    norm_scale_D: jax.Array
    norm_bias_D: jax.Array
    head: DecodingMatrix
    adapter_ExD: jax.Array | None
    config: ModelConfig = flax.struct.field(pytree_node=False)

    @property
    def n_heads(self) -> int:
        """Attention heads."""
        return self.config.n_heads

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return self.embedding_VxD.dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Of keys and values that are read at every step.

        Beside narrow weights on a CPU, where the attention is there that reads such, bfloat16; as
        its bits, uint16, as XLA's CPU backend makes float32 of all of a bfloat16 cache to write a
        token into it (jaxlib 0.10.2).
        """
        narrow = self.head.on_cpu and narrow_cpu.available()
        return jnp.dtype(jnp.uint16) if narrow else self.dtype

    @property
    def max_seq_len(self) -> int:
        """Positions the model was made for."""
        return self.config.max_seq_len


@partial(jax.jit, static_argnames=("precision", "sharding"))
def _rows(
    matrix_IxO: jax.Array, *, precision: Precision, sharding: NamedSharding | None
) -> DecodingMatrix:
    rows_OxI = _by_output(matrix_IxO, sharding)
    if sharding is not None:
        rows_OxI = jax.lax.with_sharding_constraint(rows_OxI, sharding)
    on_cpu = precision != "float32" and sharding is None and narrow_cpu.on_cpu()
    if precision == "int8":
        matrix = quantize(rows_OxI)
    else:
        matrix = DecodingMatrix(rows_OxI.astype(precision))
    return dataclasses.replace(matrix, outputs=matrix_IxO.shape[1:], on_cpu=on_cpu)


def _by_output(matrix_IxO: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`DecodingMatrix.rows_OxI` of a matrix [I, *outputs]."""
    rows_OxI = jnp.moveaxis(matrix_IxO, 0, -1)
    # By more axes than two XLA's CPU backend multiplies at half the speed; what is spread over a
    # mesh along one of them keeps them.
    return rows_OxI.reshape(-1, rows_OxI.shape[-1]) if sharding is None else rows_OxI


def _rows_sharding(array: jax.Array | jax.ShapeDtypeStruct, index: tuple) -> NamedSharding | None:
    """Of the rows of the matrix array[index]: spread over the mesh as the array is."""
    if not isinstance(array.sharding, NamedSharding) or array.sharding.mesh.size == 1:
        return None
    spec = [*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec))]
    taken = [*index, *[slice(None)] * (array.ndim - len(index))]
    inputs, *outputs = (
        axis for axis, place in zip(spec, taken, strict=True) if isinstance(place, slice)
    )
    return NamedSharding(array.sharding.mesh, PartitionSpec(*outputs, inputs))


def decoder_weights(model: Model, precision: Precision = "float32") -> DecoderWeights:
    """Copies a language model's parameters, sharded as they are, into `precision`.

    With "int8" the matrices of blocks and head are int8, everything else float32. Of a model on one
    CPU, where bfloat16 is slow at everything else, the same is true of "bfloat16".

    Raises:
        UserError: the model has no language head.
    """

    large_pages = narrow_cpu.LargePages()

    def matrix(array: jax.Array, index: tuple) -> DecodingMatrix:
        sharding = _rows_sharding(array, index)
        made = _rows(array[index], precision=precision, sharding=sharding)
        if sharding is not None or not narrow_cpu.on_cpu():
            return made
        return dataclasses.replace(made, rows_OxI=large_pages.put(made.rows_OxI))

    weights = _decoder_layout(
        model.config, split_model(model)[1], matrix, lambda array, index: array[index]
    )
    narrow_matrices_only = precision == "int8" or weights.head.on_cpu
    activations = "float32" if narrow_matrices_only else precision
    adapter = None if weights.adapter_ExD is None else weights.adapter_ExD.astype(activations)
    table = weights.embedding_VxD.astype(activations)
    return dataclasses.replace(weights, embedding_VxD=table, adapter_ExD=adapter)


def abstract_decoder_weights(
    config: ModelConfig, mesh: Mesh, dtype: Literal["float32", "bfloat16"]
) -> DecoderWeights:
    """Shapes, types and shardings of `decoder_weights` of a model that is sharded over a mesh."""

    def matrix(array: jax.ShapeDtypeStruct, index: tuple) -> DecodingMatrix:
        sharding = _rows_sharding(array, index)
        taken = jax.eval_shape(lambda array: array[index], array)
        rows = jax.eval_shape(partial(_by_output, sharding=sharding), taken)
        return DecodingMatrix(_shape(rows.shape, dtype, sharding), outputs=taken.shape[1:])

    def vector(array: jax.ShapeDtypeStruct, index: tuple) -> Any:
        shape = jax.eval_shape(lambda array: array[index], array).shape
        return _shape(shape, array.dtype, NamedSharding(mesh, PartitionSpec()))

    params = abstract_parameters(parameter_specs(config), mesh)
    weights = _decoder_layout(config, params, matrix, vector)
    table, adapter = weights.embedding_VxD, weights.adapter_ExD
    return dataclasses.replace(
        weights,
        embedding_VxD=_shape(table.shape, dtype, table.sharding),
        adapter_ExD=adapter and _shape(adapter.shape, dtype, adapter.sharding),
    )


def _shape(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """The shape of an array, typed as one: the decoder's containers hold arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _decoder_layout(
    config: ModelConfig,
    params: Parameters,
    matrix: Callable[[Any, tuple], DecodingMatrix],
    vector: Callable[[Any, tuple], Any],
) -> DecoderWeights:
    """Where each parameter goes, by what it declares to be.

    Args:
        params: arrays, or their shapes.
        matrix, vector: take what lies at an index of one of them.
    """
    if config.head != "lm":
        raise UserError(
            f"this checkpoint ends in the head {config.head!r}: generating and scoring need "
            "a language model, as `aria-jax train pretrain` makes"
        )

    def block(layer: int) -> LayerWeights:
        weights: LayerWeights = {}
        for name, spec in parameter_specs(config)["backbone"]["blocks"].items():
            stacked = params["backbone"]["blocks"][name]
            weights[name] = (matrix if spec.linear else vector)(stacked, (layer,))
        return weights

    backbone = params["backbone"]
    return DecoderWeights(
        embedding_VxD=backbone["embedding"],
        blocks=tuple(block(layer) for layer in range(config.n_layers)),
        norm_scale_D=backbone["norm_scale"],
        norm_bias_D=backbone["norm_bias"],
        head=matrix(params["head"], ()),
        adapter_ExD=params.get("adapter"),
        config=config,
    )
