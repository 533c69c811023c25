"""The network with its head: next-token logits, an embedding, or class logits."""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig, Head, ModelConfig
from aria_jax.models import (
    Parameters,
    Specs,
    parameter,
    parameter_shardings,
    specs_of,
    uniform_init,
)
from aria_jax.models.transformer import Transformer, row_table
from data_pipeline.errors import UserError
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import SEGMENT_MS, STEP_MS, Kind

HEAD_TENSORS: dict[Head, str] = {
    "lm": "lm_head.weight",
    "embedding": "emb_head.weight",
    "class": "class_head.weight",
}
"""Published name of each kind of head."""
ADAPTER_TENSOR = "embedding_adapter.weight"
"""Likewise of the projection of a condition."""


class Model(nnx.Module):
    """Transformer and linear head (reference: TransformerLM, _EMB, _CL and LM_CND in one).

    Attributes:
        backbone: the `Transformer`.
        head: float32 [D, V, E or C]; None for `config.head == "none"`. Of V only the columns of
            the ids that `config.vocabulary` names.
        adapter: float32 [E, D], projects a conditioning embedding to a prefix token; None unless
            the model is a language model with `config.emb_size`.
        log_temperature: float32 scalar, log of the contrastive temperature over its first value;
            None unless `config.learned_temperature`.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        d = config.d_model
        self.backbone = Transformer(config, compute, rngs=rngs)

        def linear(
            n_in: int, n_out: int, axes: tuple[str | None, ...], published: str
        ) -> nnx.Param:
            value = uniform_init(rngs.params(), (n_in, n_out), n_in)
            return parameter(value, axes, published=published, linear=True)

        width = head_width(config)
        self.head = linear(d, width, ("embed", None), HEAD_TENSORS[config.head]) if width else None
        condition = config.emb_size if config.head == "lm" else None
        self.adapter = linear(condition, d, (None, "embed"), ADAPTER_TENSOR) if condition else None
        self.log_temperature = parameter(jnp.zeros(()), ()) if config.learned_temperature else None

    def hidden(
        self,
        tokens_BxL: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        condition_BxE: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        pool_at_B: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, [B, L, D] in the compute dtype; with a condition [B, L - 1, D], with
        `pool_at_B` [B, 1, D] (see `Transformer`).

        The conditioning vector stands before the first token; the last token makes room for it,
        and its own position is dropped from the output (reference: TransformerLM_CND).
        """
        prefix = None
        if condition_BxE is not None and self.adapter is not None:
            prefix = condition_BxE @ self.adapter[...]
            pool_at_B = None if pool_at_B is None else pool_at_B + 1
        hidden = self.backbone(
            tokens_BxL,
            positions=positions,
            segment_ids=segment_ids,
            prefix_BxD=prefix,
            dropout_key=dropout_key,
            pool_at_B=pool_at_B,
        )
        return hidden if prefix is None or pool_at_B is not None else hidden[:, 1:]

    def __call__(self, tokens_BxL: jax.Array, **inputs: Any) -> jax.Array:
        """Head outputs at every position, float32; `inputs` as for `hidden`.

        A language model gives -inf to ids that `config.vocabulary` leaves out.
        """
        out = self._read(self.hidden(tokens_BxL, **inputs))
        return all_logits(self.config, out, -jnp.inf) if self.config.head == "lm" else out

    def pooled(
        self, tokens_BxL: jax.Array, eos_B: jax.Array, pooling: str = "eos", **inputs: Any
    ) -> jax.Array:
        """Head output of each sequence, float32 [B, E or C].

        Args:
            eos_B: position of each sequence's `<E>`; what follows is padding.
            pooling: "eos" reads there (the reference), "mean" averages all positions up to it.
        """
        if pooling == "eos":
            pooled_BxD = self.hidden(tokens_BxL, pool_at_B=eos_B, **inputs)[:, 0]
        else:
            hidden = self.hidden(tokens_BxL, **inputs)
            used_BxL = jnp.arange(hidden.shape[1])[None] <= eos_B[:, None]
            total_BxD = jnp.sum(hidden * used_BxL[..., None], axis=1, dtype=jnp.float32)
            pooled_BxD = total_BxD / (eos_B[:, None] + 1)
        return self._read(pooled_BxD)

    def _read(self, hidden: jax.Array) -> jax.Array:
        """The head on the last axis, float32."""
        if self.head is None:
            return hidden.astype(jnp.float32)
        matrix = self.head[...].astype(hidden.dtype)
        return jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)


def all_logits(config: ModelConfig, logits_ZxK: jax.Array, missing: float) -> jax.Array:
    """Logits [..., V] of every id, from those [..., K] of the ids that have weights."""
    if config.n_rows == config.vocab_size:
        return logits_ZxK
    row_V, known_V = row_table(config)
    return jnp.where(known_V, logits_ZxK[..., row_V], missing)


def check_known(config: ModelConfig, ids: np.ndarray, tokens: Sequence[Any], what: str) -> None:
    """Raises `UserError` where the model has no weights for some of `ids`.

    Args:
        tokens: token of each id of the vocabulary, to name them by.
        what: whose ids these are, the beginning of a sentence.
    """
    missing = np.unique(ids[~row_table(config)[1][ids]])
    if len(missing):
        named = ", ".join(str(tokens[i]) for i in missing[:3])
        raise UserError(
            f"{what} holds {len(missing)} tokens to which this model gives no probability, such as "
            f"{named}: no piece that it was trained on has them (model.vocabulary=corpus)"
        )


def with_vocabulary(
    params: Parameters, config: ModelConfig, wanted: ModelConfig, fresh: Parameters | None = None
) -> tuple[Parameters, int]:
    """`params` of a model of `config` with the embedding rows and head columns that `wanted` has.

    Args:
        wanted: of the same shape, but perhaps with another head, which is not looked at then.
        fresh: parameters of `wanted`, for the ids that `config` has no weights of; zeros without.

    Returns:
        The parameters, and the number of such ids.
    """
    if config.n_rows == wanted.n_rows and config.vocabulary == wanted.vocabulary:
        return params, 0
    row_V, there_V = row_table(config)
    ids = np.flatnonzero(row_table(wanted)[1])
    rows_K, there_K = row_V[ids], there_V[ids]

    @partial(jax.jit, static_argnames="axis")
    def rearranged(old: jax.Array, new: jax.Array | float, axis: int) -> jax.Array:
        there = there_K[:, None] if axis == 0 else there_K
        return jnp.where(there, jnp.take(old, rows_K, axis), new)

    def of(name: str, place: Parameters, axis: int) -> jax.Array:
        new = 0.0 if fresh is None else (fresh["backbone"] if axis == 0 else fresh)[name]
        return rearranged(place[name], new, axis=axis)

    backbone = {**params["backbone"], "embedding": of("embedding", params["backbone"], 0)}
    chosen = {**params, "backbone": backbone}
    if config.head == wanted.head == "lm":
        chosen["head"] = of("head", params, 1)
    return chosen, int((~there_K).sum())


FEATURE_CYCLES = (1.0, 100.0)
"""Slowest and fastest wave over the range of a quantity."""


def with_ordered_start(
    params: Parameters, config: ModelConfig, tokenizer: Tokenizer, key: jax.Array
) -> Parameters:
    """Fresh `params` in which tokens that lie near each other begin near each other.

    Rows of the embedding, and likewise columns of a language head, become random Fourier features
    (Rahimi & Recht 2007) of what a token says: of its onset, its duration on a logarithmic scale,
    or its pitch and velocity; plus a vector of its kind. Their size stays that of the random start,
    and every number is trained as before. What else would have to be learnt from data, that times
    are ordered, is there from the first step.
    """
    d = config.d_model
    kinds, waves, phases = jax.random.split(key, 3)
    quantities = np.stack(
        [
            np.maximum(tokenizer.onset_ms, 0) / SEGMENT_MS,
            np.log1p(np.maximum(tokenizer.dur_ms, 0) / STEP_MS) / np.log1p(SEGMENT_MS / STEP_MS),
            np.maximum(tokenizer.pitch, 0) / 128,
            np.maximum(tokenizer.velocity, 0) / 128,
        ]
    )
    low, high = np.log(FEATURE_CYCLES)
    cycles = jnp.exp(jax.random.uniform(waves, (len(quantities), d), minval=low, maxval=high))
    shift = jax.random.uniform(phases, (len(quantities), d))
    says = np.stack([tokenizer.onset_ms >= 0, tokenizer.dur_ms >= 0, tokenizer.pitch >= 0,
                     tokenizer.velocity >= 0])  # fmt: skip
    angles = quantities[:, :, None] * cycles[:, None] + shift[:, None]
    features = jnp.sqrt(2.0) * jnp.cos(2 * jnp.pi * angles) * says[:, :, None]
    # The kinds of other schemes, which come after the pedal's, share a vector.
    kind_V = np.minimum(tokenizer.kind, Kind.PEDAL)
    of_kind = jax.random.normal(kinds, (Kind.PEDAL + 1, d))[kind_V]
    n_parts = 1 + says.sum(0)[:, None]
    table_VxD = (features.sum(0) + of_kind) / jnp.sqrt(n_parts)
    known_V = row_table(config)[1]
    ordered_Kx1, table_KxD = (n_parts > 1)[known_V], table_VxD[known_V]

    def rows(old: jax.Array) -> jax.Array:
        return jnp.where(ordered_Kx1, table_KxD * jnp.std(old), old)

    backbone = {**params["backbone"], "embedding": rows(params["backbone"]["embedding"])}
    chosen = {**params, "backbone": backbone}
    if config.head == "lm":
        chosen["head"] = rows(params["head"].T).T
    return chosen


def head_width(config: ModelConfig) -> int:
    """Outputs of the head: vocabulary, embedding size or number of classes; 0 for none."""
    return {
        "lm": config.n_rows,
        "embedding": config.emb_size or 0,
        "class": len(config.class_names),
        "none": 0,
    }[config.head]


def build_model(config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs) -> Model:
    """A freshly initialised model on the default device."""
    return Model(config, compute, rngs=rngs)


def split_model(model: Model) -> tuple[Callable[[Parameters], Model], Parameters]:
    """The parameters of a model, and the function that puts any such parameters into it."""
    graph, state = nnx.split(model)

    def merge(parameters: Parameters) -> Model:
        # `map` makes a new state: the one above must not keep arrays of another trace.
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, parameters)
        return nnx.merge(graph, filled)

    return merge, nnx.to_pure_dict(state)


def init_sharded(
    config: ModelConfig, compute: ComputeConfig, key: jax.Array, mesh: jax.sharding.Mesh
) -> Model:
    """A freshly initialised model, born sharded: no device ever holds all of it."""
    shardings = parameter_shardings(parameter_specs(config), mesh)
    params = jax.jit(_random_parameters(config, compute), out_shardings=shardings)(key)
    return model_of(config, compute)(params)


@lru_cache(maxsize=8)
def _random_parameters(
    config: ModelConfig, compute: ComputeConfig
) -> Callable[[jax.Array], Parameters]:
    """Key -> parameters. One function for one model, so that jax compiles it once."""

    def init(key: jax.Array) -> Parameters:
        return split_model(build_model(config, compute, rngs=nnx.Rngs(params=key)))[1]

    return init


@lru_cache(maxsize=8)
def model_of(config: ModelConfig, compute: ComputeConfig) -> Callable[[Parameters], Model]:
    """The function that makes such a model of its parameters; traceable."""
    return split_model(abstract_model(config, compute))[0]


def abstract_model(config: ModelConfig, compute: ComputeConfig) -> Model:
    """A model of shapes only; takes no memory."""
    return nnx.eval_shape(lambda: build_model(config, compute, rngs=nnx.Rngs(params=0)))


@cache
def parameter_specs(config: ModelConfig) -> Specs:
    """What each parameter of a model is."""
    return specs_of(abstract_model(config, ComputeConfig()))
