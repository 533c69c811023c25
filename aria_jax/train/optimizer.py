"""AdamW and its learning-rate schedule, built in one place for every task."""

import optax

from aria_jax.config import OptimizerConfig

WARMUP_START = 1e-6  # of the peak; PyTorch's LinearLR cannot start from 0


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then decay to `end_ratio` of the peak at the end.

    "linear" is the reference's (training/train.py get_optim).
    """
    peak, warmup = config.peak_lr, config.warmup_steps
    rising = optax.linear_schedule(WARMUP_START * peak, peak, warmup)
    left = max(total_steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(peak, config.end_ratio * peak, left),
        "cosine": optax.cosine_decay_schedule(peak, left, config.end_ratio),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([rising, after], [warmup])


def build_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping (unless `clip_norm` is None) and AdamW with decay on every parameter."""
    adamw = optax.adamw(
        learning_rate(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
