"""`aria-jax compile`: what a program would take on TPUs and GPUs that are not here."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from aria_jax.cli import Verb
from aria_jax.cli.main import parse_with_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aria_jax.aot.gpu import Kernel
    from aria_jax.aot.report import Report

DESCRIPTION = """\
Compile a training step, an embedding batch, a prompt or a decoding step for TPUs or GPUs that are
not here, and print what it takes: memory per chip, FLOPs, memory traffic, collectives, the time of
one call and the MFU that follows; on GPUs also the registers, spills and tensor cores of each
kernel. Nothing runs and no weights are made.

TPUs need the package libtpu (pip install 'aria-jax[aot]'), GPUs jax's CUDA plug-in, 4 GB
(pip install 'aria-jax[aot-gpu]'; no GPU and no driver).

The report says of every figure whether the compiler, a formula or an assumption gave it;
docs/tpu.md and docs/gpu.md say how far such estimates were from measured runs. Exit status 1: it
does not fit.

examples:
  aria-jax compile --preset medium --topology v5p:4x4x4
  aria-jax compile --preset medium --topology h100:8
  aria-jax compile --preset medium --topology '2x h100:8' --task contrastive --json
  aria-jax compile --preset medium --topology v5e:16x16 --task contrastive mesh.fsdp=64 mesh.data=4
  aria-jax compile --preset medium --topology v6e:8x8 global_batch=256 remat=dots --json
  aria-jax compile --preset small --topology l4:1 --task decode"""

TASKS = ("pretrain", "continue", "contrastive", "classify", "embed", "prefill", "decode")
# Config of the task that has the same head.
LIKE = {"embed": "contrastive", "prefill": "pretrain", "decode": "pretrain"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax compile`."""
    parser.add_argument(
        "--preset", default="medium", help="tiny, mini, multitrack, small or medium (medium)"
    )
    parser.add_argument(
        "--topology",
        default="v5p:4x4x4",
        help="TPUs, e.g. v5e:8x8, v6e:16x16; GPUs: h100:1, h100:8, '2x h100:8' (2 hosts), h200, "
        "a100, b200, l4, rtx4090 (v5p:4x4x4)",
    )
    parser.add_argument("--task", choices=TASKS, default="pretrain", help="(pretrain)")
    parser.add_argument(
        "--mesh", metavar="D,F,T,S", help="devices per axis: data, fsdp, tensor, sequence"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the preset")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 where the program does not fit into the chips' memory."""
    from aria_jax.aot import accelerator_run, prepare
    from aria_jax.config import with_overrides

    settings = [*_mesh_settings(args.mesh), *args.settings]
    start = accelerator_run(args.preset, LIKE.get(args.task, args.task), args.topology)
    if args.task == "classify":
        start = dataclasses.replace(
            start,
            model=dataclasses.replace(start.model, class_names=("one", "another")),
            data=dataclasses.replace(start.data, label="composer"),
        )
    config = with_overrides(start, settings).validate()

    from aria_jax.cli.console import print_result, stage

    prepare()
    stage("loading jax and the compiler")
    from aria_jax.aot.report import compile_report

    report = compile_report(
        config,
        args.task,
        args.topology,
        on_compile=lambda what: stage(f"compiling {what}"),
    )
    result = {**dataclasses.asdict(report), "fits": report.fits}
    print_result(result, args.json, _text(report))
    return 0 if report.fits else 1


COMPILE = Verb(DESCRIPTION, add_arguments, run, parse=parse_with_settings)


def _mesh_settings(mesh: str | None) -> list[str]:
    from data_pipeline.errors import UserError

    if mesh is None:
        return []
    sizes = mesh.split(",")
    axes = ("data", "fsdp", "tensor", "sequence")
    if len(sizes) != len(axes):
        raise UserError(f"--mesh {mesh}: expected four numbers, e.g. 1,64,1,1")
    return [f"mesh.{axis}={size}" for axis, size in zip(axes, sizes, strict=True)]


def _text(report: "Report") -> str:
    gib = 2**30
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    parts = ", ".join(
        f"{name} {size / gib:.2f}" for name, size in report.memory.items() if name != "total"
    )
    total = report.memory["total"]
    free = (report.hbm - report.reserved - total) / gib
    verdict = f"{free:.2f} GiB free" if report.fits else "DOES NOT FIT"
    if report.kernels is not None and report.fits and total > 0.75 * report.hbm:
        verdict += f", with XLA_PYTHON_CLIENT_MEM_FRACTION={total / report.hbm + 0.01:.2f}"
    lines = [
        f"{report.task} on {report.topology}: {report.chips} chips, {mesh}, "
        f"{report.tokens:,} tokens per call",
        f"memory       {total / gib:.2f} of {report.hbm / gib:.0f} GiB per chip, "
        f"{verdict} ({parts})",
    ]
    if report.cost is None or report.seconds is None or report.mfu is None:
        return "\n".join([*lines, f"compiled in  {report.compile_seconds:.0f} s"])
    lines += [
        f"arithmetic   {report.cost.flops / 1e12:.2f} TFLOPs per chip"
        + (
            f", and {report.attention_flops / 1e12:.2f} in "
            + ("cuDNN's attention" if report.kernels is not None else "the splash kernel")
            if report.attention_flops
            else ""
        ),
        f"traffic      {report.cost.bytes / 1e9:.1f} GB to and from memory, "
        f"{report.cost.flops / max(report.cost.bytes, 1):.0f} FLOPs per byte",
    ]
    for kind, (number, size) in (report.collectives or {}).items():
        lines.append(f"collectives  {kind}: {number}, {size / 1e9:.2f} GB per chip")
    for link, size in (report.links or {}).items():
        lines.append(f"             {size / 1e9:.2f} GB of them over {link}")
    rate = report.tokens / report.seconds
    lines.append(f"time         {report.seconds:.3g} s per call, {rate:,.0f} tokens/s")
    if report.band:
        least, most = report.band
        lines.append(f"             {least:.3g} to {most:.3g} s by how such estimates were off")
    if report.parts:
        parts = ", ".join(f"{n} {s / report.seconds:.0%}" for n, s in report.parts.items() if s)
        lines.append(f"             of it {parts}")
    if report.xla_seconds:
        lines.append(f"             XLA's own model, without cuDNN: {report.xla_seconds:.3g} s")
    lines += [
        f"MFU          {report.mfu:.1%} of {report.model_flops / 1e15:.3g} PFLOPs per call"
        f" ({report.mfu_full:.1%} with the scores counted that causality hides)",
        *_kernel_lines(report.kernels or ()),
        f"compiled in  {report.compile_seconds:.0f} s",
        "sources",
        *(f"  {figure:<13} {source}" for figure, source in report.sources.items()),
    ]
    return "\n".join(lines)


def _kernel_lines(kernels: "Sequence[Kernel]") -> list[str]:
    """How many there are, and those that spill."""
    if not kernels:
        return []
    tensor = sum(kernel.tensor_core for kernel in kernels)
    spilling = sorted((k for k in kernels if k.spills), key=lambda kernel: -kernel.spills)
    lines = [
        f"kernels      {len(kernels)} by XLA and Triton, {tensor} with tensor cores, "
        f"{len(spilling)} spill"
    ]
    lines += [
        f"             {kernel.name}: {kernel.registers} registers, a thread spills "
        f"{kernel.spill_stores:,} bytes and fills {kernel.spill_loads:,}"
        for kernel in spilling[:5]
    ]
    return lines
