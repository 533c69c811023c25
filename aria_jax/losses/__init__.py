"""Pure loss functions: arrays in, scalar and metrics out."""

from typing import NamedTuple

import jax


class Groups(NamedTuple):
    """Which of `n` groups each row of a batch belongs to, int [B]; of none where negative."""

    of_row: jax.Array
    n: int

    def one_hot(self) -> jax.Array:
        """float32 [B, n]."""
        return jax.nn.one_hot(self.of_row, self.n)

    def sums(self, loss_B: jax.Array, weight_B: jax.Array) -> dict[str, jax.Array]:
        """Per group the sums of loss times weight and of the weights, float32 [n] both."""
        loss_B = jax.lax.stop_gradient(loss_B) * weight_B
        return {"loss": loss_B @ self.one_hot(), "weight": weight_B @ self.one_hot()}
