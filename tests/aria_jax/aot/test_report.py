"""Compiles tiny programs for TPU topologies; needs the compiler of the package libtpu."""

import dataclasses
import json

import pytest

from aria_jax.aot.presets import accelerator_run, chip_count
from aria_jax.aot.programs import with_layers
from aria_jax.aot.report import Cost
from aria_jax.cli.main import main
from data_pipeline.errors import UserError

TINY = ["--preset", "tiny", "d_model=256", "n_heads=2", "n_layers=3", "seq_len=256", "--json"]


def test_layers_are_extrapolated_from_one_and_two():
    one, two = Cost(10.0, 100.0, 1.0), Cost(13.0, 120.0, 1.5)
    assert one.repeated(two, 4, 2) == Cost(2 * 19.0, 2 * 160.0, 2 * 2.5)
    assert one.repeated(dataclasses.replace(two, seconds=None), 4, 1).seconds is None


def test_fewer_layers_are_unrolled():
    config = accelerator_run("medium", "pretrain", "v5p:4x4x4")
    cut = with_layers(config, 2)
    assert cut.model.n_layers == 2 and not cut.compute.scan_layers
    assert config.mesh.fsdp == -1 and config.data.global_batch == 512


def test_topologies_are_parsed():
    assert chip_count("v5p:4x4x4") == 64 and chip_count("v5e:16x16") == 256
    with pytest.raises(UserError, match=r"expected e\.g"):
        chip_count("v5p")


def test_an_unknown_family_is_a_user_error(capsys):
    assert main(["compile", "--topology", "v9:2x2", *TINY]) == 2
    assert "expected e.g. v5p:4x4x4" in capsys.readouterr().err


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_training_step_on_every_family(topology, capsys):
    assert main(["compile", "--topology", topology, *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chips"] == 4 and report["mesh"]["fsdp"] == 4
    assert 0 < report["memory"]["total"] < report["hbm"]
    assert 0 < report["mfu"] < 1
    assert report["collectives"]["all-gather"][0] > 0, "sharded weights must be gathered"
    assert report["attention_flops"] > 0
    # Everything but the attention kernel and recomputation is in the compiler's count.
    counted = (report["cost"]["flops"] + report["attention_flops"]) * 4
    assert report["model_flops"] < counted < 2 * report["model_flops"]


@pytest.mark.aot
@pytest.mark.parametrize("task", ["contrastive", "classify", "embed", "prefill", "decode"])
def test_every_task(task, capsys):
    mesh = ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=4"] if task in ("prefill", "decode") else []
    arguments = ["--task", task, "global_batch=8", *mesh]
    assert main(["compile", "--topology", "v5e:2x2", *TINY, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == task and report["fits"] and report["cost"]["flops"] > 0


@pytest.mark.aot
def test_what_does_not_fit_exits_with_1(capsys):
    large = ["global_batch=4096", "seq_len=2048", "remat=none"]
    assert main(["compile", "--topology", "v5e:2x2", *TINY, *large]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
