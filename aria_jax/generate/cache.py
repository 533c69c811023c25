"""The network with a key-value cache: keys and values of a prompt are shared by what follows it.

Rows R are branch-major: P guidance branches (one, or with classifier-free guidance the conditioned
and the unconditioned one) times S sequences. The prompt's keys and values exist once per branch,
those of generated tokens once per row. T is the number of prompt slots, G of generated slots; both
are static, padded and masked. Reference: aria/inference/model_cuda.py.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aria_jax.generate.weights import DecoderWeights, LayerWeights
from aria_jax.kernels import layer_norm, narrow_cpu
from aria_jax.kernels.attention import apply_rope, rope_tables, split_heads
from aria_jax.models.heads import all_logits
from aria_jax.models.transformer import attn_out_and_mlp, token_rows
from aria_jax.sharding import LOGICAL_RULES

QUERY_CHUNK = 256
"""Prompt positions attended at a time: bounds the score matrix of a long prefill."""
NO_PROBABILITY = -1e30
"""Logit of an id without weights: finite, as the decoder takes others for a diverged model."""
NEG_INF = float(jnp.finfo(jnp.float32).min)  # finite: softmax of a row that sees nothing is not NaN


class LayerCache(NamedTuple):
    """Keys [rows, H, slots, K] and values [rows, H, K, slots] of one layer.

    Either product of attention sums over the last axis of both factors: the one form of batched
    product that XLA's CPU backend runs at the speed of memory.
    """

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class PromptCache:
    """What continuations read and never write.

    Attributes:
        layers: of P rows (or R, where every row has a prompt of its own) and T slots each.
        visible_PxT: bool; slots that hold a token this branch may see.
        next_position: rotary position of the first generated token; int32, or int32 [R].
    """

    layers: tuple[LayerCache, ...]
    visible_PxT: jax.Array
    next_position: jax.Array


def _as_cached(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """In a cache of `dtype`, see `DecoderWeights.cache_dtype`."""
    return x.astype(jnp.bfloat16).view(dtype) if dtype == jnp.uint16 else x.astype(dtype)


def _queries_keys_values(
    block: LayerWeights, x_RxLxD: jax.Array, cos: jax.Array, sin: jax.Array, n_heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[R, L, H, K] each; as in `models.transformer`, of one product."""
    qkv_RxLx3xD = layer_norm(x_RxLxD, block["norm1_scale"], block["norm1_bias"]) @ block["qkv"]
    q, k, v = (split_heads(qkv_RxLx3xD[:, :, part], n_heads) for part in range(3))
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def _causal_attention(
    q_PxTxHxK: jax.Array, shared: LayerCache, visible_PxT: jax.Array
) -> jax.Array:
    """[P, T, H, K]: every position attends to visible slots up to itself."""
    length, width = q_PxTxHxK.shape[1], q_PxTxHxK.shape[3]
    chunk = min(QUERY_CHUNK, length)
    slot_T = jnp.arange(length)

    def attend(start: jax.Array) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(q_PxTxHxK, start, chunk, axis=1)
        scores = jnp.einsum("pqhk,phtk->phqt", q, shared.keys, preferred_element_type=jnp.float32)
        seen = (slot_T <= start + jnp.arange(chunk)[:, None]) & visible_PxT[:, None, None, :]
        scores = jnp.where(seen, scores * width**-0.5, NEG_INF)
        weights = jax.nn.softmax(scores, axis=-1).astype(shared.values.dtype)
        return jnp.einsum("phqt,phkt->pqhk", weights, shared.values)

    chunks = jax.lax.map(attend, jnp.arange(0, length, chunk))
    return jnp.moveaxis(chunks, 0, 1).reshape(q_PxTxHxK.shape)


def _logits(weights: DecoderWeights, x_RxD: jax.Array) -> jax.Array:
    return all_logits(weights.config, row_logits(weights, x_RxD), NO_PROBABILITY)


def row_logits(weights: DecoderWeights, x_RxD: jax.Array) -> jax.Array:
    """Logits of the ids that have weights, in the order of `token_rows`; float32."""
    x_RxD = layer_norm(x_RxD, weights.norm_scale_D, weights.norm_bias_D)
    return (x_RxD @ weights.head).astype(jnp.float32)


def prefill(
    weights: DecoderWeights,
    prompt_T: jax.Array,
    length: jax.Array,
    condition_E: jax.Array | None = None,
) -> tuple[jax.Array, PromptCache]:
    """Reads a prompt once.

    Args:
        prompt_T: int32 ids, padded on the right; T is at most `QUERY_CHUNK` or a multiple of it.
        length: int32; ids that count.
        condition_E: conditioning embedding. With it there are two branches, the second blind to it
            (reference: sample_batch_cfg), the condition holds slot 0, and T - 1 ids fit.

    Returns:
        logits [P, V] (float32) of the first token to generate, and the cache.
    """
    x_PxTxD = weights.embedding_VxD[token_rows(weights.config, prompt_T)][None]
    slot_T = jnp.arange(prompt_T.shape[0])
    visible_PxT = (slot_T < length)[None]
    if condition_E is not None:
        if weights.adapter_ExD is None:
            raise ValueError("a condition needs a model with an embedding adapter")
        first_D = condition_E.astype(x_PxTxD.dtype) @ weights.adapter_ExD
        x_1xTxD = jnp.concatenate([first_D[None, None], x_PxTxD[:, :-1]], axis=1)
        x_PxTxD = jnp.concatenate([x_1xTxD, x_1xTxD])
        length = length + 1
        visible_T = slot_T < length
        visible_PxT = jnp.stack([visible_T, visible_T & (slot_T > 0)])
    cos, sin = rope_tables(slot_T[None], x_PxTxD.shape[-1] // weights.n_heads)
    layers = []
    for block in weights.blocks:
        q, k, v = _queries_keys_values(block, x_PxTxD, cos, sin, weights.n_heads)
        shared = LayerCache(jnp.swapaxes(k, 1, 2), jnp.moveaxis(v, 1, 3))
        attended = _causal_attention(q, shared, visible_PxT).reshape(x_PxTxD.shape)
        x_PxTxD = attn_out_and_mlp(block, x_PxTxD, attended)
        layers.append(LayerCache(*(_as_cached(x, weights.cache_dtype) for x in shared)))
    last_PxD = jax.lax.dynamic_index_in_dim(x_PxTxD, length - 1, axis=1, keepdims=False)
    return _logits(weights, last_PxD), PromptCache(
        layers=tuple(layers), visible_PxT=visible_PxT, next_position=length.astype(jnp.int32)
    )


def prefill_each(
    weights: DecoderWeights,
    prompt_SxT: jax.Array,
    length_S: jax.Array,
    condition_E: jax.Array | None = None,
) -> tuple[jax.Array, PromptCache]:
    """`prefill` of a prompt of its own for every sequence: logits [R, V], and a cache of R rows."""
    logits_SxPxV, cache = jax.lax.map(
        lambda row: prefill(weights, row[0], row[1], condition_E), (prompt_SxT, length_S)
    )

    def rows(x_SxPx: jax.Array) -> jax.Array:
        x_PxSx = jnp.swapaxes(x_SxPx, 0, 1)
        return x_PxSx.reshape(-1, *x_PxSx.shape[2:])

    return rows(logits_SxPxV), PromptCache(
        layers=jax.tree.map(rows, cache.layers),
        visible_PxT=rows(cache.visible_PxT),
        next_position=jnp.tile(cache.next_position, logits_SxPxV.shape[1]),
    )


def empty_cache(
    weights: DecoderWeights, rows: int, slots: int, mesh: Mesh | None = None, dtype: Any = None
) -> tuple[LayerCache, ...]:
    """Zeros for the keys and values of generated tokens.

    On a mesh rows spread as batches do and heads as attention's weights do, where they divide.
    `dtype` is `weights.cache_dtype` for `decode_step`, for the others the activations' (None).
    """
    width, dtype = weights.embedding_VxD.shape[1] // weights.n_heads, dtype or weights.dtype
    placement = None if mesh is None else cache_sharding(mesh, rows, weights.n_heads)
    return tuple(
        LayerCache(
            jnp.zeros((rows, weights.n_heads, slots, width), dtype, device=placement),
            jnp.zeros((rows, weights.n_heads, width, slots), dtype, device=placement),
        )
        for _ in weights.blocks
    )


def cache_sharding(mesh: Mesh, rows: int, n_heads: int) -> NamedSharding:
    """Of the cache of generated tokens: rows and heads, its first two axes."""

    def dividing(logical: str, size: int) -> tuple[str, ...] | None:
        rule = LOGICAL_RULES[logical]
        axes = (rule,) if isinstance(rule, str) else tuple(rule or ())
        devices = 1
        for axis in axes:
            devices *= mesh.shape[axis]
        return axes if size % devices == 0 else None

    return NamedSharding(mesh, PartitionSpec(dividing("batch", rows), dividing("heads", n_heads)))


def _cached_attention(
    q_RxHxK: jax.Array,
    k_RxHxK: jax.Array,
    v_RxHxK: jax.Array,
    shared: LayerCache,
    past: LayerCache,
    visible_PxT: jax.Array,
    filled: jax.Array,
    on_cpu: bool,
) -> jax.Array:
    """[R, H, K]: one softmax over the branch's prompt, the row's own past, and its new token.

    The new token's key and value come apart from the cache, which is only read here: one that is
    written and then read in a step would be copied, all of it, at every token.
    """
    if on_cpu and narrow_cpu.available():
        return narrow_cpu.cached_attention(
            q_RxHxK, k_RxHxK, v_RxHxK, shared, past, visible_PxT, filled
        )
    rows, heads, width = q_RxHxK.shape
    branches, _, prompt_slots, _ = shared.keys.shape
    q_RxHxK = q_RxHxK * jnp.asarray(width**-0.5, q_RxHxK.dtype)
    # All sequences of a branch read its prompt in one matrix product.
    q_PxSxHxK = q_RxHxK.reshape(branches, -1, heads, width)
    of_prompt = jnp.einsum(
        "pshk,phtk->psht", q_PxSxHxK, shared.keys, preferred_element_type=jnp.float32
    )
    of_prompt = jnp.where(visible_PxT[:, None, None, :], of_prompt, NEG_INF)
    of_past = jnp.einsum("rhk,rhgk->rhg", q_RxHxK, past.keys, preferred_element_type=jnp.float32)
    of_past = jnp.where(jnp.arange(past.keys.shape[2]) < filled, of_past, NEG_INF)
    of_new = jnp.einsum("rhk,rhk->rh", q_RxHxK, k_RxHxK, preferred_element_type=jnp.float32)
    scores = jnp.concatenate(
        [of_prompt.reshape(rows, heads, prompt_slots), of_past, of_new[..., None]], axis=-1
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(shared.values.dtype)
    to_prompt, to_past, to_new = jnp.split(weights, [prompt_slots, scores.shape[-1] - 1], axis=-1)
    to_prompt = to_prompt.reshape(branches, -1, heads, prompt_slots)
    from_prompt = jnp.einsum("psht,phkt->pshk", to_prompt, shared.values)
    from_past = jnp.einsum("rhg,rhkg->rhk", to_past, past.values)
    return from_prompt.reshape(rows, heads, width) + from_past + to_new * v_RxHxK


def _once_read(value: jax.Array, read: jax.Array) -> jax.Array:
    """`value`, which goes into the cache that `read` was read from, and depends on it: so that the
    compiler writes later, and in place.

    `optimization_barrier` would say so, but XLA's CPU backend drops it before it decides what to
    copy (jaxlib 0.10.2), which is every cache twice at every token, and four times if it were read
    once it is written.
    """
    return value + 0 * read


def decode_step(
    weights: DecoderWeights,
    prompt: PromptCache,
    own: tuple[LayerCache, ...],
    token_R: jax.Array,
    filled: jax.Array,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Reads one generated token per row.

    Args:
        filled: int32; generated tokens already in `own`, so the slot this token goes to.

    Returns:
        logits [R, V] (float32) of the next token, and the cache with this token in it.
    """
    x_Rx1xD = weights.embedding_VxD[token_rows(weights.config, token_R)][:, None]
    position_Rx1 = jnp.reshape(prompt.next_position + filled, (-1, 1))  # one row serves all
    cos, sin = rope_tables(position_Rx1, x_Rx1xD.shape[-1] // weights.n_heads)
    layers = []
    for block, shared, past in zip(weights.blocks, prompt.layers, own, strict=True):
        new = _queries_keys_values(block, x_Rx1xD, cos, sin, weights.n_heads)
        q, k, v = (x[:, 0] for x in new)
        attended = _cached_attention(
            q, k, v, shared, past, prompt.visible_PxT, filled, weights.head.on_cpu
        )
        k, v = (_as_cached(_once_read(x, attended), past.keys.dtype) for x in (k, v))
        x_Rx1xD = attn_out_and_mlp(block, x_Rx1xD, attended.reshape(x_Rx1xD.shape))
        layers.append(
            LayerCache(
                jax.lax.dynamic_update_slice_in_dim(past.keys, k[:, :, None], filled, axis=2),
                jax.lax.dynamic_update_slice_in_dim(past.values, v[..., None], filled, axis=3),
            )
        )
    return _logits(weights, x_Rx1xD[:, 0]), tuple(layers)


def _attend_past_and_chunk(
    q_1xCxHxK: jax.Array,
    k_1xCxHxK: jax.Array,
    v_1xCxHxK: jax.Array,
    past: LayerCache,
    start: jax.Array,
) -> jax.Array:
    """[1, C, H, K]: one softmax over the slots below `start` and the chunk up to each position.

    As in `_cached_attention` the new keys and values come apart from the cache.
    """
    chunk, width, slots = q_1xCxHxK.shape[1], q_1xCxHxK.shape[3], past.keys.shape[2]
    q = q_1xCxHxK * jnp.asarray(width**-0.5, q_1xCxHxK.dtype)
    of_past = jnp.einsum("rchk,rhgk->rhcg", q, past.keys, preferred_element_type=jnp.float32)
    of_past = jnp.where(jnp.arange(slots) < start, of_past, NEG_INF)
    of_new = jnp.einsum("rchk,rdhk->rhcd", q, k_1xCxHxK, preferred_element_type=jnp.float32)
    of_new = jnp.where(jnp.tril(jnp.ones((chunk, chunk), bool)), of_new, NEG_INF)
    weights = jax.nn.softmax(jnp.concatenate([of_past, of_new], axis=-1), axis=-1)
    to_past, to_new = jnp.split(weights.astype(past.values.dtype), [slots], axis=-1)
    from_past = jnp.einsum("rhcg,rhkg->rchk", to_past, past.values)
    return from_past + jnp.einsum("rhcd,rdhk->rchk", to_new, v_1xCxHxK)


def extend_cache(
    weights: DecoderWeights,
    cache: tuple[LayerCache, ...],
    ids_C: jax.Array,
    start: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Reads more of one sequence that is already read up to `start`: a prompt while it grows.

    Args:
        cache: of one row; it needs `start` + C slots. Slots from `start` + `length` on hold nothing
            of worth afterwards, and whoever reads or writes them next takes them for free.
        ids_C: int32, padded on the right.
        length: int32, at least 1; ids that count.

    Returns:
        `row_logits` of what follows the last id, and the cache with the ids in it.
    """
    x_1xCxD = weights.embedding_VxD[token_rows(weights.config, ids_C)][None]
    position_1xC = (start + jnp.arange(len(ids_C)))[None]
    cos, sin = rope_tables(position_1xC, x_1xCxD.shape[-1] // weights.n_heads)
    layers = []
    for block, past in zip(weights.blocks, cache, strict=True):
        q, k, v = _queries_keys_values(block, x_1xCxD, cos, sin, weights.n_heads)
        attended = _attend_past_and_chunk(q, k, v, past, start)
        k, v = _once_read(k, attended), _once_read(v, attended)
        x_1xCxD = attn_out_and_mlp(block, x_1xCxD, attended.reshape(x_1xCxD.shape))
        layers.append(
            LayerCache(
                jax.lax.dynamic_update_slice_in_dim(
                    past.keys, jnp.swapaxes(k, 1, 2), start, axis=2
                ),
                jax.lax.dynamic_update_slice_in_dim(
                    past.values, jnp.moveaxis(v, 1, 3), start, axis=3
                ),
            )
        )
    last_1xD = jax.lax.dynamic_index_in_dim(x_1xCxD, length - 1, axis=1, keepdims=False)
    return row_logits(weights, last_1xD)[0], tuple(layers)


def decode_rows(
    weights: DecoderWeights,
    caches: tuple[tuple[LayerCache, ...], ...],
    token_R: jax.Array,
    filled_R: jax.Array,
    active_R: jax.Array,
) -> tuple[jax.Array, tuple[tuple[LayerCache, ...], ...]]:
    """`decode_step` of sequences that have nothing in common: each has its own cache and length.

    Weights are read once for all rows, and only active rows pay for attention.

    Args:
        caches: of one row each.
        token_R: int32, as `token_rows` gives them; of rows that are not active, anything.
        filled_R: int32; tokens in each cache, so the slot that the token goes to.
        active_R: bool.

    Returns:
        `row_logits`, of active rows those of the next token; and the caches. Of a row that is not
        active nothing below `filled_R` is changed.
    """
    x_Rx1xD = weights.embedding_VxD[token_R][:, None]
    cos, sin = rope_tables(filled_R[:, None], x_Rx1xD.shape[-1] // weights.n_heads)
    rows: list[list[LayerCache]] = [[] for _ in caches]
    for number, block in enumerate(weights.blocks):
        q, k, v = _queries_keys_values(block, x_Rx1xD, cos, sin, weights.n_heads)
        attended = []
        for row, cache in enumerate(caches):
            past, filled, one = cache[number], filled_R[row], slice(row, row + 1)
            mine = jax.lax.cond(
                active_R[row],
                lambda q, k, v, past, filled: _attend_past_and_chunk(q, k, v, past, filled),
                lambda q, k, v, past, filled: jnp.zeros_like(q),
                *(q[one], k[one], v[one], past, filled),
            )
            attended.append(mine)
            new_k, new_v = k[one] + 0 * mine, v[one] + 0 * mine
            rows[row].append(
                LayerCache(
                    jax.lax.dynamic_update_slice_in_dim(
                        past.keys, jnp.swapaxes(new_k, 1, 2), filled, axis=2
                    ),
                    jax.lax.dynamic_update_slice_in_dim(
                        past.values, jnp.moveaxis(new_v, 1, 3), filled, axis=3
                    ),
                )
            )
        attended_Rx1xD = jnp.concatenate(attended).reshape(x_Rx1xD.shape)
        x_Rx1xD = attn_out_and_mlp(block, x_Rx1xD, attended_Rx1xD)
    return row_logits(weights, x_Rx1xD[:, 0]), tuple(tuple(layers) for layers in rows)
