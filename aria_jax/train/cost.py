"""What a step costs by formula, and what chips deliver by their data sheets."""

from dataclasses import dataclass

from aria_jax.config import ModelConfig, RunConfig
from aria_jax.models.heads import head_width

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of a data sheet.

    Attributes:
        flops: dense bfloat16 FLOP/s at peak.
        hbm: bytes of device memory.
        bandwidth: bytes a second to and from it.
        network: bytes a second in and out over all links to other chips of the slice.
        kinds: parts of jax's `device_kind` that tell it.
        matrix_unit: rows and columns of a TPU's systolic array.
        clock: cycles a second of a TPU's core, from which its peak follows.
    """

    flops: float
    hbm: float
    bandwidth: float
    network: float
    kinds: tuple[str, ...]
    matrix_unit: int = 128
    clock: float = 1.0


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e. GPUs: NVIDIA data sheets, SXM modules,
# without sparsity. The first whose kind matches is taken: "TPU v5" would match "TPU v5 lite" too.
CHIPS = {
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, ("TPU v6",), matrix_unit=256, clock=1.75e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), clock=1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, ("TPU v5",), clock=1.75e9),
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, ("TPU v4",)),
    "b200": Chip(2250e12, 180e9, 8000e9, 1800e9, ("B200",)),
    "h200": Chip(989e12, 141e9, 4800e9, 900e9, ("H200",)),
    "h100": Chip(989e12, 80e9, 3350e9, 900e9, ("H100",)),
    "a100": Chip(312e12, 80e9, 2039e9, 600e9, ("A100",)),
    "l4": Chip(121e12, 24e9, 300e9, 32e9, ("L4",)),
}


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device; None for CPUs and devices not in the table."""
    known = (chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.kinds))
    return next(known, None)


def forward_flops_per_token(
    model: ModelConfig, seq_len: int, pooling: str = "eos"
) -> dict[str, float]:
    """FLOPs of one token's forward pass in a causal sequence, by part.

    A multiplication and an addition are two. Attention counts the visible half of the scores
    (2 · L/2 for the scores and as much for the values, times d_model). The vocabulary head works
    on every token; other heads on one position of a sequence, for which, with pooling "eos", the
    last layer needs no more than keys and values of the others.
    """
    d, ff, n = model.d_model, model.d_model * model.ff_mult, model.n_layers
    block, head = 2.0 * (4 * d * d + 3 * d * ff), 2.0 * d * head_width(model)
    whole = {"blocks": n * block, "attention": 2.0 * n * seq_len * d, "head": head}
    if model.head == "lm":
        return whole
    if pooling != "eos":
        return {**whole, "head": head / seq_len}
    return {
        "blocks": (n - 1) * block + 2.0 * 2 * d * d,
        "attention": 2.0 * (n - 1) * seq_len * d,
        "head": head / seq_len,
    }


def train_flops_per_token(config: RunConfig) -> float:
    """Forward and backward, without what `compute.remat` computes again (so MFU, not HFU)."""
    pooling = config.train.pooling
    return 3 * sum(forward_flops_per_token(config.model, config.data.seq_len, pooling).values())


def tokens_per_step(config: RunConfig) -> int:
    """Positions of one optimiser step, padding included; a contrastive pair is two sequences."""
    views = 2 if config.task == "contrastive" else 1
    return views * config.data.global_batch * config.data.seq_len
