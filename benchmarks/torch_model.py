"""The network of aria_jax.models in plain PyTorch, for speed comparisons only."""

import torch
from torch import nn
from torch.nn import functional

from aria_jax.config import ModelConfig
from aria_jax.kernels.attention import ROPE_BASE
from aria_jax.models.transformer import EPSILON


class Block(nn.Module):
    """Pre-norm rotary attention and SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, ff = config.d_model, config.d_model * config.ff_mult
        self.heads = config.n_heads
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=EPSILON) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate, self.up = (nn.Linear(d, ff, bias=False) for _ in range(2))
        self.down = nn.Linear(ff, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (_rotated(t, cos, sin) for t in (q, k))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, d))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Decoder(nn.Module):
    """Token ids [B, L] to logits [B, L, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.d_head = config.d_head
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=EPSILON)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        frequencies = ROPE_BASE ** (-torch.arange(0, self.d_head, 2) / self.d_head)
        angles = torch.arange(tokens.shape[1])[:, None] * frequencies
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))
