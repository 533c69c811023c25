"""A TPU pod that is only described."""

import pytest

from tests.topologies import described


@pytest.fixture(scope="session")
def tpu_topology():
    """64 chips of TPU v5p, for ahead-of-time compilation."""
    return described("v5p:4x4x4")
