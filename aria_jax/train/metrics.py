"""Where a run's numbers go."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

Split = Literal["train", "val"]


class MetricSink(Protocol):
    """Takes metrics as they come; `close` once at the end."""

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Takes the metrics of one step (train) or one evaluation (val)."""

    def close(self) -> None:
        """Flushes."""


class JsonlSink:
    """`metrics.jsonl`: one line {"step", "split", name: value, …} each; appended when resumed."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Appends a line and flushes it: a killed run keeps its log."""
        self._file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
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
