"""A TPU pod that is only described."""

import os

import pytest


@pytest.fixture(scope="session")
def tpu_topology():
    """64 chips of TPU v5p, for ahead-of-time compilation."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-128")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"needs libtpu (pip install 'aria-jax[aot]'): {error}")
