"""A TPU pod that is only described."""

import pytest

from aria_jax.aot.environment import prepare


@pytest.fixture(scope="session")
def tpu_topology():
    """64 chips of TPU v5p, for ahead-of-time compilation."""
    prepare()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"needs libtpu (pip install 'aria-jax[aot]'): {error}")
