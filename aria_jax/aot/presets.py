"""The settings that compile well on each family of chips (docs/tpu.md says how they were found)."""

import dataclasses

from aria_jax.config import ComputeConfig, MeshConfig, RunConfig, for_task
from data_pipeline.errors import UserError


def accelerator_run(preset: str, task: str, topology: str) -> RunConfig:
    """The run of a preset on a topology: bfloat16, one batch row or more a chip, fully sharded.

    Raises:
        UserError: an unknown preset, or a topology that is not of the form FAMILY:AxB[xC].
    """
    chips = chip_count(topology)
    run = for_task(preset, task)  # type: ignore[arg-type]
    rows = max(run.data.global_batch, chips)
    return dataclasses.replace(
        run,
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1) if chips <= 64 else MeshConfig(data=-1, fsdp=64),
        data=dataclasses.replace(run.data, global_batch=-(-rows // chips) * chips),
    )


def chip_count(topology: str) -> int:
    """Chips of e.g. "v5p:4x4x4"."""
    sides = topology.partition(":")[2].split("x")
    if not all(side.isdigit() and int(side) for side in sides):
        raise UserError(f"topology {topology!r}: expected e.g. v5p:4x4x4, v5e:8x8 or v6e:16x16")
    count = 1
    for side in sides:
        count *= int(side)
    return count
