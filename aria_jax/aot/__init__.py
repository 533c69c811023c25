"""Compiling for TPUs that are not here: their names, a preset's run on them, the environment."""

import dataclasses
import math
import os

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


def prepare() -> None:
    """Sets the environment in which the TPU compiler works without TPUs, before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def accelerator_run(preset: str, task: str, topology: str) -> RunConfig:
    """The run of a preset on a topology, with a batch that divides over its chips.

    Raises:
        UserError: an unknown preset, or a topology that is not of the form FAMILY:AxB[xC].
    """
    family, chips = topology.partition(":")[0], chip_count(topology)
    if family not in TOKENS_AT_ONCE:
        raise UserError(wrong_topology(topology))
    run = for_task(preset, task)  # type: ignore[arg-type]
    batch = -(-run.data.global_batch // chips) * chips
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, global_batch=batch))
    return for_hardware(run, family, chips)


def chip_count(topology: str) -> int:
    """Chips of e.g. "v5p:4x4x4"."""
    sides = topology.partition(":")[2].split("x")
    if not all(side.isdigit() and int(side) for side in sides):
        raise UserError(wrong_topology(topology))
    return math.prod(map(int, sides))


def wrong_topology(topology: str) -> str:
    """What to say about a topology that is none."""
    return f"topology {topology!r}: expected e.g. v5p:4x4x4, v5e:8x8 or v6e:16x16"
