"""Log-sum-exp of all pairwise similarities and its gradient, without the matrix of pairs.

The one operation every contrastive loss here is made of. Rows x and columns y are unit vectors;
logit (i, j) is `scale * x_i · y_j`, and pairs with equal ids are left out (an anchor with itself,
with its positive, with another performance of the same composition).

    forward(x, y, x_ids, y_ids, scale)                         -> Statistics of rows and columns
    backward(x, y, x_ids, y_ids, scale, row_lse, column_lse,
             row_cotangent, column_cotangent)                  -> (W y, Wᵀ x), float32

where W is the gradient with respect to the logits; times `scale` that gives the gradients of x
and y. `blockwise`, `pallas_tpu` and `pallas_gpu` implement the two; `pairs` chooses between them,
makes the operation differentiable and runs it as a ring over devices.

Sizes: N rows, M columns, E embedding width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG_INF = -1e30
"""Log of an empty sum. Finite, so that differences of two empty sums are not NaN."""

PADDING_ID = -(2**31)
"""Id of a row that is not there: it pairs with nothing."""


class Statistics(NamedTuple):
    """Of the logits that count, float32.

    Attributes:
        row_lse, row_max: log-sum-exp and maximum of each row, [N].
        column_lse, column_max: of each column, [M].
    """

    row_lse: jax.Array
    row_max: jax.Array
    column_lse: jax.Array
    column_max: jax.Array


def log_of_sum(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """Log-sum-exp from the maximum and the sum of `exp(logit - maximum)`; `NEG_INF` if empty."""
    return jnp.where(total > 0, maximum + jnp.log(jnp.maximum(total, 1e-37)), NEG_INF)


Pair = tuple[jax.Array, jax.Array]
"""Log-sum-exp and maximum."""


def merge_lse(one: Pair, other: Pair) -> Pair:
    """Of the union of two disjoint sets of logits."""
    return jnp.logaddexp(one[0], other[0]), jnp.maximum(one[1], other[1])


def padded(x_NxE: jax.Array, ids_N: jax.Array, rows: int, width: int):
    """`x` and `ids` with rows of padding to a multiple of `rows`, columns to `width`."""
    extra = -len(x_NxE) % rows
    x = jnp.pad(x_NxE, ((0, extra), (0, width - x_NxE.shape[1])))
    return x, jnp.pad(ids_N, (0, extra), constant_values=PADDING_ID)
