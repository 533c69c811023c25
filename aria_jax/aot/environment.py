"""What the TPU compiler wants to find in the environment of a machine without TPUs."""

import os
from pathlib import Path

_SETTINGS = {
    # No search for chips or for other hosts of a pod, and several compilers at once.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-128",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def prepare(dump: Path | None = None) -> None:
    """Sets it, before jax is imported.

    Args:
        dump: a folder that the compiler writes its schedules into.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if dump is not None:
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        dumping = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {dumping}".strip()
