"""The best weights: every process of a run must decide alike, whatever the disk shows by then."""

import jax.numpy as jnp
import pytest

from aria_jax.checkpoints.manager import Checkpointer
from aria_jax.train import loop


@pytest.fixture
def saved(monkeypatch):
    """Steps for which a save was begun, in order; each is really written."""
    begun = []
    real = Checkpointer.save

    def save(self, step, *args, **options):
        begun.append(step)
        real(self, step, *args, **options)

    monkeypatch.setattr(loop.Checkpointer, "save", save)
    return begun


def offer(best, step, loss):
    best.offer(step, loss, {"w": jnp.ones(2)}, {})


def test_a_slower_process_decides_as_if_the_faster_had_written_nothing(saved, tmp_path):
    # Two processes begin on an empty folder; the first has written before the second looks.
    faster, slower = loop._Best(tmp_path), loop._Best(tmp_path)
    offer(faster, 1, 2.0)
    offer(slower, 1, 2.0)
    assert saved == [1, 1], "a save is a barrier: both processes must begin it"


def test_only_a_better_loss_is_kept_also_by_a_resumed_run(saved, tmp_path):
    best = loop._Best(tmp_path)
    for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0)):
        offer(best, step, loss)
    assert saved == [1, 3]
    resumed = loop._Best(tmp_path)
    offer(resumed, 4, 1.5)
    offer(resumed, 5, 0.5)
    assert saved == [1, 3, 5]
