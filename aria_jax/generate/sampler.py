"""How the next token is chosen from logits: one frozen dataclass per method.

Every method has `keep(logits_BxV) -> bool[B, V]`, the tokens it may draw, and
`draw(logits_BxV, keys_B) -> int32[B]`. One key per sequence makes a sequence's randomness
independent of how many others are decoded beside it.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from data_pipeline.errors import UserError

BLOCK = 128
"""Weights whose sum is looked at before they are."""
GUIDANCE_WARM_UP = 250
"""Steps over which guidance grows to its full strength (reference: sample_batch_cfg)."""


class Sampler(Protocol):
    """A way to choose the next token; hashable, so that it can be a static jit argument."""

    def draw(self, logits_BxV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """One token id (int32) per row; a logit of -inf is never drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most likely token, always (temperature 0 of the reference)."""

    def draw(self, logits_BxV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """The argmax of every row, int32[B]; the keys are not used."""
        del keys_B
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Draws from the softmax of logits / temperature, every token included."""

    temperature: float = 0.98

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 2:
            raise UserError(
                f"temperature {self.temperature} must be above 0 and at most 2 (0 means greedy)"
            )

    def probabilities(self, logits_BxV: jax.Array) -> jax.Array:
        """float32[B, V], before any truncation."""
        return jax.nn.softmax(logits_BxV.astype(jnp.float32) / self.temperature, axis=-1)

    def keep(self, logits_BxV: jax.Array) -> jax.Array:
        """bool[B, V]: which tokens may be drawn."""
        return self.probabilities(logits_BxV) > 0

    def draw(self, logits_BxV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """One kept token per row, in proportion to its probability."""
        probs_BxV = self.probabilities(logits_BxV)
        return draw_in_proportion(jnp.where(self.keep(logits_BxV), probs_BxV, 0.0), keys_B)


@dataclass(frozen=True, kw_only=True)
class MinP(Temperature):
    """Keeps tokens at least `p` times as likely as the likeliest.

    Source: arXiv 2407.01082; reference: aria/inference/__init__.py sample_min_p.
    """

    p: float = 0.035

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p <= 1:
            raise UserError(f"min-p {self.p} must lie between 0 and 1")

    def keep(self, logits_BxV: jax.Array) -> jax.Array:
        """bool[B, V]: probability >= p * the row's greatest."""
        probs_BxV = self.probabilities(logits_BxV)
        return (probs_BxV >= self.p * probs_BxV.max(-1, keepdims=True)) & (probs_BxV > 0)


@dataclass(frozen=True, kw_only=True)
class TopP(Temperature):
    """Keeps the likeliest tokens until their mass passes `p`.

    Equally likely tokens are kept or dropped together. Reference: aria/inference/__init__.py
    sample_top_p.
    """

    p: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise UserError(f"top-p {self.p} must lie above 0 and at most 1")

    def keep(self, logits_BxV: jax.Array) -> jax.Array:
        """bool[B, V]: the mass of likelier tokens is at most p."""
        probs_BxV = self.probabilities(logits_BxV)
        falling_BxV = -jnp.sort(-probs_BxV, axis=-1)
        likelier_BxV = jnp.cumsum(falling_BxV, axis=-1) - falling_BxV
        least_Bx1 = jnp.min(
            jnp.where(likelier_BxV <= self.p, falling_BxV, jnp.inf), axis=-1, keepdims=True
        )
        return (probs_BxV >= least_Bx1) & (probs_BxV > 0)


@dataclass(frozen=True, kw_only=True)
class TopK(Temperature):
    """Keeps the `k` likeliest tokens, and those as likely as the last of them."""

    k: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"top-k {self.k} must be at least 1")

    def keep(self, logits_BxV: jax.Array) -> jax.Array:
        """bool[B, V]: at least as likely as the k-th."""
        k = min(self.k, logits_BxV.shape[-1])
        least_Bx1 = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
        return (logits_BxV >= least_Bx1) & (logits_BxV > -jnp.inf)


@dataclass(frozen=True, kw_only=True)
class RepetitionPenalty:
    """Makes the tokens of the last `window` steps less likely (CTRL, arXiv 1909.05858 section 4.1).

    Attributes:
        penalty: 1 changes nothing; positive logits are divided by it, negative multiplied.
        window: how many of the latest tokens count.
    """

    penalty: float = 1.0
    window: int = 96

    def __post_init__(self) -> None:
        if self.penalty < 1 or self.window < 1:
            raise UserError(
                f"a repetition penalty of {self.penalty} over {self.window} tokens makes no sense: "
                "the penalty is 1 (off) or greater, the window at least 1"
            )

    def apply(self, logits_BxV: jax.Array, recent_BxW: jax.Array, counts_V: jax.Array) -> jax.Array:
        """Penalised logits [B, V].

        Args:
            logits_BxV: of the next token.
            recent_BxW: the latest ids, -1 where there is none.
            counts_V: bool; which ids can be penalised (notes: onsets and durations repeat anyway).
        """
        batch, vocab = logits_BxV.shape
        rows_Bx1 = jnp.arange(batch)[:, None]
        seen_BxV = jnp.zeros((batch, vocab + 1), bool).at[rows_Bx1, recent_BxW].set(True)
        seen_BxV = seen_BxV[:, :vocab] & counts_V
        lowered_BxV = jnp.where(
            logits_BxV > 0, logits_BxV / self.penalty, logits_BxV * self.penalty
        )
        return jnp.where(seen_BxV, lowered_BxV, logits_BxV)


def choose_sampler(
    temperature: float,
    *,
    min_p: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Sampler:
    """The sampler for these settings; temperature 0 is greedy, at most one truncation may be given.

    Raises:
        UserError: two truncations at once, or a value out of range.
    """
    given = {
        name: value
        for name, value in (("min-p", min_p), ("top-p", top_p), ("top-k", top_k))
        if value is not None
    }
    if len(given) > 1:
        raise UserError(f"give at most one of {' and '.join(given)}: each is its own way to sample")
    if temperature == 0:
        return Greedy()
    if top_k is not None:
        return TopK(temperature=temperature, k=top_k)
    if top_p is not None:
        return TopP(temperature=temperature, p=top_p)
    if min_p is not None:
        return MinP(temperature=temperature, p=min_p)
    return Temperature(temperature=temperature)


def draw_min_p(
    logits_BxV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, p_B: jax.Array
) -> jax.Array:
    """What `MinP` draws, int32[B], with settings that are data: each row its own, and changed
    without compiling anew.

    Args:
        temperature_B: float32, above 0; p_B: float32, 0 to 1.
    """
    scaled_BxV = logits_BxV.astype(jnp.float32) / temperature_B[:, None]
    probs_BxV = jax.nn.softmax(scaled_BxV, axis=-1)
    least_Bx1 = p_B[:, None] * probs_BxV.max(-1, keepdims=True)
    return draw_in_proportion(jnp.where(probs_BxV >= least_Bx1, probs_BxV, 0.0), keys_B)


@jax.jit
def draw_in_proportion(weights_BxV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """One index per row, int32[B], in proportion to weights that need not sum to 1; never one whose
    weight is 0.

    One random number finds its place in the running sum, first among sums of blocks. (Gumbel's
    noise, `jax.random.categorical`, is a random number and two logarithms for every id: a
    millisecond for 17,727 on a CPU, half of a small network's step.)
    """
    n_blocks = -(-weights_BxV.shape[-1] // BLOCK)
    padding = n_blocks * BLOCK - weights_BxV.shape[-1]
    blocks = jnp.pad(weights_BxV, ((0, 0), (0, padding))).reshape(-1, n_blocks, BLOCK)
    of_blocks_BxN = blocks.sum(-1)
    place_B = jax.vmap(jax.random.uniform)(keys_B) * of_blocks_BxN.sum(-1)
    block_B, place_B = _find(of_blocks_BxN, place_B)
    in_block_BxK = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + _find(in_block_BxK, place_B)[0]


def _find(weights_BxN: jax.Array, place_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the running sum of a row passes `place`, int32[B], and the place behind what is before
    that, float32[B].
    """
    sums_BxN = jnp.cumsum(weights_BxN, axis=-1)
    passed_BxN = (sums_BxN > place_B[:, None]) & (weights_BxN > 0)
    # Sums of another order may end below a place that is in the last weight.
    last_B = weights_BxN.shape[-1] - 1 - jnp.argmax(weights_BxN[:, ::-1] > 0, axis=-1)
    index_B = jnp.where(passed_BxN.any(-1), jnp.argmax(passed_BxN, axis=-1), last_B)
    before_BxN = sums_BxN - weights_BxN
    before_B = jnp.take_along_axis(before_BxN, index_B[:, None], axis=-1)[:, 0]
    return index_B.astype(jnp.int32), place_B - before_B


def combine_branches(
    logits_RxV: jax.Array, step: jax.Array, strength: float, steps: int
) -> jax.Array:
    """Two branches, with a condition and without, combined: [R / 2, V].

    Args:
        steps: in all; guidance grows to `strength` over these, or the first `GUIDANCE_WARM_UP`.
    """
    with_condition, without = jnp.split(logits_RxV, 2)
    gamma = strength * jnp.minimum(1.0, (step + 1) / min(GUIDANCE_WARM_UP, steps))
    return gamma * with_condition + (1 - gamma) * without


def step_keys(key: jax.Array, sequence_S: jax.Array, step: jax.Array | int) -> jax.Array:
    """One key per sequence for one step, from the sequence's own index only."""
    at_step = jax.random.fold_in(key, step)
    return jax.vmap(lambda index: jax.random.fold_in(at_step, index))(sequence_S)
