"""The plan of a run against numbers one can do by hand, and against the arrays themselves."""

import dataclasses

import jax
import pytest

from aria_jax.config import MeshConfig, with_overrides
from aria_jax.models.heads import abstract_model, split_model
from aria_jax.presets import CHIPS, chip_of, for_task
from aria_jax.train.plan import forward_flops_per_token, plan
from data_pipeline.errors import UserError

MEDIUM = with_overrides(
    for_task("medium", "pretrain"), ["steps=1000", "dtype=bfloat16", "remat=full"]
)


def planned(config, n_devices=64, chip="v5p", **options):
    return plan(config, n_examples=10_000, n_devices=n_devices, chip=CHIPS[chip], **options)


def test_parameters_are_those_of_the_model():
    for task in ("pretrain", "contrastive"):
        config = for_task("small", task)
        params = split_model(abstract_model(config.model, config.compute))[1]
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert planned(config, 8).parameters == count


def test_flops_follow_six_n_plus_attention():
    parts = forward_flops_per_token(MEDIUM.model, 8192)
    d = 1536
    assert parts["blocks"] == 2 * 16 * (4 * d * d + 3 * d * 4 * d)
    assert parts["attention"] == 16 * 2 * 8192 * d  # half of 2 · 2 · L · d
    assert parts["head"] == 2 * d * 17_727
    assert planned(MEDIUM).flops_per_token == 3 * sum(parts.values())


def test_memory_divides_over_the_mesh_and_hours_over_the_chips():
    sharded = dataclasses.replace(MEDIUM, mesh=MeshConfig(1, 64, 1))
    whole, cut = planned(MEDIUM), planned(sharded)
    assert cut.memory["optimizer"] < whole.memory["optimizer"] / 50  # norms stay whole
    assert cut.memory["parameters"] * 2 < cut.memory["optimizer"] * 1.01
    assert planned(sharded, assumed_mfu=0.2).hours == pytest.approx(2 * cut.hours)
    tokens = 1000 * 512 * 8192
    assert cut.tokens == tokens
    expected = tokens * cut.flops_per_token / (64 * 459e12 * 0.4) / 3600
    assert cut.hours == pytest.approx(expected)
    assert cut.epochs == pytest.approx(51.2)


def test_logits_of_a_gpu_are_of_the_larger_chunk():
    """The vocabulary loss works on 4,096 tokens at a time there, 1,024 elsewhere, float32 twice."""
    config = with_overrides(MEDIUM, ["global_batch=64"])  # a row of 8,192 tokens each
    gpu, tpu = (planned(config, chip=chip).memory["activations"] for chip in ("h100", "v5p"))
    assert gpu - tpu == (4096 - 1024) * 17_727 * 4 * 2


def test_a_mesh_that_does_not_fit_the_devices_is_a_user_error():
    with pytest.raises(UserError, match="do not multiply to 64 devices"):
        planned(dataclasses.replace(MEDIUM, mesh=MeshConfig(3, 64, 1)))


def test_moving_average_costs_a_copy():
    base = dataclasses.replace(MEDIUM, mesh=MeshConfig(1, 64, 1))
    with_ema = with_overrides(base, ["ema_decay=0.99"])
    extra = planned(with_ema).memory["optimizer"] - planned(base).memory["optimizer"]
    assert extra == planned(base).memory["parameters"]


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", None)],
)  # fmt: skip
def test_chips_by_the_name_jax_gives_them(kind, name):
    assert chip_of(kind) == (CHIPS[name] if name else None)
