"""Compiles tiny programs for TPU topologies; needs the compiler of the package libtpu."""

import dataclasses
import json

import jax
import pytest

from aria_jax.aot import MEASURED, accelerator_run, chip_count, measured_band
from aria_jax.aot.programs import (
    ATTENTION_EFFICIENCY,
    Program,
    attention_efficiency,
    uncounted_loss_flops,
    with_layers,
)
from aria_jax.aot.report import Cost
from aria_jax.cli.main import main
from aria_jax.config import DataConfig, MeshConfig, ModelConfig, with_overrides
from aria_jax.losses.cross_entropy import CHUNK_TOKENS
from aria_jax.models import parameter_count
from aria_jax.models.heads import parameter_specs
from aria_jax.presets import CHIPS, TOKENS_AT_ONCE, for_hardware, for_task
from aria_jax.sharding import make_mesh
from benchmarks.calibrate import CASES
from data_pipeline.errors import UserError

TINY = ["--preset", "tiny", "d_model=256", "n_heads=2", "n_layers=3", "seq_len=256", "--json"]


def test_layers_are_extrapolated_from_one_and_two():
    one, two = Cost(10.0, 100.0, 1.0, 3.0), Cost(13.0, 120.0, 1.5, 5.0)
    assert one.repeated(two, 4, 2) == Cost(2 * 19.0, 2 * 160.0, 2 * 2.5, 2 * 9.0)
    assert one.repeated(dataclasses.replace(two, seconds=None), 4, 1).seconds is None


def test_flops_of_loops_bring_bytes_and_time_in_proportion():
    assert Cost(10.0, 100.0, 1.0, 2.0).with_flops(5.0) == Cost(15.0, 150.0, 1.5, 3.0)
    assert Cost(10.0, 100.0, None, 2.0).with_flops(5.0).seconds is None


def test_fewer_layers_are_unrolled():
    config = accelerator_run("medium", "pretrain", "v5p:4x4x4")
    cut = with_layers(config, 2)
    assert cut.model.n_layers == 2 and not cut.compute.scan_layers


def test_all_chunks_of_the_loss_but_one_are_added():
    config = accelerator_run("medium", "pretrain", "v5p:4x4x4")
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    made = Program(None, (), tokens=4 * CHUNK_TOKENS, training=True)
    one_chunk = 3 * 2 * 1536 * 17_727 * CHUNK_TOKENS
    config = with_overrides(config, ["grad_accumulation=1"])
    assert uncounted_loss_flops(config, "pretrain", made, mesh) == pytest.approx(3 * one_chunk)
    # In two parts of two chunks each, one of every part is counted already.
    parts = with_overrides(config, ["grad_accumulation=2"])
    assert uncounted_loss_flops(parts, "pretrain", made, mesh) == pytest.approx(2 * one_chunk)
    assert uncounted_loss_flops(config, "contrastive", made, mesh) == 0


def test_narrow_heads_leave_matrix_units_idle():
    v5p, v6e = CHIPS["v5p"], CHIPS["v6e"]
    assert attention_efficiency(128, v5p) == ATTENTION_EFFICIENCY
    assert attention_efficiency(64, v5p) == ATTENTION_EFFICIENCY / 2
    assert attention_efficiency(64, v6e) == ATTENTION_EFFICIENCY / 4


@pytest.mark.parametrize("family", TOKENS_AT_ONCE)
@pytest.mark.parametrize("chips", [1, 4, 64, 256])
@pytest.mark.parametrize("task", ["pretrain", "contrastive"])
def test_runs_for_hardware_divide_over_the_chips(family, chips, task):
    run = dataclasses.replace(
        for_task("medium", task), data=DataConfig(seq_len=8192, global_batch=512)
    )
    made = for_hardware(run, family, chips)
    assert not made.problems()
    assert made.mesh.data * made.mesh.fsdp == chips and made.mesh.fsdp <= 64
    assert made.compute.dtype == "bfloat16"
    # What is learned is not touched.
    assert (made.data, made.optimizer, made.model) == (run.data, run.optimizer, run.model)
    rows, views = 512 // made.train.grad_accumulation, 2 if task == "contrastive" else 1
    assert rows % chips == 0
    one_row_fits = views * 8192 <= TOKENS_AT_ONCE[family]
    assert made.compute.remat == ("dots" if one_row_fits else "full")
    assert rows // chips * views * 8192 <= TOKENS_AT_ONCE[family] or rows == chips


def test_small_models_need_fewer_parts():
    small = for_hardware(for_task("small", "pretrain"), "v5e", 1)
    assert small.train.grad_accumulation == 1 and small.compute.remat == "dots"


def test_topologies_are_parsed():
    assert chip_count("v5p:4x4x4") == 64 and chip_count("v5e:16x16") == 256
    with pytest.raises(UserError, match=r"expected e\.g"):
        chip_count("v5p")


def test_an_unknown_family_is_a_user_error(capsys):
    assert main(["compile", "--topology", "v9:2x2", *TINY]) == 2
    assert "expected e.g. v5p:4x4x4" in capsys.readouterr().err


def test_published_runs_are_the_shapes_that_they_say():
    published = {"marin 837M": (837_003_904, 1e-4), "maxtext Llama 2 7B": (6.74e9, 0.1)}
    for name, (parameters, within) in published.items():
        model = next(case for case in CASES if case.name == name).config().model
        found = parameter_count(parameter_specs(model))
        assert found == pytest.approx(parameters, rel=within)
    for case in CASES:
        config = case.config()
        assert not dataclasses.replace(config, model=ModelConfig()).problems()
        assert chip_count(case.topology) % (config.mesh.fsdp * config.mesh.tensor) == 0


def test_a_band_stands_where_something_was_measured():
    assert {case.topology.partition(":")[0] for case in CASES} >= MEASURED.keys()
    least, most = MEASURED["h100"]
    band, words = measured_band("h100", 10.0)
    assert band == (10 / most, 10 / least) and f"{least:.2f} to {most:.2f}" in words
    assert measured_band("b200", 10.0)[0] is None and measured_band("h100", None)[0] is None


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_training_step_on_every_family(topology, capsys):
    assert main(["compile", "--topology", topology, *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chips"] == 4 and report["mesh"]["fsdp"] == 4
    assert 0 < report["memory"]["total"] < report["hbm"]
    assert 0 < report["mfu"] < 1
    # Some compilers gather weights by adding up zeros.
    gathered = report["collectives"].keys() & {"all-gather", "all-reduce"}
    assert gathered, "sharded weights must be gathered"
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
