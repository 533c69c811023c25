"""Where the metrics of a run go: files of its workdir, and trackers that others keep.

A tracker of another service begins with the first metrics. Where it fails after that, the run goes
on without it, with a warning. A run that is resumed goes on in the tracker's own run, whose name
there WORKDIR/trackers.json keeps.
"""

import importlib.util
import json
import math
import os
import re
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from aria_jax.config import RunConfig, Tracker, to_dict
from data_pipeline import storage
from data_pipeline.artifact import write_atomically
from data_pipeline.errors import UserError

Split = Literal["train", "val"]
NAMES = "trackers.json"
"""File of a workdir: what its run is called by each tracker."""
PROJECT = "aria-jax"
"""Project or experiment of a run, unless the tracker's own variable names one."""


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
        self._directory = directory
        self._writer: Any = None

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Adds one point to each curve."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._directory))
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """The same curves at Weights & Biases; WANDB_MODE=offline writes them to WORKDIR/wandb.

    Raises:
        UserError: nobody is logged in.
    """

    def __init__(self, config: RunConfig, workdir: Path):
        import wandb

        self._config, self._workdir = config, workdir
        self._run: Any = None
        self.errors = (wandb.Error, OSError)
        if os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
            try:
                wandb.login()
            except wandb.Error as error:
                raise UserError(
                    f"train.trackers: W&B lets nobody in ({error}); log in with `wandb login`, set "
                    "WANDB_API_KEY, or set WANDB_MODE=offline"
                ) from error

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Adds one point to each curve; steps that are done again are drawn again."""
        if self._run is None:
            self._run = self._begin()
        self._run.log({"step": step, **{f"{split}/{name}": v for name, v in metrics.items()}})

    def close(self) -> None:
        """Waits until all is sent, or written."""
        if self._run is not None:
            self._run.finish()

    def _begin(self) -> Any:
        import wandb

        name = known_as(self._workdir, "wandb") or remember(
            self._workdir, "wandb", uuid.uuid4().hex[:12]
        )
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=self._workdir.absolute().name,
            resume="allow",
            dir=self._workdir,
            config=to_dict(self._config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="step")
        return run


class MlflowSink:
    """The same curves in MLflow: at MLFLOW_TRACKING_URI, else in files, WORKDIR/mlruns."""

    def __init__(self, config: RunConfig, workdir: Path):
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "10")):  # all hosts wait meanwhile
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if place is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            place = (workdir.absolute() / "mlruns").as_uri()
        from mlflow import MlflowClient, MlflowException

        self._client = MlflowClient(place)
        self._config, self._workdir = config, workdir
        self._run_id = ""
        self._worker = ThreadPoolExecutor(1, "mlflow")  # no step waits for a server
        self._sent: list[Future[None]] = []
        self.errors = (MlflowException, OSError)

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Adds one point to each curve, in the background; raises what went wrong before."""
        self._check(wait=False)
        now = int(time.time() * 1000)
        points = [
            (re.sub(r"[^\w\-./ ]", "_", f"{split}/{name}"), value, now, step)
            for name, value in metrics.items()
        ]
        self._sent.append(self._worker.submit(self._send, points))

    def close(self) -> None:
        """Waits until all is there, and ends the run."""
        self._check(wait=True)
        self._worker.shutdown()
        if self._run_id:
            self._client.set_terminated(self._run_id)

    def _check(self, wait: bool) -> None:
        try:
            while self._sent and (wait or self._sent[0].done()):
                self._sent.pop(0).result()
        except Exception:
            self._worker.shutdown(wait=False, cancel_futures=True)
            raise

    def _send(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        self._run_id = self._run_id or self._begin()
        self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])

    def _begin(self) -> str:
        from mlflow import MlflowException
        from mlflow.entities import Param

        if (known := known_as(self._workdir, "mlflow")) is not None:
            try:
                self._client.update_run(known, status="RUNNING")
                return known
            except MlflowException:  # of another server, or removed there
                pass
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=self._workdir.absolute().name)
        settings = [
            Param(f"{section}.{key}" if key else section, str(value)[:500])
            for section, values in to_dict(self._config).items()
            for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        ]
        for first in range(0, len(settings), 100):  # MLflow takes no more at once
            self._client.log_batch(run.info.run_id, params=settings[first : first + 100])
        return remember(self._workdir, "mlflow", run.info.run_id)


class Forgiving:
    """A tracker without which a run goes on where it fails; it is warned of, once.

    Args:
        sink: has `errors`, those that are no faults of this program.
    """

    def __init__(self, name: Tracker, sink: "WandbSink | MlflowSink"):
        self._name, self._sink = name, sink
        self._failed = False

    def write(self, step: int, metrics: Mapping[str, float], split: Split) -> None:
        """Passes the metrics on, until that fails."""
        if not self._failed:
            self._try(lambda: self._sink.write(step, metrics, split))

    def close(self) -> None:
        """Closes the tracker, unless it failed."""
        if not self._failed:
            self._try(self._sink.close)

    def _try(self, do: Any) -> None:
        try:
            do()
        except self._sink.errors as error:
            self._failed = True
            reason = " ".join(str(error).split())[:160]
            warnings.warn(
                f"the tracker {self._name} failed and gets nothing more of this run ({reason})",
                stacklevel=3,
            )


def known_as(workdir: Path, tracker: Tracker) -> str | None:
    """What the run of a workdir is called by a tracker; None as long as it has no name there."""
    try:
        return json.loads((workdir / NAMES).read_text("utf-8")).get(tracker)
    except (OSError, ValueError):
        return None


def remember(workdir: Path, tracker: Tracker, name: str) -> str:
    """Keeps that name in the workdir, and returns it."""
    others = {each: known_as(workdir, each) for each in ("wandb", "mlflow")}
    text = json.dumps({each: value for each, value in {**others, tracker: name}.items() if value})
    write_atomically(workdir / NAMES, text)
    storage.upload(workdir / NAMES)
    return name


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises `UserError` for a tracker whose package is not there; imports nothing."""
    for name in names:
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers={','.join(names)}: {name} needs another package: "
                f"pip install 'aria-jax[{name}]'"
            )


def open_sinks(config: RunConfig, workdir: Path) -> list[MetricSink]:
    """The sinks that `config.train.trackers` names.

    Raises:
        UserError: a package is missing, or nobody is logged in.
    """
    names = tuple(dict.fromkeys(config.train.trackers))
    check_trackers(names)
    made: list[MetricSink] = []
    for name in sorted(names, key=("wandb", "mlflow", "jsonl", "tensorboard").index):
        if name == "jsonl":
            made.append(JsonlSink(workdir / "metrics.jsonl"))
        elif name == "tensorboard":
            made.append(TensorBoardSink(workdir / "tensorboard"))
        else:
            kind = WandbSink if name == "wandb" else MlflowSink
            made.append(Forgiving(name, kind(config, workdir)))
    return made


class Log:
    """Sends metrics to the sinks and remembers the last of each."""

    def __init__(self, sinks: Sequence[MetricSink]):
        self._sinks = sinks
        self.last: dict[str, float] = {}

    def write(self, step: int, metrics: dict[str, float], split: Split) -> None:
        """Writes to every sink."""
        self.last.update({f"{split}/{name}": value for name, value in metrics.items()})
        for sink in self._sinks:
            sink.write(step, metrics, split)
