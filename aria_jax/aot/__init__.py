"""Compiling for TPUs and GPUs that are not here: their names, a preset's run on them, the
environment.
"""

import dataclasses
import functools
import math
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from aria_jax.config import RunConfig
from aria_jax.presets import TOKENS_AT_ONCE, for_hardware, for_task
from data_pipeline.errors import UserError

_SETTINGS = {
    # No search for chips or for other hosts of a pod, and several compilers at once.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-128",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}
MEASURED = {
    "a100": (0.79, 0.98),
    "h100": (0.62, 0.90),
    "v5e": (1.42, 1.42),
    "v5p": (0.51, 0.91),
    "v6e": (1.34, 1.34),
}
"""Estimated over measured time of public runs on such chips, least and most: `make calibrate`, and
the tables of docs/tpu.md and docs/gpu.md. Estimates for other chips were held against nothing."""
_GPUS = re.compile(r"(?:(\d+)x )?([a-z0-9]+):(\d+)")


def prepare() -> None:
    """Sets the environment in which compilers work without chips, before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def accelerator_run(preset: str, task: str, topology: str) -> RunConfig:
    """The run of a preset on a topology, with a batch that divides over its chips.

    Raises:
        UserError: an unknown preset, or a topology that is neither FAMILY:AxB[xC] of TPUs nor
            [HOSTSx ]FAMILY:N of GPUs.
    """
    chips, asked = chip_count(topology), None
    family = topology.partition(":")[0]
    if is_gpu(topology):
        asked = GpuTopology.parse(topology)
        family = asked.family
    elif family not in TOKENS_AT_ONCE:
        raise UserError(wrong_topology(topology))
    run = for_task(preset, task)  # type: ignore[arg-type]
    batch = -(-run.data.global_batch // chips) * chips
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, global_batch=batch))
    return for_hardware(run, family, chips, per_host=asked.gpus if asked else None)


def chip_count(topology: str) -> int:
    """Chips of e.g. "v5p:4x4x4" or "2x h100:8"."""
    if is_gpu(topology):
        asked = GpuTopology.parse(topology)
        return asked.hosts * asked.gpus
    sides = topology.partition(":")[2].split("x")
    if not all(side.isdigit() and int(side) for side in sides):
        raise UserError(wrong_topology(topology))
    return math.prod(map(int, sides))


def described_devices(asked: str, install: str, **options: Any) -> list[Any]:
    """The devices of a topology that is not here.

    Args:
        asked: its name, for messages.
        install: what to say about a compiler that is missing.
        options: of jax's `get_topology_desc`.

    Raises:
        UserError: an unknown topology, or a missing compiler.
    """
    from jax.experimental import topologies  # not before `prepare`

    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # plug-ins raise whatever they like
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot describe topology {asked!r} ({reason}); {install}") from error


def measured_band(family: str, seconds: float | None) -> tuple[tuple[float, float] | None, str]:
    """Between which seconds an estimate may lie, by what such ones were of measured runs.

    Returns:
        (least, most), None where nothing was measured; and that in words.
    """
    if seconds is None or family not in MEASURED:
        return None, "none: estimates for such chips were held against no measured run"
    least, most = MEASURED[family]
    words = (
        f"estimates were {least:.2f} to {most:.2f} times the time that public runs on such chips "
        "measured (make calibrate)"
    )
    return (seconds / most, seconds / least), words


def wrong_topology(topology: str) -> str:
    """What to say about a topology that is none."""
    return (
        f"topology {topology!r}: expected e.g. v5p:4x4x4, v5e:8x8 or v6e:16x16 (TPUs), h100:8 or "
        f"'2x h100:8' (GPUs: {', '.join(gpus())})"
    )


def is_gpu(topology: str) -> bool:
    """Whether a topology names GPUs."""
    return topology.partition(":")[0].rpartition(" ")[2] in gpus()


@dataclass(frozen=True)
class GpuTopology:
    """Hosts with the same number of the same GPU.

    Attributes:
        family: a name of `gpus()`.
    """

    family: str
    hosts: int
    gpus: int

    @classmethod
    def parse(cls, topology: str) -> "GpuTopology":
        """Of "h100:8" (one host) or "2x h100:8".

        Raises:
            UserError: another form, or a GPU of which no data sheet is here.
        """
        match = _GPUS.fullmatch(topology.strip())
        if match is None or match[2] not in gpus() or 0 in (int(match[3]), int(match[1] or 1)):
            raise UserError(wrong_topology(topology))
        return cls(match[2], int(match[1] or 1), int(match[3]))


@functools.cache
def gpus() -> dict[str, dict[str, Any]]:
    """What `gpus.toml` says of each GPU, limits of its compute capability included."""
    sheets = tomllib.loads(resources.files(__package__).joinpath("gpus.toml").read_text())
    limits = sheets.pop("capability")
    return {name: {**limits[sheet["capability"]], **sheet} for name, sheet in sheets.items()}
