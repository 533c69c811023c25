"""Flash attention for TPU: on projections as they come, with the rotation inside (Pallas, Mosaic),
and, for what that does not suit, the splash attention of JAX.

A head of 64 fills half of a TPU's 128 lanes. Arrays with heads as an axis are therefore padded to
twice their size in memory, and taking heads apart, rotating them and putting them together costs
more than the output projection. Here a block is 128 columns of the projections, which hold G whole
heads; a head's scores come from a product in which the other heads' columns are zero, which costs
the matrix unit nothing: it would have padded them with zeros anyway. Where values of the other
heads would stand, the forward pass puts ones, so that the product with the softmax weights also
gives their sum.

The backward pass computes every tile of scores once: gradients of keys and values add up while
tiles of queries pass, those of all queries stay in VMEM (Dao et al. 2023, arXiv 2307.08691, gives
the recurrences; both passes here work in powers of two).

Sizes: B batch, L length, D columns of all heads, K head width, C = 128 columns of a block, G = C/K
heads in it, N = D/C blocks, T tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_masks,
)
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from aria_jax.kernels.attention import ATTENTION_RESIDUALS
from aria_jax.sharding import LOGICAL_RULES, divisible_spec, platform

LANES = 128
TILES = (1024, 512, 256, 128)
"""Lengths of tiles, of queries and of keys."""
SUBTILE = 512
"""Most keys whose scores exist at once."""
MAX_LENGTH = 16_384
"""Queries whose gradients fit into VMEM."""
VMEM_BYTES = 64 * 2**20
MXU_UTILISATION = {"forward": 0.75, "backward": 0.9}
"""Share of the time that the matrix units work on 8,192 tokens, by the schedules of libtpu 0.0.52,
read on 2026-11-24: the least of v5e, v5p and v6e (docs/tpu.md)."""
STEP_SCORES = 60_000
"""What a step of the grid costs beside its tile, in scores of equal time."""
LOG2_E = float(np.log2(np.e))
_NEG_INF = -1e30


class Rotation(NamedTuple):
    """Rotary angles of a block's columns, float32 [1 or B, L, C]; sines of a pair's first half are
    negative.
    """

    cos: jax.Array
    sin: jax.Array


def rotation(cos_PxLxK2: jax.Array, sin_PxLxK2: jax.Array) -> Rotation:
    """From the cosines and sines of one head's pairs."""
    heads = LANES // (2 * cos_PxLxK2.shape[-1])
    cos = jnp.concatenate([cos_PxLxK2, cos_PxLxK2], axis=-1)
    sin = jnp.concatenate([-sin_PxLxK2, sin_PxLxK2], axis=-1)
    return Rotation(jnp.tile(cos, heads), jnp.tile(sin, heads))


def suits(length: int, n_columns: int, d_head: int) -> bool:
    """Whether blocks of 128 columns hold two to eight whole heads, and all queries fit."""
    several = d_head in (16, 32, 64) and n_columns % LANES == 0
    return several and TILES[-1] <= length <= MAX_LENGTH


def fits_chip() -> bool:
    """Whether the chip compiled for has the VMEM (TPUs before v5 do not)."""
    return pltpu.get_tpu_info().vmem_capacity_bytes >= VMEM_BYTES


def tile_of(length: int) -> int:
    """The tile that computes least, hidden scores, padding and steps included."""

    def work(tile: int) -> int:
        n = -(-length // tile)
        return n * (n + 1) // 2 * (tile**2 + STEP_SCORES)

    return min(TILES, key=work)


def attend(
    q_BxLxD: jax.Array,
    k_BxLxD: jax.Array,
    v_BxLxD: jax.Array,
    cos_PxLxK2: jax.Array,
    sin_PxLxK2: jax.Array,
    segment_ids_BxL: jax.Array | None,
) -> jax.Array:
    """Rotates queries and keys and attends, [B, L, D]; on one device.

    Raises:
        ValueError: sizes that it does not suit.
    """
    _, length, columns = q_BxLxD.shape
    d_head = 2 * cos_PxLxK2.shape[-1]
    if not suits(max(length, TILES[-1]), columns, d_head):
        raise ValueError(f"{length} positions, {columns} columns and heads of {d_head} do not suit")
    tile = tile_of(length)
    padded = -(-length // tile) * tile

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    # Padding comes last, so causality hides it from all that counts.
    rope = jax.tree.map(pad, rotation(cos_PxLxK2, sin_PxLxK2))
    segments = None if segment_ids_BxL is None else pad(segment_ids_BxL)[:, None]
    q, k, v = (pad(x) for x in (q_BxLxD, k_BxLxD, v_BxLxD))
    return _attend(q, k, v, rope, segments, d_head, tile)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: Rotation,
    segments: jax.Array | None,
    d_head: int,
    tile: int,
) -> jax.Array:
    return _forward(q, k, v, rope, segments, d_head, tile)[0]


def _lanes(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _rotate_half(x_TxC: jax.Array, d_head: int) -> jax.Array:
    """Every head's halves in each other's place."""
    half = d_head // 2
    first = _lanes(x_TxC.shape) % d_head < half
    return jnp.where(first, pltpu.roll(x_TxC, LANES - half, 1), pltpu.roll(x_TxC, half, 1))


def _rotated(x_TxC: jax.Array, cos: jax.Array, sin: jax.Array, d_head: int) -> jax.Array:
    """float32."""
    x_TxC = x_TxC.astype(jnp.float32)
    return x_TxC * cos + _rotate_half(x_TxC, d_head) * sin


def _rotated_back(x_TxC: jax.Array, cos: jax.Array, sin: jax.Array, d_head: int) -> jax.Array:
    """The gradient of `_rotated`."""
    return x_TxC * cos + _rotate_half(x_TxC * sin, d_head)


def _of_head(x_TxC: jax.Array, head: int, d_head: int, elsewhere: float = 0.0) -> jax.Array:
    """One head's columns, and a constant in those of the others."""
    mine = _lanes(x_TxC.shape) // d_head == head
    return jnp.where(mine, x_TxC, jnp.asarray(elsewhere, x_TxC.dtype))


def _by_head(parts_TxC: list[jax.Array], d_head: int) -> jax.Array:
    """Each head's columns from its own part."""
    head, out = _lanes(parts_TxC[0].shape) // d_head, parts_TxC[0]
    for i, part in enumerate(parts_TxC[1:], 1):
        out = jnp.where(head == i, part, out)
    return out


def _dot_f32(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Sums over axis `contract[0]` of `a` and `contract[1]` of `b`, in float32."""
    # One bfloat16 pass would leave float32 inputs with three digits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _forward_kernel(
    i_of: Any, j_of: Any, q: Any, k: Any, v: Any, cos_q: Any, sin_q: Any, cos_k: Any, sin_k: Any,
    segments_q: Any, segments_k: Any, out: Any, lse: Any, q_heads: Any, largest: Any, total: Any,
    *, d_head: int,
) -> None:  # fmt: skip
    step = pl.program_id(2)
    i, j = i_of[step], j_of[step]
    tile, heads = q.shape[1], LANES // d_head
    sub = min(tile, SUBTILE)

    @pl.when(j == 0)
    def _() -> None:
        rotated = _rotated(q[0], cos_q[0], sin_q[0], d_head) * (d_head**-0.5 * LOG2_E)
        for head in range(heads):
            q_heads[head] = _of_head(rotated.astype(q.dtype), head, d_head)
        largest[...] = jnp.full(largest.shape, _NEG_INF, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def attend_to(start: int, diagonal: bool) -> None:
        keys = pl.ds(start, sub)
        first = start if diagonal else 0
        rows, n_rows = pl.ds(first, tile - first), tile - first
        rotated = _rotated(k[0, keys], cos_k[0, keys], sin_k[0, keys], d_head).astype(k.dtype)
        visible = None
        if segments_q is not None:
            visible = segments_k[0, :, keys] == segments_q[0, :, rows].T
        if diagonal:
            row = jax.lax.broadcasted_iota(jnp.int32, (n_rows, sub), 0)
            causal = row >= _lanes((n_rows, sub))
            visible = causal if visible is None else visible & causal
        for head in range(heads):
            scores = _dot_f32(q_heads[head, rows], rotated, (1, 1))
            if visible is not None:
                scores = jnp.where(visible, scores, _NEG_INF)
            before = largest[head, rows]
            now = jnp.maximum(before, scores.max(1, keepdims=True))
            largest[head, rows] = now
            weights = jnp.exp2(scores - jnp.tile(now, (1, sub // LANES))).astype(v.dtype)
            values = _of_head(v[0, keys], head, d_head, elsewhere=1.0)
            total[head, rows] = total[head, rows] * jnp.exp2(before - now) + _dot_f32(
                weights, values, (1, 0)
            )

    for diagonal in (False, True):

        @pl.when(i == j if diagonal else i > j)
        def _(diagonal: bool = diagonal) -> None:
            for start in range(0, tile, sub):
                attend_to(start, diagonal)

    @pl.when(i == j)
    def _() -> None:
        # The sum of weights stands in the columns of the other heads.
        sums = [pltpu.roll(total[head], d_head, 1) for head in range(heads)]
        sum_ = _by_head(sums, d_head)
        out[0] = (_by_head([total[head] for head in range(heads)], d_head) / sum_).astype(out.dtype)
        logs = (_by_head([largest[head] for head in range(heads)], d_head) + jnp.log2(sum_)).T
        for head in range(heads):
            lse[0, 0, head] = logs[head * d_head]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: Rotation,
    segments: jax.Array | None,
    d_head: int,
    tile: int,
) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, length, columns = q.shape
    heads = LANES // d_head
    segmented = [] if segments is None else [segments, segments]
    kernel = partial(_forward_kernel, d_head=d_head)
    of = _Blocks(tile, len(rope.cos) > 1)
    out, lse = _call(
        kernel if segmented else partial(_without_segments, kernel, 9),
        q,
        tile,
        [(i, j) for i in range(length // tile) for j in range(i + 1)],
        in_specs=[
            *[of.columns(_QUERY), of.columns(_KEY), of.columns(_KEY)],
            *[of.cos_sin(_QUERY)] * 2,
            *[of.cos_sin(_KEY)] * 2,
            *[of.segments(_QUERY), of.segments(_KEY)][: len(segmented)],
        ],
        out_specs=[of.columns(_QUERY), of.heads(heads)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, columns // LANES, heads, length), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((heads, tile, LANES), q.dtype),
            pltpu.VMEM((heads, tile, LANES), jnp.float32),
            pltpu.VMEM((heads, tile, LANES), jnp.float32),
        ],
        cost_estimate=_cost(
            q, d_head, tile, products=2, utilisation=MXU_UTILISATION["forward"], arrays=2
        ),
        name="rotary_attention",
    )(q, k, v, rope.cos, rope.sin, rope.cos, rope.sin, *segmented)
    out, lse = checkpoint_name(out, ATTENTION_RESIDUALS), checkpoint_name(lse, ATTENTION_RESIDUALS)
    return out, (q, k, v, rope, segments, out, lse)


_QUERY, _KEY = 0, 1
"""Which of a pair of tiles, (of queries, of keys), a block belongs to."""


class _Blocks(NamedTuple):
    """Which part of an array a step sees: that of the current pair of tiles."""

    tile: int
    own_positions: bool

    def columns(self, which: int) -> pl.BlockSpec:
        """Of [B, L, D]."""
        return pl.BlockSpec((1, self.tile, LANES), lambda b, n, t, *pair: (b, pair[which][t], n))

    def cos_sin(self, which: int) -> pl.BlockSpec:
        """Of cosines and sines."""
        own = int(self.own_positions)
        return pl.BlockSpec(
            (1, self.tile, LANES), lambda b, n, t, *pair: (b * own, pair[which][t], 0)
        )

    def segments(self, which: int) -> pl.BlockSpec:
        """Of [B, 1, L]."""
        return pl.BlockSpec((1, 1, self.tile), lambda b, n, t, *pair: (b, 0, pair[which][t]))

    def heads(self, heads: int) -> pl.BlockSpec:
        """Of [B, N, G, L], for queries."""
        return pl.BlockSpec(
            (1, 1, heads, self.tile), lambda b, n, t, *pair: (b, n, 0, pair[_QUERY][t])
        )


def _call(
    kernel: Callable[..., None],
    q: jax.Array,
    tile: int,
    pairs: list[tuple[int, int]],
    *,
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    scratch_shapes: list[Any],
    **settings: Any,
) -> Callable[..., Any]:
    """A kernel over every pair of a tile of queries and one of keys that it sees, in this order."""
    i_of, j_of = np.array(pairs, np.int32).T
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(q.shape[0], q.shape[2] // LANES, len(pairs)),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch_shapes,
    )
    call = pl.pallas_call(
        kernel,
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=platform() != "tpu",
        **settings,
    )
    return partial(call, jnp.asarray(i_of), jnp.asarray(j_of))


def _without_segments(kernel: Callable[..., None], at: int, *refs: Any) -> None:
    """Calls a kernel that takes segments with none."""
    kernel(*refs[:at], None, None, *refs[at:])


def _matrix_unit() -> int:
    """Rows and columns of the systolic array of the chip compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return 256 if any(name in kind for name in ("v6", "v7", "TPU7")) else 128


def _cost(
    q_BxLxD: jax.Array, d_head: int, tile: int, *, products: int, utilisation: float, arrays: int
) -> pl.CostEstimate:
    """What the matrix unit works through, zeros and hidden scores included, over its share of the
    time: the compiler divides these FLOPs by the chip's peak.

    Args:
        products: matrix products of a tile of scores.
        arrays: tiles of projections that every step fetches, with one of cosines and sines.
    """
    batch, length, columns = q_BxLxD.shape
    tiles, subtiles = length // tile, max(tile // SUBTILE, 1)
    hidden = tiles * tile**2 * (subtiles - 1) / subtiles / 2  # of tiles on the diagonal
    scores = tiles * (tiles + 1) / 2 * tile**2 - hidden
    kernel_flops = 2 * products * scores * _matrix_unit() * (columns // d_head) * batch
    fetched = tiles * (tiles + 1) // 2 * tile * (arrays * q_BxLxD.dtype.itemsize + 8)
    return pl.CostEstimate(
        flops=int(kernel_flops / utilisation),
        transcendentals=int(scores * batch * columns // d_head),
        bytes_accessed=fetched * columns * batch,
    )


def _backward_kernel(
    i_of: Any, j_of: Any, q: Any, k: Any, v: Any, out: Any, d_out: Any, lse: Any,
    cos_q: Any, sin_q: Any, cos_k: Any, sin_k: Any, segments_q: Any, segments_k: Any,
    d_q: Any, d_k: Any, d_v: Any, q_rot: Any, delta: Any, q_total: Any,
    k_heads: Any, v_heads: Any, k_total: Any, v_total: Any, *, d_head: int,
) -> None:  # fmt: skip
    step = pl.program_id(2)
    i, j = i_of[step], j_of[step]
    tile, heads = q.shape[1], LANES // d_head
    sub = min(tile, SUBTILE)
    scale = d_head**-0.5

    @pl.when(j == 0)
    def _() -> None:  # once for every tile of queries
        rotated = _rotated(q[0], cos_q[0], sin_q[0], d_head) * (scale * LOG2_E)
        q_rot[i] = rotated.astype(q.dtype)
        q_total[i] = jnp.zeros(q_total.shape[1:], jnp.float32)
        # The softmax's own gradient needs Σ_m p_m dp_m, which is out · d_out.
        both = out[0].astype(jnp.float32) * d_out[0].astype(jnp.float32)
        which = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)
        mine = (_lanes((8, LANES)) // d_head == which).astype(jnp.float32)
        delta[i] = _dot_f32(mine, both, (1, 1))

    @pl.when(i == j)
    def _() -> None:  # once for every tile of keys
        rotated = _rotated(k[0], cos_k[0], sin_k[0], d_head).astype(k.dtype)
        for head in range(heads):
            k_heads[head] = _of_head(rotated, head, d_head)
            v_heads[head] = _of_head(v[0], head, d_head)
        k_total[...] = jnp.zeros(k_total.shape, jnp.float32)
        v_total[...] = jnp.zeros(v_total.shape, jnp.float32)

    def attended_from(start: int, diagonal: bool) -> None:
        keys = pl.ds(start, sub)
        first = start if diagonal else 0
        rows, n_rows = pl.ds(first, tile - first), tile - first
        queries, d_outs = q_rot[i, rows], d_out[0, rows]
        visible = None
        if segments_q is not None:
            visible = segments_q[0, :, rows] == segments_k[0, :, keys].T
        if diagonal:
            row = jax.lax.broadcasted_iota(jnp.int32, (sub, n_rows), 0)
            causal = row <= _lanes((sub, n_rows))
            visible = causal if visible is None else visible & causal
        of_keys, of_values = [], []
        of_queries = jnp.zeros((n_rows, LANES), jnp.float32)
        for head in range(heads):
            k_head = k_heads[head, keys]
            scores_t = _dot_f32(k_head, queries, (1, 1))
            weights_t = jnp.exp2(scores_t - lse[0, 0, head, rows][None])
            if visible is not None:
                weights_t = jnp.where(visible, weights_t, 0.0)
            d_weights_t = _dot_f32(v_heads[head, keys], d_outs, (1, 1))
            d_scores_t = (weights_t * (d_weights_t - delta[i, head, rows][None])).astype(k.dtype)
            of_values.append(_dot_f32(weights_t.astype(v.dtype), d_outs, (1, 0)))
            of_keys.append(_dot_f32(d_scores_t, queries, (1, 0)))
            of_queries += _dot_f32(d_scores_t, k_head, (0, 0))
        k_total[keys] += _by_head(of_keys, d_head)
        v_total[keys] += _by_head(of_values, d_head)
        q_total[i, rows] += of_queries

    for diagonal in (False, True):

        @pl.when(i == j if diagonal else i > j)
        def _(diagonal: bool = diagonal) -> None:
            for start in range(0, tile, sub):
                attended_from(start, diagonal)

    @pl.when(i == j)
    def _() -> None:  # no later tile of keys is visible from these queries
        rows = pl.ds(pl.multiple_of(i * tile, tile), tile)
        d_q[0, rows] = _rotated_back(q_total[i] * scale, cos_q[0], sin_q[0], d_head).astype(
            d_q.dtype
        )

    @pl.when(i == q_rot.shape[0] - 1)
    def _() -> None:
        k_grad = k_total[...] * (1 / LOG2_E)
        d_k[0] = _rotated_back(k_grad, cos_k[0], sin_k[0], d_head).astype(d_k.dtype)
        d_v[0] = v_total[...].astype(d_v.dtype)


def _backward(
    d_head: int, tile: int, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[Any, ...]:
    q, k, v, rope, segments, out, lse = residuals
    _, length, _ = q.shape
    tiles, heads = length // tile, LANES // d_head
    segmented = [] if segments is None else [segments, segments]
    kernel = partial(_backward_kernel, d_head=d_head)
    of = _Blocks(tile, len(rope.cos) > 1)
    gradients = _call(
        kernel if segmented else partial(_without_segments, kernel, 12),
        q,
        tile,
        [(i, j) for j in range(tiles) for i in range(j, tiles)],
        in_specs=[
            *[of.columns(which) for which in (_QUERY, _KEY, _KEY, _QUERY, _QUERY)],
            of.heads(heads),
            *[of.cos_sin(_QUERY)] * 2,
            *[of.cos_sin(_KEY)] * 2,
            *[of.segments(_QUERY), of.segments(_KEY)][: len(segmented)],
        ],
        out_specs=[
            pl.BlockSpec((1, length, LANES), lambda b, n, t, *pair: (b, 0, n)),
            of.columns(_KEY),
            of.columns(_KEY),
        ],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[
            pltpu.VMEM((tiles, tile, LANES), q.dtype),
            pltpu.VMEM((tiles, 8, tile), jnp.float32),
            pltpu.VMEM((tiles, tile, LANES), jnp.float32),
            pltpu.VMEM((heads, tile, LANES), k.dtype),
            pltpu.VMEM((heads, tile, LANES), v.dtype),
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((tile, LANES), jnp.float32),
        ],
        cost_estimate=_cost(
            q, d_head, tile, products=5, utilisation=MXU_UTILISATION["backward"], arrays=3
        ),
        name="rotary_attention_gradient",
    )(q, k, v, out, d_out, lse, rope.cos, rope.sin, rope.cos, rope.sin, *segmented)
    return *gradients, None, None


_attend.defvjp(_forward, _backward)


SPLASH_BLOCKS = (1024, 512, 256, 128)
"""Lengths of the kernel's tiles; the least is the width of a TPU's lanes."""


def splash_attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segment_ids_BxL: jax.Array | None,
    mesh: AbstractMesh | None = None,
) -> jax.Array:
    """As `attention`; any length, padded to a multiple of the tile. Interpreted elsewhere than on a
    TPU, slowly.

    The kernel sees one sequence of one device: batches by `vmap`, devices by `shard_map`. With a
    sequence axis on the mesh each device has the queries of its part and the keys and values of
    all.

    Args:
        mesh: what batch, heads and queries are sharded over; None on one device.
    """
    length, heads, width = q_BxLxHxK.shape[1:]
    parts = 1 if mesh is None else mesh.shape["sequence"]
    padded, block = _splash_tiling(length, parts)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    # Padding comes last, so causality hides it from all that counts.
    q, k, v = (pad(x) for x in (q_BxLxHxK * jnp.asarray(width**-0.5, q_BxLxHxK.dtype),
                                k_BxLxHxK, v_BxLxHxK))  # fmt: skip
    segments = None if segment_ids_BxL is None else pad(segment_ids_BxL)
    if mesh is None:
        out = _splash_on_one_device(
            _splash_kernel(heads, padded, block, 1), q, k, v, segments, segments
        )
        return out[:, :length]
    of_queries = divisible_spec(mesh, ("batch", "length", "heads", None), q.shape)
    of_keys = divisible_spec(mesh, ("batch", None, "heads", None), q.shape)
    local_heads = heads // (mesh.shape["tensor"] if of_queries[2] else 1)
    kernel = _splash_kernel(local_heads, padded, block, parts)
    placed = NamedSharding(mesh, PartitionSpec(None, LOGICAL_RULES["length"]))
    run = jax.shard_map(
        _splash_on_one_device,
        mesh=mesh,
        in_specs=(
            kernel.manual_sharding_spec(placed),
            of_queries,
            of_keys,
            of_keys,
            PartitionSpec(*of_queries[:2]),
            PartitionSpec(*of_keys[:2]),
        ),
        out_specs=of_queries,
        check_vma=False,
    )
    return run(kernel, q, k, v, segments, segments)[:, :length]


def _splash_tiling(length: int, parts: int) -> tuple[int, int]:
    """The padded length and the tile: least padding first, then the largest tile."""
    padded, negative = min((-(-length // (b * parts)) * b * parts, -b) for b in SPLASH_BLOCKS)
    return padded, -negative


def _splash_kernel(heads: int, length: int, block: int, parts: int) -> splash.SplashAttentionKernel:
    mask = splash_masks.CausalMask((length, length), shard_count=parts)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        splash_masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        interpret=platform() != "tpu",
    )


def _splash_on_one_device(
    kernel: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if query_segments is None or key_segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(query_segments, key_segments))
    return out.swapaxes(1, 2)
