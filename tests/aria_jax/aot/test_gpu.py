"""What stands in PTX and in the words of ptxas is read right, and GPUs are described as they are;
with jax's CUDA plug-in, programs compile for each of them.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from aria_jax.aot import GpuTopology, accelerator_run, gpus
from aria_jax.aot.gpu import (
    Kernel,
    compile_for_gpus,
    description,
    parse_ptxas,
    tensor_core_instructions,
)
from aria_jax.cli.main import main
from aria_jax.presets import CHIPS, chip_of
from data_pipeline.errors import UserError

TINY = ["--preset", "tiny", "d_model=256", "n_heads=4", "n_layers=3", "seq_len=256", "--json"]
PTX = """\
.version 8.7
.target sm_90a
.visible .entry dot_fusion(
\t.param .u64 dot_fusion_param_0
)
{
\twgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 \t{%f1,%f2}, %rd1, %rd2, %p1, 1, 1, 0, 0;
\t@%p3 wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 \t{%f1,%f2}, %rd1, %rd2, %p1, 1, 1;
\tmma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};
\tfma.rn.f32 \t%f3, %f1, %f2, %f3;
}
.visible .entry add(
)
{
\tadd.f32 %f1, %f2, %f3;
}
"""
PRINTED = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'dot_fusion' for 'sm_90a'
ptxas info    : Function properties for dot_fusion
    13712 bytes stack frame, 29236 bytes spill stores, 45620 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 16512 bytes smem
ptxas info    : Compile time = 12.557 ms
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'add' for 'sm_90a'
ptxas info    : Function properties for add
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""
KINDS = {
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16": 2,
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": 1,
}


def test_kernels_are_read_from_ptx_and_what_ptxas_prints():
    mma = tensor_core_instructions(PTX)
    assert mma == {"dot_fusion": KINDS, "add": {}}
    dot, add = parse_ptxas(PRINTED, mma)
    assert dot == Kernel("dot_fusion", 255, 13712, 29236, 45620, 16512, KINDS)
    assert dot.spills == 29236 + 45620 and dot.tensor_core
    assert add == Kernel("add", 16, 0, 0, 0, 0, {}) and not add.spills and not add.tensor_core


def test_topologies_are_hosts_of_gpus():
    assert GpuTopology.parse("h100:8") == GpuTopology("h100", 1, 8)
    assert GpuTopology.parse("2x h100:8") == GpuTopology("h100", 2, 8)
    for wrong in ("h100", "h100:0", "h99:8", "v5p:2x2", "2 h100:8", "0x h100:8", "h100:2x2"):
        with pytest.raises(UserError, match=r"h100:8 or .2x h100:8."):
            GpuTopology.parse(wrong)


def test_data_sheets_agree_with_themselves():
    for name, gpu in gpus().items():
        chip = CHIPS[name]
        assert chip_of(gpu["device"]) is chip
        # Tensor cores give 4 to 32 times what the float32 units do at the same clock.
        float32 = 2 * gpu["cores"] * gpu["fp32"] * gpu["clock_ghz"] * 1e9
        assert 1.9 < chip.flops / float32 < 33
        text = description(name)
        assert f"core_count: {gpu['cores']}\n" in text
        assert f"device_memory_size: {int(chip.hbm)}\n" in text
    assert chip_of("NVIDIA L40S") is None


@pytest.mark.aot_gpu
@pytest.mark.parametrize("name", list(gpus()))
def test_a_matrix_product_uses_tensor_cores_on_every_gpu(name):
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    made = compile_for_gpus(lambda a, b: jax.nn.silu(a @ b), x, x, topology=f"{name}:1")
    (kernel,) = [kernel for kernel in made.kernels if kernel.tensor_core]
    assert not kernel.spills and "bf16" in next(iter(kernel.mma))


def test_between_hosts_only_gradients_travel():
    mesh = accelerator_run("medium", "pretrain", "2x h100:4").mesh
    assert (mesh.data, mesh.fsdp) == (2, 4)
    assert accelerator_run("medium", "pretrain", "h100:1").compute.dtype == "bfloat16"


def test_layers_are_unrolled_on_gpus_and_a_loop_on_tpus():
    runs = {name: accelerator_run("medium", "pretrain", name) for name in ("h100:8", "v5p:2x2x1")}
    assert [run.compute.scan_layers for run in runs.values()] == [False, True]


@pytest.mark.aot_gpu
@pytest.mark.parametrize("topology", ["h100:8", "2x a100:4"])
def test_a_training_step_on_gpus(topology, capsys):
    assert main(["compile", "--topology", topology, *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chips"] == 8 and report["fits"] and 0 < report["mfu"] < report["mfu_full"] < 1
    assert report["collectives"].keys() >= {"all-gather", "all-reduce"}
    assert ("network" in report["links"]) == topology.startswith("2x")
    counted = (report["cost"]["flops"] + report["attention_flops"]) * 8
    assert report["model_flops"] < counted < 2 * report["model_flops"]
    assert sum(report["parts"].values()) == pytest.approx(report["seconds"])
    assert not any(kernel["mma"] for kernel in report["kernels"])  # products are cuBLAS'
    assert (report["xla_seconds"] is None) == ("a100" in topology)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("task", ["contrastive", "classify", "embed", "prefill", "decode"])
def test_every_task_on_a_gpu(task, capsys):
    assert main(["compile", "--topology", "h100:1", "--task", task, "global_batch=8", *TINY]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == task and report["cost"]["flops"] > 0 and report["seconds"] > 0
    assert not report["collectives"]
    if task == "contrastive":
        mine = [k for k in report["kernels"] if k["name"].startswith("contrastive_")]
        assert len(mine) == 2 and all(k["mma"] and not k["spill_stores"] for k in mine)


@pytest.mark.aot_gpu
def test_what_does_not_fit_a_gpu_exits_with_1(capsys):
    large = ["global_batch=4096", "seq_len=2048", "remat=none", "grad_accumulation=1"]
    assert main(["compile", "--topology", "l4:1", *TINY, *large]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
