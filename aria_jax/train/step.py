"""The optimiser, one for every task, and the compiled training and evaluation steps: pure functions
of state, batch and step number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aria_jax.config import OptimizerConfig, RunConfig
from aria_jax.losses.contrastive import grad_cache
from aria_jax.models import Parameters
from aria_jax.models.heads import Model
from aria_jax.sharding import constrain
from aria_jax.train.objectives import (
    Aux,
    Batch,
    BatchLoss,
    LossFunction,
    Predictions,
    join_microbatches,
    split_microbatches,
)

Metrics = dict[str, Any]
"""Scalars by name; of a mixture, "by_source" holds the sums of each corpus."""

CUBLAS = {"xla_gpu_enable_triton_gemm": False}
"""On GPUs products are cuBLAS', which adds a residual, or another product, while it writes its own;
Triton's would leave each such sum to a pass over memory. NVIDIA's and MaxText's settings too."""
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
        params: float32 weights.
        opt_state: of `build_optimizer`.
        ema: moving average of the weights; None unless `optimizer.ema_decay` is set.
        frozen: weights that a step does not change; none unless `params` are adapters of them.
    """

    params: Parameters
    opt_state: Any
    ema: Parameters | None = None
    frozen: Parameters = field(default_factory=dict)

    @property
    def eval_params(self) -> Parameters:
        """The weights to evaluate and export."""
        return self.params if self.ema is None else self.ema


TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], tuple[Metrics, dict[str, jax.Array]]]


Build = Callable[[Parameters, Parameters], Model]
"""(what is trained, what is frozen) -> the model they make; traceable."""


def new_state(config: OptimizerConfig, params: Parameters, frozen: Parameters) -> TrainState:
    """The state of a run that has these weights and has done no step (traceable)."""
    opt_state = build_optimizer(config, total_steps=1).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay is not None else None
    return TrainState(params, opt_state, ema, frozen)


def make_train_step(
    config: RunConfig, build: Build, loss: LossFunction, shardings: TrainState | None = None
) -> TrainStep:
    """(state, batch, step) -> (state, metrics), compiled; the state given is donated.

    A step whose loss or gradient is not finite changes nothing and reports `skipped` = 1. With
    `train.grad_accumulation` parts, each part counts by its `weight`, or a `BatchLoss` is taken of
    the embeddings of all parts: either way the result is that of the whole batch at once.

    Args:
        shardings: of the state given, which the state returned keeps. Left to the compiler (None),
            it may be sharded otherwise, for which the second step would be compiled once more.
    """
    train = config.train
    seed = train.seed if config.model.resid_dropout > 0 else None
    step = _train_step(config.optimizer, train.steps, train.grad_accumulation, seed, build, loss)
    kept = None if shardings is None else (shardings, None)
    options = CUBLAS if _platform(shardings) == "gpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=kept, compiler_options=options)


@lru_cache(maxsize=8)
def _train_step(
    config: OptimizerConfig,
    total_steps: int,
    parts: int,
    dropout_seed: int | None,
    build: Build,
    loss: LossFunction,
) -> TrainStep:
    """One function for the same settings, so that jax compiles it once."""
    optimizer = build_optimizer(config, total_steps)
    schedule = learning_rate(config, total_steps)

    def train_step(state: TrainState, batch: Batch, step: jax.Array) -> tuple[TrainState, Metrics]:
        def merge(params: Parameters) -> Model:
            return build(params, state.frozen)

        gradients = weighted_gradients(parts, merge, loss)
        key = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), step)
        (means, counts), grads = gradients(state.params, batch, key)
        total = jnp.maximum(counts["weight"], 1e-9)
        means, grads = jax.tree.map(lambda x: (x / total).astype(x.dtype), (means, grads))
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norm)
        rate = schedule(updates_done(state.opt_state))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        changed = (params, opt_state, _averaged(config.ema_decay, state.ema, params))
        before = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), changed, before
        )
        metrics = {**means, "n_tokens": counts["n_tokens"], "grad_norm": norm}
        metrics |= {"learning_rate": rate, "skipped": 1.0 - finite}
        if "by_source" in counts:
            metrics["by_source"] = counts["by_source"]
        return TrainState(params, opt_state, ema, state.frozen), metrics

    return train_step


def _platform(shardings: TrainState | None) -> str:
    """What the step will run on; described devices of another machine count."""
    leaves = jax.tree.leaves(shardings)
    return next(iter(leaves[0].device_set)).platform if leaves else jax.default_backend()


WeightedLoss = tuple[jax.Array, tuple[Metrics, Metrics]]
"""Loss times weight, and (means times weight, counts)."""
PartGradients = tuple[tuple[Metrics, Metrics], Parameters]
"""((means times weight, counts), gradient times weight)."""
Gradients = Callable[[Parameters, Batch, jax.Array | None], PartGradients]
"""(params, batch, key) -> what they give.

Dividing by the sum of weights makes both right, whatever the parts of a batch held.
"""


def weighted_gradients(
    parts: int, merge: Callable[[Parameters], Model], loss: LossFunction
) -> Gradients:
    """How a step differentiates `loss`, computing a batch in so many parts."""
    if parts > 1 and isinstance(loss, BatchLoss):
        return _cached(parts, merge, loss)

    def weighted_loss(params: Parameters, batch: Batch, key: jax.Array | None) -> WeightedLoss:
        return _weighted(*loss(merge(params), batch, key))

    grad = jax.value_and_grad(weighted_loss, has_aux=True)

    def one_part(params: Parameters, batch: Batch, key: jax.Array | None) -> PartGradients:
        (_, aux), grads = grad(params, batch, key)
        return aux, grads

    return one_part if parts == 1 else _accumulated(parts, one_part)


def _accumulated(parts: int, one_part: Gradients) -> Gradients:
    """Sums over parts."""

    def gradients(params: Parameters, batch: Batch, key: jax.Array | None) -> PartGradients:
        rows = split_microbatches(batch, parts)

        def add(total: PartGradients, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            rows, i = part
            part_key = None if key is None else jax.random.fold_in(key, i)
            return jax.tree.map(jnp.add, total, one_part(params, rows, part_key)), None

        shapes = jax.eval_shape(one_part, params, jax.tree.map(lambda x: x[0], rows), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (rows, jnp.arange(parts)))[0]

    return gradients


def _cached(parts: int, merge: Callable[[Parameters], Model], loss: BatchLoss) -> Gradients:
    """Of all rows at once, holding the activations of one part."""

    def embed(params: Parameters, part: tuple[Batch, jax.Array | None]) -> jax.Array:
        return loss.embed(merge(params), *part)

    def gradients(params: Parameters, batch: Batch, key: jax.Array | None) -> PartGradients:
        def compare(params: Parameters, z: jax.Array) -> WeightedLoss:
            return _weighted(*loss.compare(merge(params), join_microbatches(z), batch))

        keys = None if key is None else jax.random.split(key, parts)
        (_, aux), grads = grad_cache(
            embed, compare, params, (split_microbatches(batch, parts), keys)
        )
        return aux, grads

    return gradients


def _weighted(value: jax.Array, aux: Aux) -> WeightedLoss:
    """Loss times its weight, and ({name: mean times weight}, {name: count or sum})."""
    weight = aux["weight"]
    names: tuple[str, ...] = ("n_tokens", "weight", "by_source")
    counts = {name: aux[name] for name in names if name in aux}
    means = {name: v * weight for name, v in aux.items() if name not in counts}
    return value * weight, ({"loss": value * weight, **means}, counts)


def _averaged(decay: float | None, ema: Parameters | None, params: Parameters) -> Parameters | None:
    if ema is None or decay is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


@lru_cache(maxsize=8)
def make_eval_step(
    build: Build, loss: LossFunction, predictions: Predictions | None = None
) -> EvalStep:
    """(state, batch) -> metrics of the batch, `weight` among them, and the predictions of its rows,
    whole on every device; compiled, without dropout.
    """

    def eval_step(state: TrainState, batch: Batch) -> tuple[Metrics, dict[str, jax.Array]]:
        model = build(state.eval_params, state.frozen)
        value, aux = loss(model, batch, None)
        rows = {} if predictions is None else predictions(model, batch)
        rows = {name: constrain(x, *(None,) * x.ndim) for name, x in rows.items()}
        return {"loss": value, **aux}, rows

    return jax.jit(eval_step)
