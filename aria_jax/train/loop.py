"""The one training loop, for every task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aria_jax.checkpoints.manager import DIRECTORY, Checkpointer
from aria_jax.checkpoints.models import model_record
from aria_jax.config import RunConfig, to_dict
from aria_jax.sharding import batch_sharding, iterate_rows, make_mesh
from aria_jax.train.cost import chip_of, train_flops_per_token
from aria_jax.train.files import file_metrics
from aria_jax.train.metrics import Log, MetricSink, Watch
from aria_jax.train.preemption import stop_requests
from aria_jax.train.processes import lost_contact
from aria_jax.train.profiling import Profiler
from aria_jax.train.start import Start, decide
from aria_jax.train.state import Merge, first_state
from aria_jax.train.step import TrainState, make_eval_step, make_train_step
from aria_jax.train.tasks import Task, build_task, resolve
from data_pipeline.errors import UserError
from data_pipeline.shards import load_manifest

BEST = "best"


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


def run(
    config: RunConfig,
    data_dir: str | Path,
    workdir: str | Path,
    *,
    init_from: str | Path | None = None,
    sinks: Sequence[MetricSink] = (),
    on_start: Callable[[Start], None] | None = None,
    should_stop: Callable[[int], bool] | None = None,
    profile: bool = False,
) -> TrainResult:
    """Trains, or goes on training, in `workdir`.

    SIGTERM and SIGINT end the run after the step under way, with a checkpoint. Stopped and run
    again, a run computes bit for bit what it would have computed without the stop (one process).
    The weights of the lowest validation loss are kept in `workdir/best`.

    Args:
        init_from: checkpoint or published .safetensors whose weights a new run starts from.
        on_start: told how the run begins, before the first step.
        should_stop: asked after each step; True ends the run as a signal does.
        profile: writes a trace of a few steps to `workdir/profile`, for XProf and TensorBoard.

    Raises:
        UserError: contradictory settings, unusable data or checkpoint, a diverged loss.
    """
    config = resolve(config.validate(), data_dir)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    task = build_task(config, data_dir, mesh=mesh)
    tokenizer = load_manifest(data_dir)["tokenizer"]["preset"]
    record = {**model_record(config.model, tokenizer), "config": to_dict(config)}
    workdir = Path(workdir)
    checkpointer = Checkpointer(workdir, config.train.keep_checkpoints)
    try:
        start = decide(workdir, init_from, checkpointer)
        merge, state, step = first_state(config, mesh, start, checkpointer, record)
        if on_start is not None:
            on_start(start)
        loop = _Loop(config, task, mesh, merge, checkpointer, _Best(workdir), record, Log(sinks))
        loop.state, loop.step = state, step
        with Profiler(workdir / "profile" if profile else None, step) as profiler:
            interrupted = loop.train(should_stop, profiler)
        loop.save()
        checkpointer.wait()
    except BaseException as error:
        if lost_contact(error) is None:  # closing would wait for the process that is gone
            checkpointer.close()
        raise
    checkpointer.close()
    return TrainResult(loop.step, loop.log.last, interrupted, start)


def check_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` unless every device gets as many rows as every other."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.data.global_batch // config.train.grad_accumulation
    if rows % ways:
        raise UserError(
            f"data.global_batch={config.data.global_batch} in {config.train.grad_accumulation} "
            f"parts of {rows} rows does not divide over {ways} devices (mesh.data × mesh.fsdp); "
            f"choose a multiple of {ways * config.train.grad_accumulation}"
        )


class _Loop:
    """A run under way: `state` after `step` steps."""

    state: TrainState
    step: int

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        mesh: jax.sharding.Mesh,
        merge: Merge,
        checkpointer: Checkpointer,
        best: "_Best",
        record: dict[str, Any],
        log: Log,
    ):
        self._config, self._task, self._mesh = config, task, mesh
        self._checkpointer, self._best, self._record, self.log = checkpointer, best, record, log
        self._train_step = make_train_step(config, merge, task.loss)
        self._eval_step = make_eval_step(config, merge, task.loss, task.answers)
        self._sharding = batch_sharding(mesh)
        chip = chip_of(jax.devices()[0].device_kind)
        self._watch = Watch(
            log,
            log_every=config.train.log_every,
            max_bad=config.train.max_bad_steps,
            last_good=self._last_good,
            flops_per_token=train_flops_per_token(config),
            peak_flops=chip.flops * mesh.size if chip is not None else None,
        )

    def train(self, should_stop: Callable[[int], bool] | None, profiler: Profiler) -> bool:
        """Advances to the last step, or until asked to stop (then True)."""
        settings, stopped = self._config.train, False
        with stop_requests() as asked, jax.set_mesh(self._mesh):
            batches = iterate_rows(self._task.train, self._sharding, self.step)
            self._watch.restart_clock()
            while self.step < settings.steps and not stopped:
                number = jax.device_put(np.int32(self.step))
                self.state, metrics = self._train_step(self.state, next(batches), number)
                self.step += 1
                self._watch.after(self.step, metrics)
                profiler.after(self.step, metrics)
                if self.step == settings.steps or self.step % settings.eval_every == 0:
                    with self._watch.paused():
                        self._evaluate()
                if self.step % settings.checkpoint_every == 0:
                    self.save()
                wanted = should_stop is not None and should_stop(self.step)
                stopped = asked(self.step) or wanted
            self._watch.finish()
        return stopped and self.step < settings.steps

    def save(self) -> None:
        """Starts writing a checkpoint of the present step."""
        state, record = self.state, {**self._record, "position": self._position()}
        record["ema"] = state.ema is not None
        self._checkpointer.save(
            self.step, state.params, record, opt_state=state.opt_state, ema=state.ema
        )

    def _position(self) -> dict[str, int]:
        rows = self.step * self._config.data.global_batch
        seed = self._config.train.seed
        return {"seed": seed, "epoch": rows // self._task.train.n_examples, "step": self.step}

    def _last_good(self) -> str:
        self._checkpointer.wait()
        steps = self._checkpointer.steps()
        if not steps:
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {self._checkpointer.directory / str(steps[-1])}"

    def _evaluate(self) -> None:
        """Weighted means over the first validation batches; keeps the weights if they are best.

        Where the task answers for whole files, all batches are seen.
        """
        if self._task.evaluate is None:
            return
        seen = None if self._task.answers is not None else self._config.train.eval_batches
        found = [
            self._eval_step(self.state, batch)
            for batch in islice(iterate_rows(self._task.evaluate, self._sharding), seen)
        ]
        metrics, rows = zip(*jax.device_get(found), strict=True)
        values = [{name: float(v) for name, v in m.items()} for m in metrics]
        weights = np.array([v.pop("weight") for v in values])
        if not weights.sum():
            return
        means = {n: float(np.average([v[n] for v in values], weights=weights)) for n in values[0]}
        if self._task.answers is not None:
            means |= file_metrics(rows)
        self.log.write(self.step, means, "val")
        self._best.offer(self.step, means["loss"], self.state.best_params, self._record)


class _Best:
    """The weights of the lowest validation loss, as a model in a folder of their own."""

    def __init__(self, workdir: Path):
        self._folder = workdir / BEST
        # Looked up before the first step: later, one process can find what another has just
        # written, and processes that decide differently wait for each other in vain.
        self._loss = self._known() if (self._folder / DIRECTORY).is_dir() else np.inf

    def offer(self, step: int, loss: float, params: Any, record: dict[str, Any]) -> None:
        """Writes the weights if no evaluation of this run was better."""
        if loss >= self._loss:
            return
        checkpointer = Checkpointer(self._folder, keep=1)
        try:
            checkpointer.save(step, params, {**record, "val_loss": loss})
        finally:
            checkpointer.close()
        self._loss = loss

    def _known(self) -> float:
        checkpointer = Checkpointer(self._folder, keep=1)
        try:
            steps = checkpointer.steps()
            return checkpointer.record(steps[-1])["val_loss"] if steps else np.inf
        finally:
            checkpointer.close()
