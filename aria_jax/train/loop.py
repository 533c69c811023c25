"""The one training loop, for every task."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aria_jax.config import RunConfig, to_dict
from aria_jax.interop.safetensors import import_model
from aria_jax.models.heads import Model, Parameters, abstract_model, init_sharded, split_model
from aria_jax.sharding import batch_sharding, make_mesh, parameter_shardings
from aria_jax.train.checkpoint import (
    Checkpointer,
    abstract_parameters,
    load_model,
    model_record,
)
from aria_jax.train.metrics import MetricSink
from aria_jax.train.optimizer import build_optimizer
from aria_jax.train.start import Start, decide, refuse_changed_config
from aria_jax.train.step import make_eval_step, make_train_step
from aria_jax.train.tasks import Task, build_task, resolve, to_device
from data_pipeline.errors import UserError
from data_pipeline.shards import load_manifest


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        final_step: optimiser steps done.
        metrics: the last of each metric, "train/loss", "val/loss", …
        interrupted: a signal or `should_stop` ended it before `config.train.steps`.
        start: how it began.
    """

    final_step: int
    metrics: dict[str, float]
    interrupted: bool
    start: Start


@dataclass
class _State:
    params: Parameters
    opt_state: Any
    step: int = 0


@dataclass
class _Log:
    """Sends metrics to the sinks of process 0 and remembers the last."""

    sinks: Sequence[MetricSink]
    last: dict[str, float] = field(default_factory=dict)

    def write(self, step: int, metrics: dict[str, float], split: Any) -> None:
        self.last.update({f"{split}/{name}": value for name, value in metrics.items()})
        if jax.process_index() == 0:
            for sink in self.sinks:
                sink.write(step, metrics, split)


def run(
    config: RunConfig,
    data_dir: str | Path,
    workdir: str | Path,
    *,
    init_from: str | Path | None = None,
    sinks: Sequence[MetricSink] = (),
    on_start: Callable[[Start], None] | None = None,
    should_stop: Callable[[int], bool] | None = None,
) -> TrainResult:
    """Trains, or goes on training, in `workdir`.

    SIGTERM and SIGINT end the run after the step under way, with a checkpoint. Stopped and run
    again, a run computes bit for bit what it would have computed without the stop (one process).

    Args:
        init_from: checkpoint or published .safetensors whose weights a new run starts from.
        on_start: told how the run begins, before the first step.
        should_stop: asked after each step; True ends the run as a signal does.

    Raises:
        UserError: contradictory settings, unusable data or checkpoint, a diverged loss.
    """
    config = config.validate()
    tokenizer = load_manifest(data_dir)["tokenizer"]["preset"]
    config = resolve(config, data_dir)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    task = build_task(
        config, data_dir, shard_index=jax.process_index(), shard_count=jax.process_count()
    )
    workdir = Path(workdir)
    checkpointer = Checkpointer(workdir, config.train.keep_checkpoints)
    log = _Log(sinks)
    try:
        start = decide(workdir, init_from, checkpointer)
        merge, state = _initial_state(config, mesh, start, checkpointer)
        if on_start is not None:
            on_start(start)
        record = {**model_record(config.model, tokenizer), "config": to_dict(config)}
        interrupted = _train(
            config, task, mesh, merge, state, checkpointer, record, log, should_stop
        )
        checkpointer.save(state.step, state.params, state.opt_state, record)
        checkpointer.wait()
    finally:
        checkpointer.close()
    return TrainResult(state.step, log.last, interrupted, start)


def _check_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.data.global_batch // config.train.grad_accumulation
    if rows % ways:
        raise UserError(
            f"data.global_batch={config.data.global_batch} in {config.train.grad_accumulation} "
            f"parts of {rows} rows does not divide over {ways} devices (mesh.data × mesh.fsdp); "
            f"choose a multiple of {ways * config.train.grad_accumulation}"
        )


def _initial_state(
    config: RunConfig, mesh: jax.sharding.Mesh, start: Start, checkpointer: Checkpointer
) -> tuple[Callable[[Parameters], Model], _State]:
    """The model's `merge` function, and parameters and optimiser state on the mesh."""
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    model = abstract_model(config.model, config.compute)
    merge, _ = split_model(model)
    like = abstract_parameters(model, mesh)
    shapes = jax.eval_shape(optimizer.init, like)
    shardings = parameter_shardings(shapes, mesh)
    if start.kind == "resume":
        opt_like = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            shapes,
            shardings,
        )
        return merge, _newest_intact(config, checkpointer, like, opt_like, start)
    params = split_model(
        init_sharded(config.model, config.compute, jax.random.key(config.train.seed), mesh)
    )[1]
    if start.path is not None:
        params = _with_weights_of(params, _source_model(start, mesh), config, start.path)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return merge, _State(params, opt_state)


def _newest_intact(
    config: RunConfig, checkpointer: Checkpointer, like: Any, opt_like: Any, start: Start
) -> _State:
    """The newest checkpoint that can be read; warns about each that cannot."""
    for step in reversed(checkpointer.steps()):
        try:
            record = checkpointer.record(step)
            refuse_changed_config(record["config"], config, Path(str(start.path)))
            params = checkpointer.restore_params(step, like)
            return _State(params, checkpointer.restore_opt_state(step, opt_like), step)
        except UserError:
            raise
        except Exception as error:  # Orbax raises anything on a damaged file
            warnings.warn(f"checkpoint {step} is damaged, trying the one before: {error}",
                          stacklevel=2)  # fmt: skip
    raise UserError(f"{start.path}: no checkpoint there can be read; start in a new --workdir")


def _source_model(start: Start, mesh: jax.sharding.Mesh) -> Model:
    if start.kind == "published":
        return import_model(str(start.path))
    return load_model(str(start.path), mesh=mesh).model


def _with_weights_of(
    params: Parameters, source: Model, config: RunConfig, path: Path
) -> Parameters:
    """`params` with the backbone of `source`, and its head where it is of the same kind."""
    theirs = split_model(source)[1]
    same_head = (source.config.head, source.config.class_names) == (
        config.model.head,
        config.model.class_names,
    )
    chosen = {**params, "backbone": theirs["backbone"]}
    if same_head and "head" in theirs:
        chosen["head"] = theirs["head"]
    for (name, ours), found in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(chosen), strict=True
    ):
        if ours.shape != found.shape:
            raise UserError(
                f"{path}: {jax.tree_util.keystr(name)} has shape {found.shape}, this run needs "
                f"{ours.shape}; choose the preset the weights were trained with"
            )
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), chosen, params)


def _train(
    config: RunConfig,
    task: Task,
    mesh: jax.sharding.Mesh,
    merge: Callable[[Parameters], Model],
    state: _State,
    checkpointer: Checkpointer,
    record: dict[str, Any],
    log: _Log,
    should_stop: Callable[[int], bool] | None,
) -> bool:
    """Advances `state` to the last step, or until asked to stop (then True)."""
    settings = config.train
    train_step = make_train_step(
        merge,
        task.loss,
        build_optimizer(config.optimizer, settings.steps),
        seed=settings.seed,
        accumulation=settings.grad_accumulation,
        dropout=config.model.resid_dropout > 0,
    )
    eval_step = make_eval_step(merge, task.loss)
    sharding = batch_sharding(mesh)
    watch = _Watch(settings.max_bad_steps, settings.log_every, log, checkpointer)
    stopped = False
    with _signals() as asked, mesh:
        batches = task.train(state.step)
        while state.step < settings.steps and not stopped:
            batch = to_device(next(batches), sharding)
            state.params, state.opt_state, metrics = train_step(
                state.params, state.opt_state, batch, np.int32(state.step)
            )
            state.step += 1
            watch.after(state.step, metrics)
            last = state.step == settings.steps
            if last or state.step % settings.eval_every == 0:
                watch.flush()
                _evaluate(settings.eval_batches, task, eval_step, sharding, state, log)
                watch.restart_clock()
            if state.step % settings.checkpoint_every == 0:
                checkpointer.save(state.step, state.params, state.opt_state, record)
            stopped = (should_stop is not None and should_stop(state.step)) or asked.is_set()
        watch.flush()
    return stopped and state.step < settings.steps


class _Watch:
    """Reads the metrics of a step after the next one is under way, so the device never waits."""

    def __init__(self, max_bad: int, log_every: int, log: _Log, checkpointer: Checkpointer):
        self._max_bad, self._log_every, self._log = max_bad, log_every, log
        self._checkpointer = checkpointer
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._bad = 0
        self._since: list[dict[str, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last step out of the throughput."""
        self._began = time.perf_counter()

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched; reads those of the one before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads what is pending; logs every `log_every` steps."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        self._bad = self._bad + 1 if values["skipped"] else 0
        if self._bad >= self._max_bad:
            good = self._checkpointer.steps()
            where = f"the last good checkpoint is step {good[-1]}" if good else "none was saved"
            raise UserError(
                f"the loss was not finite for {self._bad} steps up to step {step}; {where}; "
                "lower optimizer.peak_lr and start again"
            )
        self._since.append(values)
        if step % self._log_every == 0:
            seconds = time.perf_counter() - self._began
            means = {name: float(np.mean([v[name] for v in self._since])) for name in values}
            n_tokens = sum(v["n_tokens"] for v in self._since)
            means["tokens_per_s"] = n_tokens / max(seconds, 1e-9)
            means["step_s"] = seconds / len(self._since)
            self._log.write(step, means, "train")
            self._since = []
            self.restart_clock()


def _evaluate(n_batches, task: Task, eval_step, sharding, state: _State, log: _Log) -> None:
    """Token- or batch-weighted means over the first validation batches; nothing without any."""
    found = [
        eval_step(state.params, to_device(batch, sharding))
        for batch in islice(task.evaluate(), n_batches)
    ]
    if not found:
        return
    values = [{name: float(v) for name, v in metrics.items()} for metrics in found]
    weights = np.array([v.pop("n_tokens") for v in values])
    if weights.sum():
        means = {n: float(np.average([v[n] for v in values], weights=weights)) for n in values[0]}
        log.write(state.step, means, "val")


@contextmanager
def _signals():
    """An event that SIGTERM (preemption) and SIGINT (Ctrl-C) set instead of killing the run."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: asked.set()) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
