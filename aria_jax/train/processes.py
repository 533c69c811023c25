"""Joining the processes of one run, as started by `launch` or by a cluster's own scripts."""

import os

import jax

from data_pipeline.errors import UserError

# What a launcher sets for each process; see launch/local.py and launch/cluster.py.
COORDINATOR, COUNT, INDEX = (
    "ARIA_JAX_COORDINATOR",
    "ARIA_JAX_PROCESS_COUNT",
    "ARIA_JAX_PROCESS_INDEX",
)
AUTO = "auto"
"""As coordinator: jax asks the cluster (Cloud TPU, GKE, SLURM, Open MPI) who the others are."""

HEARTBEAT_TIMEOUT_S = 60
"""A process that is silent for so long is dead, and the others end with an error."""


def join_processes() -> int:
    """Connects this process to the others where the environment names a coordinator.

    Returns:
        The index of this process among them; 0 where it is alone.

    Raises:
        UserError: only some of the three variables are set, or not to numbers.
    """
    if os.environ.get(COORDINATOR) == AUTO:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
        return jax.process_index()
    values = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    if not any(values.values()):
        return 0
    if not all(values.values()):
        missing = ", ".join(name for name, value in values.items() if not value)
        raise UserError(f"a run of several processes needs {missing} too")
    try:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except ValueError:
        raise UserError(f"{COUNT} and {INDEX} must be numbers") from None
    jax.distributed.initialize(
        os.environ[COORDINATOR], count, index, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )
    return index
