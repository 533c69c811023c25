"""Two real processes restore the same step, whichever of them cannot read the newest."""

import os
import subprocess
import sys

import pytest

from launch.local import environments, free_port
from tests.aria_jax.checkpoints.test_manager import write

PROGRAM = """
import sys, warnings
import jax, orbax.checkpoint as ocp
from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.train.processes import join_processes

index = join_processes()
from aria_jax.config import MeshConfig
from aria_jax.sharding import make_mesh, replicated
from tests.aria_jax.checkpoints.test_manager import read

sharding = replicated(make_mesh(MeshConfig()))
failing, error = int(sys.argv[2]), sys.argv[3]
whole = ocp.StandardCheckpointHandler.restore

def restore(self, directory, *args, **kwargs):
    if index == failing and "/4/" in str(directory):
        raise ValueError(error)
    return whole(self, directory, *args, **kwargs)

ocp.StandardCheckpointHandler.restore = restore
warnings.simplefilter("ignore")
checkpointer = Checkpointer(sys.argv[1])
try:
    step, _ = checkpointer.newest(lambda step: read(checkpointer, step, sharding))
    print("step", step, flush=True)
except Exception as failure:
    print(type(failure).__name__, failure, flush=True)
    checkpointer.close()
    sys.exit(1)
checkpointer.close()
"""


def restored(workdir, failing, error):
    """What each of two processes says."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(workdir), str(failing), error],
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in environments(2, free_port())
    ]
    told = [process.communicate(timeout=120) for process in processes]
    return [(out.strip() or err).splitlines()[-1] for out, err in told]


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_damage_that_one_process_sees_makes_both_go_back(tmp_path, failing):
    write(tmp_path, 2, 4)
    assert restored(tmp_path, failing, "DATA_LOSS: checksum") == ["step 2"] * 2
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["2", "4.damaged"]


def test_an_error_of_one_process_ends_both(tmp_path):
    write(tmp_path, 2, 4)
    told = restored(tmp_path, 1, "RESOURCE_EXHAUSTED: Out of memory")
    assert told[0] == "UserError process 1 cannot read checkpoint 4; see what it says"
    assert "not enough memory" in told[1]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["2", "4"]
