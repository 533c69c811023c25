"""Causal self-attention within segments: one function, one kernel per kind of machine.

    attention(q, k, v, segment_ids=..., implementation="auto") -> [B, L, H, K]
    rotary_attention(q, k, v, cos, sin, n_heads=..., ...) -> [B, L, D], rotation included

`packed` (TPU, rotation included), `splash` (TPU), `cudnn` (GPU), `blockwise` (CPU, and where the
others cannot) and `plain` (what they are tested against) implement it; `choice` takes the right one
and runs it on every device's part of the batch and heads.

Sizes: B batch, L length, H heads, K head width.
"""

from aria_jax.kernels.attention.blockwise import RESIDUALS as ATTENTION_RESIDUALS
from aria_jax.kernels.attention.choice import attention, rotary_attention
from aria_jax.kernels.attention.plain import apply_rope, attend_once, rope_tables, split_heads

__all__ = [
    "ATTENTION_RESIDUALS",
    "apply_rope",
    "attend_once",
    "attention",
    "rope_tables",
    "rotary_attention",
    "split_heads",
]
