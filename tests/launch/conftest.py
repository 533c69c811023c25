"""A wheel for the launchers to install, without building one."""

import pytest


@pytest.fixture(autouse=True)
def wheel(tmp_path, monkeypatch):
    """What `make wheel` leaves behind."""
    monkeypatch.setattr("launch.cluster.WHEELS", tmp_path / "it's dist")
    (tmp_path / "it's dist").mkdir()
    made = tmp_path / "it's dist" / "aria_jax-0.1.0-py3-none-any.whl"
    made.touch()
    return made
