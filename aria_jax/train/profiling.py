"""A trace of a few steps, for XProf or TensorBoard's profile tab."""

from pathlib import Path
from typing import Any

import jax

WARM_UP_STEPS = 2  # the first compiles, the second may still fill caches
TRACED_STEPS = 5


class Profiler:
    """Traces steps `first + 2` to `first + 7` of a run into a folder; does nothing without one."""

    def __init__(self, folder: Path | None, first_step: int):
        self._folder = folder
        self._start = first_step + WARM_UP_STEPS
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def after(self, step: int, metrics: Any) -> None:
        """Told of each step; `metrics` are waited for so that the trace holds whole steps."""
        if self._folder is None:
            return
        if step == self._start:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._tracing and step >= self._start + TRACED_STEPS:
            jax.block_until_ready(metrics)
            self._stop()

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
