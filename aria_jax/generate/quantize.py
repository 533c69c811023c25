"""A matrix as decoding reads it: one row per output, optionally int8 with one scale per row.

One token at a time, every matrix product is a column of dot products; with each row in one piece
of memory a CPU reads the smaller matrices half again as fast. Int8 is weight-only: the conversion
is part of the product, by the compiler's fusion (TPU, GPU) or by a kernel of ours (CPU). Two fields
and one product are all that decoding needs of quantisation, so no library is used for it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from aria_jax.kernels import narrow_cpu


@flax.struct.dataclass
class DecodingMatrix:
    """Stands in for an array [I, O] wherever a block says `x @ weights[name].astype(dtype)`.

    Attributes:
        rows_OxI: float or int8.
        scale_O: float32; the matrix is rows * scale. None for floats.
        on_cpu: whether rows are multiplied by `kernels.narrow_cpu`.
    """

    rows_OxI: jax.Array
    scale_O: jax.Array | None = None
    on_cpu: bool = flax.struct.field(pytree_node=False, default=False)

    def astype(self, dtype: jnp.dtype) -> "DecodingMatrix":
        """Itself: the product takes the dtype of its other factor."""
        del dtype
        return self

    def __rmatmul__(self, x_ZxI: jax.Array) -> jax.Array:
        """x @ matrix, [..., O] in the dtype of x."""
        rows_OxI, last = self.rows_OxI, x_ZxI.ndim - 1
        if self.on_cpu:
            x_RxI = x_ZxI.reshape(-1, x_ZxI.shape[-1])
            if len(x_RxI) <= narrow_cpu.most_rows(rows_OxI.dtype):
                y_RxO = narrow_cpu.narrow_matmul(x_RxI, rows_OxI, self.scale_O)
                return y_RxO.reshape(*x_ZxI.shape[:-1], -1)
            # Fused into the product, the conversion would be done once for every row of x.
            rows_OxI = jax.lax.optimization_barrier(rows_OxI.astype(x_ZxI.dtype))
        # Not x @ rows.T: XLA's CPU backend would write the transposed matrix to memory first.
        y_ZxO = jax.lax.dot_general(
            x_ZxI, rows_OxI.astype(x_ZxI.dtype), (((last,), (1,)), ((), ()))
        )
        return y_ZxO if self.scale_O is None else (y_ZxO * self.scale_O).astype(x_ZxI.dtype)


def quantize(rows_OxI: jax.Array) -> DecodingMatrix:
    """The nearest int8 matrix: each row's greatest magnitude becomes 127."""
    greatest_O = jnp.max(jnp.abs(rows_OxI), axis=1).astype(jnp.float32)
    scale_O = jnp.where(greatest_O > 0, greatest_O, 1.0) / 127
    return DecodingMatrix(jnp.round(rows_OxI / scale_O[:, None]).astype(jnp.int8), scale_O)
