"""The decoder: pre-norm blocks of rotary attention and SwiGLU (reference: aria/model.py).

All weights of one kind are one array with the layer as its leading axis, so that the layers are
one `lax.scan` and one sharding rule serves them all. A block is made of pure functions on one
layer's weights (`project_qkv`, `attn_out_and_mlp`); the KV-cache decoder uses the latter too.

Sizes: B batch, L length, D d_model, H heads, K head width, F feed-forward, V vocabulary, N layers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.kernels import (
    MOMENTS,
    PROJECTION,
    flat,
    layer_norm,
    matmul,
    products,
    swiglu,
)
from aria_jax.kernels.attention import (
    ATTENTION_RESIDUALS,
    apply_rope,
    attend_once,
    keeps_cudnn,
    rope_tables,
    rotary_attention,
    split_heads,
)
from aria_jax.models import parameter, uniform_init
from aria_jax.sharding import constrain
from data_pipeline.vocabulary import ids_in

ACTIVATIONS = ("batch", "length", None)
"""Logical axes of hidden states [B, L, D]."""
BLOCK_INPUT = "block_input"
"""Checkpoint name of what a layer reads."""
UNKNOWN_ID = 3
"""Token `<U>` of every tokenizer."""
LayerWeights = Mapping[str, jax.Array]
"""Weights of one layer: qkv [D, 3, D], out [D, D], gate and up [D, F], down [F, D], and
norm1_scale, norm1_bias, norm2_scale, norm2_bias [D]."""


def row_table(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Where the weights of each token id are: its row, int32 [V], and whether it has one, bool [V].

    An id without weights is read as `<U>`.
    """
    ids = ids_in(config.vocabulary) if config.n_rows < config.vocab_size else []
    known_V = np.zeros(config.vocab_size, bool)
    known_V[ids or slice(None)] = True
    row_V = np.cumsum(known_V) - 1
    row_V[~known_V] = row_V[UNKNOWN_ID]
    return row_V.astype(np.int32), known_V


def token_rows(config: ModelConfig, ids: jax.Array) -> jax.Array:
    """Rows of the embedding, and columns of a language head, that belong to token ids."""
    if config.n_rows == config.vocab_size:
        return ids
    return jnp.asarray(row_table(config)[0])[ids]


class Blocks(nnx.Module):
    """The stacked weights of all blocks, float32, layer first."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        n, d, f = config.n_layers, config.d_model, config.d_model * config.ff_mult

        def linear(shape: tuple[int, ...], axes: tuple[str | None, ...], name: str) -> nnx.Param:
            value = uniform_init(rngs.params(), (n, *shape), shape[0])
            published = f"model.encode_layers.{{}}.{name}.weight"
            return parameter(value, ("layer", *axes), published=published, linear=True)

        def vector(fill: float, name: str) -> nnx.Param:
            published = f"model.encode_layers.{{}}.{name}"
            return parameter(jnp.full((n, d), fill), ("layer", None), published=published)

        self.qkv = linear((d, 3, d), ("embed", None, "heads"), "mixed_qkv")
        self.out = linear((d, d), ("heads", "embed"), "att_proj_linear")
        self.gate = linear((d, f), ("embed", "mlp"), "ff_gate_proj")
        self.up = linear((d, f), ("embed", "mlp"), "ff_up_proj")
        self.down = linear((f, d), ("mlp", "embed"), "ff_down_proj")
        self.norm1_scale = vector(1.0, "norm1.weight")
        self.norm1_bias = vector(0.0, "norm1.bias")
        self.norm2_scale = vector(1.0, "norm2.weight")
        self.norm2_bias = vector(0.0, "norm2.bias")

    def stacked(self) -> dict[str, jax.Array]:
        """Every weight by name, [N, ...]."""
        return {name: param[...] for name, param in nnx.state(self, nnx.Param).items()}


class Transformer(nnx.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        d = config.d_model
        self.embedding = parameter(
            0.02 * jax.random.normal(rngs.params(), (config.n_rows, d)),
            (None, "embed"),
            published="model.tok_embeddings.weight",
        )
        self.blocks = Blocks(config, rngs)
        norm = "model.out_layer_norm"
        self.norm_scale = parameter(jnp.ones(d), (None,), published=f"{norm}.weight")
        self.norm_bias = parameter(jnp.zeros(d), (None,), published=f"{norm}.bias")

    def __call__(
        self,
        tokens_BxL: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        prefix_BxD: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        pool_at_B: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the last norm, [B, L, D] in the compute dtype.

        Args:
            tokens_BxL: integer ids.
            positions: int [B, L] for rotary embedding; 0, 1, 2, … without.
            segment_ids: int [B, L]; attention stays within a segment.
            prefix_BxD: a vector put before the first token; the last token is dropped for it.
            dropout_key: switches residual dropout on.
            pool_at_B: the only position of each row that is wanted: [B, 1, D] is returned, and the
                last layer computes no more than keys and values of the others.
        """
        # The table is looked up in float32, so that its gradient is summed in float32.
        rows_BxL = token_rows(self.config, tokens_BxL)
        # A run has settled what "auto" is; whoever merely loads a model is not to be surprised.
        dtype = "float32" if self.compute.dtype == "auto" else self.compute.dtype
        x_BxLxD = self.embedding[...][rows_BxL].astype(dtype)
        if prefix_BxD is not None:
            prefix = prefix_BxD[:, None].astype(x_BxLxD.dtype)
            x_BxLxD = jnp.concatenate([prefix, x_BxLxD[:, :-1]], axis=1)
        known = np.arange(tokens_BxL.shape[1])[None]
        cos, sin = rope_tables(known if positions is None else positions, self.config.d_head)

        def layer(x_BxLxD: jax.Array, scanned: tuple) -> jax.Array:
            weights, drop_rate, key = scanned
            x_BxLxD = checkpoint_name(constrain(x_BxLxD, *ACTIVATIONS), BLOCK_INPUT)
            q, k, v = (
                checkpoint_name(projected, PROJECTION)
                for projected in project_qkv(weights, x_BxLxD)
            )
            attended = rotary_attention(
                q, k, v, cos, sin,
                n_heads=self.config.n_heads,
                segment_ids=segment_ids,
                implementation=self.compute.attention,
            )  # fmt: skip
            drop = _dropouts(key, drop_rate)
            return constrain(attn_out_and_mlp(weights, x_BxLxD, attended, drop), *ACTIVATIONS)

        n = self.config.n_layers
        drop_rates = self.config.resid_dropout * jnp.arange(n) / max(n - 1, 1)
        keys = None
        if dropout_key is not None and self.config.resid_dropout > 0:
            keys = jax.random.split(dropout_key, n)
        weights = self.blocks.stacked()
        if not self.compute.scan_layers:
            # Once for both passes; layers taken out of a float32 stack would be copied first.
            weights = {k: w.astype(dtype) if w.ndim > 2 else w for k, w in weights.items()}
        stacked = weights, drop_rates, keys
        last_layer = None
        if pool_at_B is not None:
            cos_sin = [jnp.broadcast_to(t, (len(x_BxLxD), *t.shape[1:])) for t in (cos, sin)]
            last_layer = partial(
                last_layer_at,
                pool_at_B=pool_at_B,
                cos_sin=cos_sin,
                segment_ids=segment_ids,
                n_heads=self.config.n_heads,
            )
        x_BxLxD = run_layers(layer, x_BxLxD, stacked, self.compute, last_layer)
        return layer_norm(x_BxLxD, self.norm_scale[...], self.norm_bias[...])


def run_layers(
    layer: Callable[[jax.Array, Any], jax.Array],
    x_BxLxD: jax.Array,
    stacked: tuple,
    compute: ComputeConfig,
    last_layer: Callable[[jax.Array, Any], jax.Array] | None = None,
) -> jax.Array:
    """The output of all layers; `stacked` has one slice of every leaf for each.

    Args:
        last_layer: is computed in place of the last one.
    """
    # Within a loop nothing can undo recomputation by merging it with the forward pass.
    layer = _rematerialised(layer, compute.remat, prevent_cse=not compute.scan_layers)
    if last_layer is not None:
        last_layer = _rematerialised(last_layer, compute.remat, prevent_cse=True)
    leaves, structure = jax.tree.flatten(stacked)
    n = len(leaves[0])
    if compute.scan_layers and last_layer is None:
        return jax.lax.scan(lambda x, one: (layer(x, one), None), x_BxLxD, stacked)[0]
    # `split` is one pass over the weights, and over their gradients on the way back.
    sizes = [n - 1, 1] if compute.scan_layers else [1] * n
    parts = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
    *earlier, last = (jax.tree.unflatten(structure, part) for part in parts)

    def first(part: tuple) -> tuple:
        return jax.tree.map(lambda leaf: leaf[0], part)

    if compute.scan_layers:
        x_BxLxD = jax.lax.scan(lambda x, one: (layer(x, one), None), x_BxLxD, earlier[0])[0]
    else:
        for one in earlier:
            x_BxLxD = layer(x_BxLxD, first(one))
    return (last_layer or layer)(x_BxLxD, first(last))


def last_layer_at(
    x_BxLxD: jax.Array,
    scanned: tuple,
    *,
    pool_at_B: jax.Array,
    cos_sin: Sequence[jax.Array],
    segment_ids: jax.Array | None,
    n_heads: int,
) -> jax.Array:
    """The output of a layer at one position of each row, [B, 1, D].

    Args:
        scanned: the layer's weights, dropout rate and key.
        cos_sin: cosines and sines, [B, L, 1, K/2].
    """
    weights, drop_rate, key = scanned
    x_BxLxD = checkpoint_name(constrain(x_BxLxD, *ACTIVATIONS), BLOCK_INPUT)

    def read(array: jax.Array) -> jax.Array:
        index = pool_at_B.reshape(-1, *[1] * (array.ndim - 1))
        return jnp.take_along_axis(array, index, axis=1)

    y = layer_norm(x_BxLxD, weights["norm1_scale"], weights["norm1_bias"])
    matrices = weights["qkv"].astype(y.dtype)
    q_Bx1xHxK = split_heads(read(y) @ matrices[:, 0], n_heads)
    k, v = (
        split_heads(checkpoint_name(matmul(y, matrices[:, part]), PROJECTION), n_heads)
        for part in (1, 2)
    )
    visible_BxL = jnp.arange(x_BxLxD.shape[1]) <= pool_at_B[:, None]
    if segment_ids is not None:
        visible_BxL &= segment_ids == read(segment_ids)
    q_Bx1xHxK = apply_rope(q_Bx1xHxK, *(read(table) for table in cos_sin))
    attended_BxHxK = attend_once(q_Bx1xHxK[:, 0], apply_rope(k, *cos_sin), v, visible_BxL)
    attended_Bx1xD = attended_BxHxK.reshape(len(x_BxLxD), 1, -1)
    out = attn_out_and_mlp(weights, read(x_BxLxD), attended_Bx1xD, _dropouts(key, drop_rate))
    return constrain(out, "batch", None, None)


def _rematerialised(layer: Callable, policy: str, *, prevent_cse: bool) -> Callable:
    """`layer` with the backward pass of that policy (see `ComputeConfig.remat`)."""
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    kept = {
        "dots": policies.save_from_both_policies(
            policies.save_only_these_names(ATTENTION_RESIDUALS, PROJECTION, MOMENTS), keeps_cudnn
        ),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    return jax.checkpoint(layer, policy=kept, prevent_cse=prevent_cse)


def project_qkv(
    weights: LayerWeights, x_BxLxD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First norm, then queries, keys and values, each [B, L, D]: heads side by side."""
    y = layer_norm(x_BxLxD, weights["norm1_scale"], weights["norm1_bias"])
    matrices = weights["qkv"].astype(y.dtype)
    # One product each: taken out of a common one, they would be copied.
    q, k, v = products(y, [matrices[:, part] for part in range(3)])
    return q, k, v


def attn_out_and_mlp(
    weights: LayerWeights,
    x_BxLxD: jax.Array,
    attended_BxLxD: jax.Array,
    dropout: tuple = (None, None),
) -> jax.Array:
    """Output projection, residual, second norm, SwiGLU, residual; [B, L, D].

    Args:
        dropout: for either residual, None or (key, rate).
    """
    dtype, shape = x_BxLxD.dtype, x_BxLxD.shape
    # As products see them: XLA for GPUs copies a residual before it adds a product to another view.
    x_BxLxD, attended_BxLxD = flat(x_BxLxD), flat(attended_BxLxD)
    projected = matmul(attended_BxLxD, weights["out"].astype(dtype))
    # Kept as a sum, of which one part is as large as the whole: it is read as one array.
    x_BxLxD = checkpoint_name(x_BxLxD + _dropped(projected, dropout[0]), PROJECTION)
    y = layer_norm(x_BxLxD, weights["norm2_scale"], weights["norm2_bias"])
    gated = swiglu(*products(y, [weights[name].astype(dtype) for name in ("gate", "up")]))
    out = x_BxLxD + _dropped(matmul(gated, weights["down"].astype(dtype)), dropout[1])
    return out.reshape(shape)


def _dropouts(key: jax.Array | None, rate: jax.Array) -> tuple:
    """For the two residuals of a layer; see `attn_out_and_mlp`."""
    return (None, None) if key is None else tuple((k, rate) for k in jax.random.split(key))


def _dropped(x: jax.Array, dropout: tuple | None) -> jax.Array:
    if dropout is None:
        return x
    key, rate = dropout
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
