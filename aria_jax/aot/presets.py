"""How a run is computed on each family of TPU, found by compiling (docs/tpu.md).

Only memory and speed are settled here: the mesh, the number type, what is recomputed, and in how
many parts a batch is worked through. What is learned is the preset's.
"""

import dataclasses
import math

from aria_jax.config import ComputeConfig, MeshConfig, RunConfig
from aria_jax.presets import for_task
from data_pipeline.errors import UserError

TOKENS_AT_ONCE = {"v5p": 65_536, "v6e": 32_768, "v5e": 16_384}
"""Tokens of `medium` whose activations fit into a chip with remat "dots", the fastest that fits;
a power of two of the rows of 8,192."""
MOST_SHARDED = 64
"""Chips that share one copy of the weights; more of them hold further copies."""


def tuned(run: RunConfig, family: str, chips: int) -> RunConfig:
    """`run` as it is best computed on so many chips of a family of TPUs.

    A batch too large for the chips' memory is worked through in several parts; where even one row
    is too large, everything is recomputed.
    """
    m, medium = run.model, for_task("medium", "pretrain").model
    sharded = math.gcd(chips, MOST_SHARDED)
    rows = max(run.data.global_batch // chips, 1)
    views = 2 if run.task == "contrastive" else 1
    size = (m.d_model * m.n_layers) / (medium.d_model * medium.n_layers)
    at_once = TOKENS_AT_ONCE[family] / size / (run.data.seq_len * views)  # rows
    parts = next((n for n in _divisors(rows) if rows / n <= at_once), rows)
    return dataclasses.replace(
        run,
        compute=ComputeConfig(
            dtype="bfloat16", remat="dots" if rows / parts <= at_once else "full"
        ),
        mesh=MeshConfig(data=chips // sharded, fsdp=sharded),
        train=dataclasses.replace(run.train, grad_accumulation=parts),
    )


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
    return tuned(run, family, chips)


def chip_count(topology: str) -> int:
    """Chips of e.g. "v5p:4x4x4"."""
    sides = topology.partition(":")[2].split("x")
    if not all(side.isdigit() and int(side) for side in sides):
        raise UserError(wrong_topology(topology))
    return math.prod(map(int, sides))


def wrong_topology(topology: str) -> str:
    """What to say about a topology that is none."""
    return f"topology {topology!r}: expected e.g. v5p:4x4x4, v5e:8x8 or v6e:16x16"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
