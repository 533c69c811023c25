"""Where the metrics of a run go."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TextIO

import jax

Split = Literal["train", "val"]


class MetricSink(Protocol):
    """Takes metrics as they come; `close` once at the end."""

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Takes the metrics of some steps (train) or of one evaluation (val)."""

    def close(self) -> None:
        """Flushes."""


class JsonlSink:
    """`metrics.jsonl`: one line {"step", "split", name: value, …} each; appended when resumed.

    The file and its folder are made for the first line.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Appends a line and flushes it: a killed run keeps its log. Infinities become null."""
        values = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
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
