"""What the compiler does not count, by formula: loops after their first turn, the splash kernel,
the pass that fills a gradient cache; and what the mathematics needs.
"""

import jax
from jax.sharding import Mesh

from aria_jax.aot.programs import Program, Task
from aria_jax.chips import Chip
from aria_jax.config import RunConfig
from aria_jax.losses.language_model import CHUNK_TOKENS
from aria_jax.train.plan import forward_flops_per_token

ATTENTION_EFFICIENCY = 0.7
"""Assumed share of the time that splash attention keeps the matrix units busy."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of the flash backward pass over the forward's: five matrix products instead of two."""


def flops_per_token(config: RunConfig) -> dict[str, float]:
    """Of the forward pass, by part."""
    return forward_flops_per_token(config.model, config.data.seq_len, config.train.pooling)


def uncounted_loss_flops(config: RunConfig, task: Task, made: Program, mesh: Mesh) -> float:
    """Of the chunks after the first of the vocabulary loss; per chip and call."""
    if task not in ("pretrain", "continue"):
        return 0.0
    ways = mesh.size // mesh.shape["tensor"]
    chunks = -(-made.tokens // (config.train.grad_accumulation * ways * CHUNK_TOKENS))
    head = 3 * flops_per_token(config)["head"]
    return head * made.tokens / mesh.size * (1 - 1 / max(chunks, 1))


def attention_flops(config: RunConfig, made: Program, mesh: Mesh) -> float:
    """Of the splash kernel, which the compiler does not count; per chip and call."""
    forward = flops_per_token(config)["attention"]
    again = 1.0 if config.compute.remat in ("full", "offload") else 0.0
    passes = 1.0 + again + BACKWARD_ATTENTION if made.training else 1.0
    return forward * passes * made.tokens / mesh.size


def packed_attention_flops(flops: float, d_head: int, chip: Chip) -> float:
    """FLOPs of the packed kernel's forward pass by its cost estimate, which counts the zeros of the
    other heads and idle matrix units, given those that attention needs.
    """
    from aria_jax.kernels.attention.packed import MXU_UTILISATION

    return flops * chip.matrix_unit / d_head / MXU_UTILISATION["forward"]


def uses_splash(config: RunConfig, task: Task, mesh: Mesh) -> bool:
    """Whether attention is the splash kernel there."""
    from aria_jax.kernels.attention.choice import MIN_SPLASH_LENGTH, suits_packed

    if task in ("prefill", "decode") or config.data.seq_len < MIN_SPLASH_LENGTH:
        return False
    shape = config.data.global_batch, config.data.seq_len, config.model.d_model
    with jax.set_mesh(mesh):
        packed = suits_packed(shape, config.model.n_heads)
    chosen = config.compute.attention
    return chosen == "splash" or (chosen == "auto" and not packed)


def cached_flops(config: RunConfig, task: Task, made: Program, mesh: Mesh) -> dict[str, float]:
    """Of gradient caching, which embeds a contrastive batch once more before it goes through the
    parts; per chip and call.
    """
    again = task == "contrastive" and config.train.grad_accumulation > 1
    parts = flops_per_token(config)
    return {name: again * flops * made.tokens / mesh.size for name, flops in parts.items()}


def needed_flops(config: RunConfig, made: Program) -> float:
    """What the mathematics of one call needs, over all chips."""
    parts = flops_per_token(config)
    return (3 if made.training else 1) * sum(parts.values()) * made.tokens


def attention_efficiency(d_head: int, chip: Chip) -> float:
    """Assumed share of the peak that splash attention reaches on the scores it must compute.

    Products of queries and keys sum over the width of a head, those of weights and values have
    that many columns: heads narrower than the matrix unit leave the rest of it idle.
    """
    return ATTENTION_EFFICIENCY * min(d_head / chip.matrix_unit, 1.0)
