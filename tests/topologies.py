"""TPU pods that are only described, for ahead-of-time compilation."""

import pytest

from aria_jax.aot import prepare


def described(name: str, **options):
    """The topology of that name; skips the test where libtpu is missing."""
    prepare()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"needs libtpu (pip install 'aria-jax[aot]'): {error}")
