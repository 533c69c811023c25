"""Where a run's numbers go, and how they get there without making the device wait."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import jax
import numpy as np

from data_pipeline.errors import UserError

Split = Literal["train", "val"]


class MetricSink(Protocol):
    """Takes metrics as they come; `close` once at the end."""

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Takes the metrics of some steps (train) or of one evaluation (val)."""

    def close(self) -> None:
        """Flushes."""


class JsonlSink:
    """`metrics.jsonl`: one line {"step", "split", name: value, …} each; appended when resumed."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Appends a line and flushes it: a killed run keeps its log. Infinities become null."""
        values = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars `train/loss`, `val/loss`, … for TensorBoard."""

    def __init__(self, directory: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Adds one point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class Log:
    """Sends metrics to the sinks of process 0 and remembers the last of each."""

    def __init__(self, sinks: Sequence[MetricSink]):
        self._sinks = sinks if jax.process_index() == 0 else ()
        self.last: dict[str, float] = {}

    def write(self, step: int, metrics: dict[str, float], split: Split) -> None:
        """Writes to every sink."""
        self.last.update({f"{split}/{name}": value for name, value in metrics.items()})
        for sink in self._sinks:
            sink.write(step, metrics, split)


class Watch:
    """Reads the metrics of a step after the next one is under way, so the device never waits.

    Writes means over `log_every` steps: of the steps that were not skipped, with their number.

    Args:
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
    ):
        self._log, self._log_every, self._max_bad = log, log_every, max_bad
        self._last_good = last_good
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._bad = 0
        self._since: list[dict[str, float]] = []
        self._read_up_to = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves everything before the next step out of the throughput."""
        self._began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads what is pending, and leaves what happens within out of the throughput."""
        self.flush()
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
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
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
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
        seconds = max(time.perf_counter() - self._began, 1e-9)
        good = [values for values in self._since if not values["skipped"]]
        means = {name: float(np.mean([v[name] for v in good])) for name in good[0]} if good else {}
        tokens_per_s = sum(v["n_tokens"] for v in self._since) / seconds
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
