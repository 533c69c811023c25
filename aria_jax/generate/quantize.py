"""Weight-only int8: a matrix in a quarter of float32's bytes, one scale per output."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Int8Matrix:
    """A matrix [I, ...] in int8, symmetric, one scale per output.

    Stands in for an array wherever a block says `weights[name].astype(dtype)`: the conversion is
    part of the matrix product where the compiler fuses it (TPU, GPU).

    Attributes:
        values: int8 [I, ...].
        scale: float32 [1, ...]; the matrix is values * scale.
    """

    values: jax.Array
    scale: jax.Array

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix as an array of `dtype`."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


def quantize(matrix: jax.Array) -> Int8Matrix:
    """The nearest int8 matrix: in every column the greatest magnitude becomes 127."""
    greatest = jnp.max(jnp.abs(matrix), axis=0, keepdims=True).astype(jnp.float32)
    scale = jnp.where(greatest > 0, greatest, 1.0) / 127
    return Int8Matrix(jnp.round(matrix / scale).astype(jnp.int8), scale)
