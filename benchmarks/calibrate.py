"""Estimates of `aria_jax.aot` held against public training runs that were measured.

    python -m benchmarks.calibrate gpu [NAME ...]       # in an environment with jax's CUDA plug-in
    python -m benchmarks.calibrate tpu [NAME ...]       # in one with libtpu

Each case is a published run: its chips, its shape, how it was sharded and what it recomputed, and
the MFU that was measured, all scores of attention counted. Our program of that shape is compiled
for those chips; the estimated time over the measured one, for the same FLOPs, is the ratio of the
MFUs. What differs from our program (key heads, feed-forward width, framework) stands beside.

Prints a Markdown table (docs/gpu.md, docs/tpu.md) and, as a last line, the ratios as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aria_jax.aot import is_gpu, prepare
from aria_jax.config import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from aria_jax.presets import CHIPS

COLUMNS = (
    "run", "chips", "MFU measured", "MFU estimated", "estimate / measured time", "differs in",
)  # fmt: skip

MARIN = "marin-community/marin experiments/speedrun"
MAXTEXT = "AI-Hypercomputer/maxtext"
FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking"


@dataclass(frozen=True)
class Case:
    """A run that somebody measured.

    Attributes:
        shape: d_model, heads, layers, feed-forward width in d_model, vocabulary.
        rows: sequences of one step; parts: of gradient accumulation.
        mesh: fsdp, tensor; the data axis takes what is left.
        mfu: measured, all scores counted, of the chips' dense peak in bfloat16.
        differs: from our program.
    """

    name: str
    topology: str
    shape: tuple[int, int, int, int, int]
    seq_len: int
    rows: int
    mesh: tuple[int, int]
    remat: Literal["none", "dots", "full"]
    mfu: float
    source: str
    differs: str
    parts: int = 1

    def config(self) -> RunConfig:
        """Our run of that shape."""
        d_model, n_heads, n_layers, ff_mult, vocab = self.shape
        fsdp, tensor = self.mesh
        return RunConfig(
            task="pretrain",
            model=ModelConfig(d_model, n_heads, n_layers, ff_mult, self.seq_len, vocab),
            data=DataConfig(seq_len=self.seq_len, global_batch=self.rows),
            compute=ComputeConfig(dtype="bfloat16", remat=self.remat),
            mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
            train=TrainConfig(grad_accumulation=self.parts),
        )


def _mpt(name: str, gpu: str, seq_len: int, rows: int, parts: int, mfu: float) -> Case:
    """A row of llm-foundry's table, 8 GPUs, PyTorch FSDP without activation checkpointing.

    MPT's two matrices of a feed-forward layer, 4 wide, are as many weights as 8/3 of our three.
    """
    shape = {
        "760m": (1536, 12, 24, 3, 50_368),
        "1b": (2048, 16, 24, 3, 50_368),
        "3b": (2560, 20, 32, 3, 50_368),
        "7b": (4096, 32, 32, 3, 50_432),
    }[name]
    return Case(
        f"llm-foundry {name}, {seq_len:,}", f"{gpu}:8", shape, seq_len, rows, (8, 1), "none", mfu,
        FOUNDRY, "PyTorch 1.13 to 2.0 of 2023, Triton's attention; feed-forward of two matrices",
        parts,
    )  # fmt: skip


CASES = (
    # Levanter: training_time includes evaluation; 8.34e19 and 4.21e19 model FLOPs, 16 chips.
    Case("marin 837M", "v5p:2x2x4", (1408, 11, 15, 4, 128_256), 4096, 256, (16, 1), "full", 0.444,
         f"{MARIN}/c-adamc_llama_scaling/800m", "evaluation is within the measured time"),
    Case("marin 602M", "v5p:2x2x4", (1024, 16, 24, 4, 128_256), 4096, 256, (16, 1), "full", 0.306,
         f"{MARIN}/adamw_llama_scaling/520m",
         "evaluation is within the measured time; 8 key heads; feed-forward 3.5 wide"),
    Case("maxtext Llama 3.1 8B", "v6e:2x4", (4096, 32, 32, 4, 128_256), 8192, 24, (8, 1), "full",
         0.4546, f"{MAXTEXT} docs/reference/models/tiering.md (v6e-256; v6e-8: 416.6 TFLOP/s)",
         "8 key heads; feed-forward 3.5 wide; queries, keys and values offloaded to the host"),
    Case("maxtext 32B", "v5p:4x4x4", (8192, 64, 32, 4, 32_000), 2048, 448, (16, 4), "dots",
         0.7147, f"{MAXTEXT} MaxText/configs/v5p/32b.sh", "feed-forward 3.5 wide"),
    Case("maxtext 32B", "v5e:16x16", (8192, 64, 32, 4, 32_000), 2048, 1024, (256, 1), "full",
         0.6686, f"{MAXTEXT} MaxText/configs/v5e/32b.sh", "feed-forward 3.5 wide"),
    # XLA for GPUs with cuDNN's attention, as here.
    Case("maxtext Llama 2 7B", "h100:8", (4096, 32, 32, 3, 32_000), 4096, 32, (8, 1), "dots",
         492 / 989, f"{MAXTEXT} MaxText/configs/a3/llama_2_7b", "feed-forward 2.69 wide"),
    _mpt("760m", "h100", 8192, 96, 2, 0.3484),
    _mpt("760m", "h100", 2048, 384, 2, 0.3490),
    _mpt("1b", "h100", 8192, 96, 4, 0.3773),
    _mpt("3b", "h100", 8192, 144, 6, 0.4031),
    _mpt("7b", "h100", 2048, 48, 1, 0.4644),
    _mpt("760m", "a100", 8192, 96, 2, 0.5531),
    _mpt("760m", "a100", 2048, 384, 2, 0.5685),
    _mpt("3b", "a100", 8192, 144, 6, 0.5934),
    _mpt("7b", "a100", 2048, 96, 2, 0.6423),
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """A case with its estimate; MFU of all scores, and of those that causality shows."""

    case: Case
    seconds: float
    mfu: float
    causal: float
    took: float

    @property
    def ratio(self) -> float:
        """Estimated over measured time, for the same FLOPs."""
        return self.case.mfu / self.mfu

    def row(self) -> str:
        """Of the table."""
        visible = self.causal / self.mfu
        cells = (
            self.case.name,
            self.case.topology,
            f"{self.case.mfu:.1%} ({self.case.mfu * visible:.1%})",
            f"{self.mfu:.1%} ({self.causal:.1%})",
            f"{self.ratio:.2f}",
            self.case.differs,
        )
        return f"| {' | '.join(cells)} |"


def held(case: Case) -> Held:
    """Compiles a case and estimates its time; whether it fits is not asked."""
    from aria_jax.aot.programs import needed_flops, program
    from aria_jax.aot.report import (
        compile_report,
        estimated_seconds,
        program_cost,
        splash_flops,
        topology_mesh,
    )

    began, config = time.perf_counter(), case.config()
    chip = CHIPS[case.topology.partition(":")[0]]
    if is_gpu(case.topology):
        report = compile_report(config, "pretrain", case.topology)
        assert report.seconds and report.mfu and report.mfu_full
        return Held(case, report.seconds, report.mfu_full, report.mfu, report.compile_seconds)
    mesh = topology_mesh(config, case.topology)
    made = program(config, "pretrain", mesh)
    cost, _ = program_cost(config, "pretrain", made, mesh, chip, lambda what: None)
    _, attention = splash_flops(config, "pretrain", made, mesh)
    seconds, _ = estimated_seconds(cost, attention, config.model.d_head, chip)
    assert seconds is not None
    peak = seconds * mesh.size * chip.flops
    full, causal = (needed_flops(config, made, causal=c) / peak for c in (False, True))
    return Held(case, seconds, full, causal, time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, then the ratios by family of chips."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chips", choices=("gpu", "tpu"))
    parser.add_argument("names", nargs="*", help="parts of the names of runs; all by default")
    args = parser.parse_args(argv)
    prepare()
    chosen = [
        case
        for case in CASES
        if is_gpu(case.topology) == (args.chips == "gpu")
        and (not args.names or any(name in f"{case.name} {case.topology}" for name in args.names))
    ]
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    ratios: dict[str, list[float]] = {}
    for case in chosen:
        print(f"compiling {case.name} for {case.topology} ...", file=sys.stderr, flush=True)
        found = held(case)
        print(f"  {found.took:.0f} s", file=sys.stderr)
        ratios.setdefault(case.topology.partition(":")[0], []).append(round(found.ratio, 3))
        print(found.row(), flush=True)
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
