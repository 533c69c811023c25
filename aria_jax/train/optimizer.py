"""AdamW and its learning-rate schedule, built in one place for every task."""

import jax
import jax.numpy as jnp
import optax

from aria_jax.config import OptimizerConfig

WARMUP_START = 1e-6  # of the peak; PyTorch's LinearLR cannot start from 0


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then decay to `end_ratio` of the peak at the end.

    "linear" is the reference's (training/train.py get_optim); "wsd" stays at the peak and falls
    linearly over the last `decay_fraction` of the run (Hu et al. 2024, MiniCPM), so that a longer
    run can branch off before the fall.
    """
    peak, end, warmup = config.peak_lr, config.end_ratio, config.warmup_steps
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, round(total_steps * (1 - config.decay_fraction)))
    left = max(total_steps - start, 1)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        # Sums of positive terms: the first learning rates are exact in float32 too.
        rising = WARMUP_START * (1 - step / max(warmup, 1)) + step / max(warmup, 1)
        done = jnp.clip((step - start) / left, 0, 1)
        falling = {
            "linear": (1 - done) + end * done,
            "wsd": (1 - done) + end * done,
            "cosine": end + (1 - end) * (1 + jnp.cos(jnp.pi * done)) / 2,
            "constant": jnp.ones_like(done),
        }[config.schedule]
        return peak * jnp.where(step < warmup, rising, falling)

    return schedule


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


def updates_done(opt_state: optax.OptState) -> jax.Array:
    """How many updates a state of `build_optimizer` has seen: the schedule's clock, int32."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
