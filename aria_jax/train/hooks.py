"""What a run does besides its steps: log, evaluate, keep the best weights, save, profile.

A hook is told of every step once it is dispatched, and acts on those that are its own.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from aria_jax.checkpoints import DIRECTORY
from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.models.heads import Parameters
from aria_jax.sharding import iterate_rows
from aria_jax.train.objectives import file_metrics
from aria_jax.train.processes import process_0_says
from aria_jax.train.step import EvalStep, Metrics, TrainState
from aria_jax.train.tasks import Task
from aria_jax.train.trackers import Log
from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.loaders import BatchStream

BEST = "best"
"""Folder of a workdir that holds the weights of the lowest validation loss."""

Clock = Callable[[], float]
"""Seconds since whenever."""

SpentOn = Callable[[str], AbstractContextManager]
"""Takes the time of a block, see `goodput.GoodputRecorder.spent_on`."""


class Hook(Protocol):
    """Something that a run does besides its steps."""

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Told that `step` was dispatched, and what it gave; `state` is valid until the next."""

    def finish(self) -> None:
        """Told that there are no more steps."""


class StepMonitor:
    """Reads the metrics of a step after the next one is under way, so the device never waits.

    Writes means over `log_every` steps: of the steps that were not skipped, with their number. Of a
    mixture also "loss/NAME" and "n_tokens/NAME" of each corpus.

    Args:
        sources: names of a mixture's corpora.
        flops_per_token: to tell the share of `peak_flops` that is used (MFU); None leaves it out.
        last_good: names the newest checkpoint for the message of a diverged run.
    """

    def __init__(
        self,
        log: Log,
        *,
        log_every: int,
        max_bad: int,
        last_good: Callable[[], str],
        flops_per_token: float,
        peak_flops: float | None,
        sources: Sequence[str] = (),
        clock: Clock = time.perf_counter,
    ):
        self._sources = sources
        self._log, self._log_every, self._max_bad = log, log_every, max_bad
        self._last_good = last_good
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._clock = clock
        self._pending: tuple[int, Metrics] | None = None
        self.pausing: SpentOn = nullcontext
        self._bad = 0
        self._since: list[dict[str, Any]] = []
        self._read_up_to = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves everything before the next step out of the throughput."""
        self._began = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads what is pending, and leaves what happens within out of the throughput."""
        self.flush()
        began = self._clock()
        with self.pausing("evaluation_s"):
            yield
        self._began += self._clock() - began

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Takes the metrics of the step just dispatched; reads those of the one before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads what is pending.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)
        self._bad = self._bad + 1 if values["skipped"] else 0
        if self._bad >= self._max_bad:
            raise UserError(
                f"the loss was not finite for {self._bad} steps up to step {step}; "
                f"{self._last_good()}; lower optimizer.peak_lr and start again from it"
            )
        self._since.append(values)
        self._read_up_to = step
        if step % self._log_every == 0:
            self._write(step)

    def finish(self) -> None:
        """Reads what is pending and writes what is left of the last `log_every` steps."""
        self.flush()
        if self._since:
            self._write(self._read_up_to)

    def _write(self, step: int) -> None:
        seconds = max(self._clock() - self._began, 1e-9)
        good = [values for values in self._since if not values["skipped"]]
        names = [name for name in good[0] if name != "by_source"] if good else []
        means = {name: float(np.mean([v[name] for v in good])) for name in names}
        if good and self._sources:
            means |= self._of_sources([values["by_source"] for values in good])
        tokens_per_s = float(sum(v["n_tokens"] for v in self._since)) / seconds
        means |= {
            "skipped": float(len(self._since) - len(good)),
            "tokens_per_s": tokens_per_s,
            "step_s": seconds / len(self._since),
        }
        if self._peak_flops is not None:
            means["mfu"] = tokens_per_s * self._flops_per_token / self._peak_flops
        self._log.write(step, means, "train")
        self._since = []
        self.restart_clock()

    def _of_sources(self, sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """The mean loss of each corpus that had rows in these steps, and its tokens a step."""
        loss, weight, n_tokens = (
            np.sum([s[name] for s in sums], axis=0) for name in ("loss", "weight", "n_tokens")
        )
        found = {}
        for i, name in enumerate(self._sources):
            found[f"n_tokens/{name}"] = float(n_tokens[i]) / len(sums)
            if weight[i] > 0:
                found[f"loss/{name}"] = float(loss[i] / weight[i])
        return found


@dataclass(frozen=True)
class Evaluate:
    """Every so many steps and after the last: means over validation batches, and best weights.

    Of a mixture, each corpus is evaluated by itself ("loss/NAME", …), and what counts is the mean
    by their weights in the mixture.

    Attributes:
        every, last_step: when.
        n_batches: how many batches, from the first; all of them where the task predicts files.
    """

    task: Task
    eval_step: EvalStep
    sharding: jax.sharding.NamedSharding
    log: Log
    monitor: StepMonitor
    best: "KeepBest"
    every: int
    last_step: int
    n_batches: int

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Evaluates if it is time; what that takes is no part of the throughput."""
        if step == self.last_step or step % self.every == 0:
            with self.monitor.paused():
                self._evaluate(step, state)

    def finish(self) -> None:
        """Nothing is under way."""

    def _evaluate(self, step: int, state: TrainState) -> None:
        by_source = {
            source: means
            for source in self.task.sources
            if (stream := self.task.evaluate.get(source.name)) is not None
            and (means := self._means(stream, state))
        }
        if not by_source:
            return
        shares = [source.weight for source in by_source]
        names = next(iter(by_source.values()))
        means = {
            name: float(np.average([each[name] for each in by_source.values()], weights=shares))
            for name in names
        }
        if len(self.task.sources) > 1:
            for source, each in by_source.items():
                means |= {f"{name}/{source.name}": value for name, value in each.items()}
        self.log.write(step, means, "val")
        self.best.offer(step, means["loss"], state.eval_params)

    def _means(self, stream: BatchStream, state: TrainState) -> dict[str, float]:
        """Of the validation pieces of one corpus; nothing where no row counts."""
        seen = None if self.task.predictions is not None else self.n_batches
        batches = islice(iterate_rows(stream, self.sharding), seen)
        metrics, rows = zip(
            *jax.device_get([self.eval_step(state, batch) for batch in batches]), strict=True
        )
        values = [{name: float(v) for name, v in m.items()} for m in metrics]
        weights = np.array([v.pop("weight") for v in values])
        if not weights.sum():
            return {}
        means = {n: float(np.average([v[n] for v in values], weights=weights)) for n in values[0]}
        if self.task.predictions is not None:
            means |= file_metrics(rows)
        return means


class KeepBest:
    """The weights of the lowest validation loss, as a model in a folder of their own.

    Args:
        record: what the checkpoint says of the run.
        before: called before something is written. Processes wait for each other by names, which
            two checkpoints under way at once would share: that of the run must be whole by then.
    """

    def __init__(
        self, workdir: Path, record: dict[str, Any], before: Callable[[], None] = lambda: None
    ):
        self._folder, self._record, self._before = workdir / BEST, record, before
        # Looked up before the first step: later, one process can find what another has just
        # written, and processes that decide differently wait for each other in vain.
        self._loss = self._known() if (self._folder / DIRECTORY).is_dir() else np.inf

    def offer(self, step: int, loss: float, params: Parameters) -> None:
        """Writes the weights if no evaluation of this run was better."""
        if loss >= self._loss:
            return
        self._before()
        checkpointer = Checkpointer(self._folder, keep=1)
        try:
            checkpointer.save(step, params, {**self._record, "val_loss": loss})
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


class SaveCheckpoints:
    """Saves every so many steps, and whenever so many minutes have passed since the last save.

    Args:
        record: step -> what the checkpoint says of the run.
        every: steps.
        every_minutes: None for steps alone.
        ask_every: steps between looks at the clock, which all processes must take together.
        agree: the answer of process 0, in every process.
        before: called before each save.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        record: Callable[[int], dict[str, Any]],
        *,
        every: int,
        every_minutes: float | None,
        ask_every: int,
        clock: Clock = time.perf_counter,
        agree: Callable[[int], int] = process_0_says,
        before: Callable[[], None] = lambda: None,
    ):
        self._before = before
        self.saving: SpentOn = nullcontext
        self._checkpointer, self._record, self._every = checkpointer, record, every
        self._seconds = None if every_minutes is None else 60 * every_minutes
        self._ask_every, self._clock, self._agree = ask_every, clock, agree
        self._saved_at = clock()

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Saves if it is time."""
        if step % self._every == 0 or self._minutes_have_passed(step):
            self.save(step, state)

    def finish(self) -> None:
        """Whoever trains saves the last step."""

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing a checkpoint of the step."""
        record = {**self._record(step), "ema": state.ema is not None}
        with self.saving("checkpoint_s"):
            self._before()
            self._checkpointer.save(
                step, state.params, record, opt_state=state.opt_state, ema=state.ema
            )
        self._saved_at = self._clock()

    def _minutes_have_passed(self, step: int) -> bool:
        if self._seconds is None or step % self._ask_every:
            return False
        return bool(self._agree(self._clock() - self._saved_at >= self._seconds))


class Profile:
    """Traces steps into a folder, for XProf or TensorBoard's profile tab.

    Args:
        steps: first and last that were named before the run began; None where none were.
        done: steps that the run has behind it already.
        asked: how many of the next steps somebody asks for now; of process 0, whose answer counts.
        ask_every: steps between two such questions, which all processes must take together.
        agree: the answer of process 0, in every process.
    """

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int] | None,
        done: int,
        *,
        asked: Callable[[], int] = lambda: 0,
        ask_every: int = 1,
        agree: Callable[[int], int] = process_0_says,
    ):
        self._folder, self._steps, self._missed = folder, steps, steps is not None
        self._asked, self._ask_every, self._agree = asked, ask_every, agree
        self._until: int | None = None
        self._sending: threading.Thread | None = None
        if steps is not None and done + 1 == steps[0]:
            self._start(steps[1])

    def on_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Starts before the first step and stops after the last, waiting for whole steps."""
        if self._until is not None:
            if step >= self._until:
                jax.block_until_ready(metrics)
                self.close()
            return
        n = self._agree(self._asked()) if step % self._ask_every == 0 else 0
        last = step + n
        if self._steps is not None and step + 1 == self._steps[0]:
            last = max(last, self._steps[1])
        if last > step:
            jax.block_until_ready(metrics)
            self._start(last)

    def finish(self) -> None:
        """Warns where none of the steps that were named was done."""
        self.close()
        if self._sending is not None:
            self._sending.join()
        if self._steps is not None and self._missed:
            first, last = self._steps
            warnings.warn(
                f"train.profile_steps={first}-{last}: this run did not pass through them; nothing "
                "was traced",
                stacklevel=2,
            )

    def close(self) -> None:
        """Stops tracing, if it is under way, and sends the trace to its bucket, if it has one."""
        if self._until is not None:
            jax.profiler.stop_trace()
            self._until = None
            self._sending = threading.Thread(target=self._send, daemon=True)
            self._sending.start()

    def _send(self) -> None:
        with suppress(UserError):  # metrics go the same way, and tell of it
            storage.upload(self._folder)

    def _start(self, last: int) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._until = last
        if self._steps is not None and last >= self._steps[0]:
            self._missed = False
