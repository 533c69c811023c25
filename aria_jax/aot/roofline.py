"""The time of a program on GPUs that are not here: a roofline over its operations.

Each operation of the optimised program takes as long as the slowest of three things, at assumed
shares of the data sheet's speeds: its matrix products on tensor cores, its other arithmetic on the
float32 units, its bytes to and from memory. Operations run in the compiler's schedule, loops by
their trip counts, collectives beside them from their start to where their result is waited for.

cuDNN's attention is a call that the text says only the shapes of: its FLOPs come by formula. A
Pallas kernel says its own in `metadata={"flops": …}`; where it does not, its bytes alone count.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax

from aria_jax.aot import measured_band
from aria_jax.aot.gpu import Kernel, Rates, compile_for_gpus, gpu_devices
from aria_jax.aot.hlo import FREE, Module, Operation, collective
from aria_jax.aot.programs import BACKWARD_ATTENTION, Task, needed_flops, program
from aria_jax.aot.report import Cost, Report, memory_parts
from aria_jax.config import RunConfig
from aria_jax.sharding import make_mesh
from data_pipeline.errors import UserError

LAUNCH = 2e-6
"""Assumed seconds between two kernels."""
PCIE = 50e9
"""Assumed bytes a second between a GPU and its host's memory."""
RESERVED = 1.5 * 2**30
"""Assumed bytes that CUDA's context, NCCL, cuBLAS and cuDNN keep for themselves."""

PARTS = ("products", "attention", "kernels", "memory", "launches", "collectives")

_ATTENTION = re.compile(r"__cudnn\$fmha\w*?(Backward)?(?:F8)?\"")
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_METADATA = re.compile(r'serialized_metadata = "((?:[^"\\]|\\[0-9A-F]{2})*)"')
_FLOPS = re.compile(r'(?:\\22|")flops(?:\\22|"): ?(?:\\22|")?(\d+)')
_KERNEL_NAME = re.compile(r'\bname = "([^"]*)"')
_SOL = re.compile(r'"exec_time_us":([0-9.e+-]+),[^{}]*"name":"sol"')


@dataclass
class Roofline:
    """What a program takes on one device; per call.

    Attributes:
        seconds: of the whole, in the compiler's schedule.
        parts: seconds by kind, `PARTS`; collectives are what is waited for.
        flops: of matrix products; attention_flops, kernel_flops: of cuDNN's attention and of Pallas
            kernels, by formula.
        bytes: to and from memory.
        launches: kernels that run.
        collectives: kind -> (number, bytes).
        links: "NVLink", "PCIe" or "network" -> bytes.
        collective_seconds: of all collectives, waited for or hidden.
        xla_seconds: XLA's own estimate of the operations that it has one for; 0 without any.
        pallas: names of Pallas kernels; uncounted: of those that do not say their FLOPs.
        unknown_loops: of which the body counted once.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: float = 0.0
    attention_flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    collective_seconds: float = 0.0
    xla_seconds: float = 0.0
    pallas: list[str] = field(default_factory=list)
    uncounted: list[str] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)


def roofline(text: str, rates: Rates, kernels: tuple[Kernel, ...] = ()) -> Roofline:
    """Adds up a program's operations.

    Args:
        text: optimised HLO, as the compiler gives it for GPUs.
        kernels: of which Pallas kernels those with tensor cores are known.
    """
    module = Module.parse(text)
    made = _Clock(module, rates, {kernel.name: kernel for kernel in kernels})
    found = Roofline(unknown_loops=module.unknown_loops())
    found.seconds = made.run(module.entry, 1, found)
    return found


@dataclass
class _Clock:
    """Goes through a schedule with one queue of kernels and one of transfers."""

    module: Module
    rates: Rates
    kernels: dict[str, Kernel]

    def run(self, name: str, times: int, total: Roofline) -> float:
        """Seconds of one turn of a computation; adds what `times` of them take to `total`."""
        now, transfers_end = 0.0, 0.0
        ends: dict[str, float] = {}
        for operation in self.module.computations[name].values():
            code = operation.opcode
            if code == "while" and operation.called:
                trips = operation.trips or 1
                now += trips * self.run(operation.called, times * trips, total)
            elif code == "call" and operation.called:
                now += self.run(operation.called, times, total)
            elif code == "conditional" and operation.branches:
                now += self.run(operation.branches[0], times, total)
            elif code.endswith("-done"):
                waited = max(ends.get(operation.operands[0], 0.0) - now, 0.0)
                total.parts["collectives"] += times * waited
                now += waited
            elif (seconds := self._transfer(operation, name, times, total)) is not None:
                transfers_end = max(now, transfers_end) + seconds
                ends[operation.name] = transfers_end
                if not code.endswith("-start"):
                    total.parts["collectives"] += times * (transfers_end - now)
                    now = transfers_end
            elif code not in FREE:
                now += self._kernel(operation, name, times, total)
        return now

    def _transfer(
        self, operation: Operation, computation: str, times: int, total: Roofline
    ) -> float | None:
        """Seconds of a collective or of a copy to or from the host; None for other operations."""
        if operation.opcode == "copy-start":
            return operation.shapes[0].bytes / PCIE
        inside, where = operation, computation
        if operation.opcode == "async-start" and operation.called in self.module.computations:
            body = self.module.computations[operation.called]
            inside, where = next(one for one in body.values() if one.root), operation.called
        found = collective(inside, self.module.operand_shapes(inside, where))
        if found is None:
            return None
        seconds = self.rates.collective_seconds(found)
        number, size = total.collectives.get(found.kind, (0, 0))
        total.collectives[found.kind] = (number + times, size + times * found.bytes)
        link = self.rates.link(found)
        total.links[link] = total.links.get(link, 0) + times * found.bytes
        total.collective_seconds += times * seconds
        return seconds

    def _kernel(self, operation: Operation, computation: str, times: int, total: Roofline) -> float:
        """Seconds of an operation that runs as one kernel."""
        work = self.module.work(operation, computation)
        memory = self.rates.memory_seconds(work.bytes)
        kind = "memory"
        arithmetic = work.additions / self.rates.additions
        if work.products:
            kind = "products"
            arithmetic = max(arithmetic, self.rates.product_seconds(work))
            total.flops += times * sum(work.products.values())
        elif operation.opcode == "custom-call":
            kind, arithmetic = self._call(operation, computation, times, total)
        if match := _SOL.search(operation.text):
            total.xla_seconds += times * float(match[1]) / 1e6
        total.bytes += times * work.bytes
        total.launches += times
        total.parts[kind] += times * max(memory, arithmetic)
        total.parts["launches"] += times * LAUNCH
        return max(memory, arithmetic) + LAUNCH

    def _call(
        self, operation: Operation, computation: str, times: int, total: Roofline
    ) -> tuple[str, float]:
        """What kind a custom call is of, and the seconds of its arithmetic."""
        target = match[1] if (match := _TARGET.search(operation.text)) else ""
        if attention := _ATTENTION.search(operation.text):
            backward = attention[1] is not None
            query = self.module.operand_shapes(operation, computation)[0]
            flops = attention_flops(operation.text, query.dims[-1], backward)
            total.attention_flops += times * flops
            share = self.rates.attention_share(query.dims[-1], backward)
            return "attention", flops / (self.rates.chip.flops * share)
        if "triton" not in target:
            return "memory", 0.0
        name = match[1] if (match := _KERNEL_NAME.search(operation.text)) else operation.name
        if name not in total.pallas:
            total.pallas.append(name)
        metadata = match[1] if (match := _METADATA.search(operation.text)) else ""
        if (said := _FLOPS.search(metadata)) is None:
            if name not in total.uncounted:
                total.uncounted.append(name)
            return "kernels", 0.0
        flops = float(said[1])
        total.kernel_flops += times * flops
        kernel = self.kernels.get(name)
        if kernel is not None and not kernel.tensor_core:
            return "kernels", flops / (2 * self.rates.additions)
        tf32 = kernel is not None and any("tf32" in kind for kind in kernel.mma)
        peak = self.rates.product_peak("f32" if tf32 else "bf16")
        return "kernels", flops / (peak * self.rates.share)


def attention_flops(text: str, d_head: int, backward: bool) -> float:
    """Of one call of cuDNN's attention, of the scores that its mask shows.

    Two products of [queries, keys] and the heads' width forward, five backward; a causal mask hides
    half of the scores.
    """
    match = _SCORES.search(text)
    scores = math.prod(int(n) for n in re.findall(r"\d+", match[1])) if match else 0
    seen = 0.5 if "CAUSAL" in text else 1.0
    return 4.0 * scores * seen * d_head * (BACKWARD_ATTENTION if backward else 1.0)


def gpu_report(
    config: RunConfig,
    task: Task,
    topology: str,
    *,
    on_compile: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compiles a task for GPUs that are not here and puts together what it takes.

    Raises:
        UserError: see `gpu_devices`; a batch that does not divide over the devices; a program that
            the compiler refuses, as where a kernel asks for more shared memory than there is.
    """
    began = time.perf_counter()
    rates = Rates.of(topology)
    mesh = make_mesh(config.mesh, gpu_devices(topology))
    made = program(config, task, mesh)
    on_compile("the program, and its kernels for the GPU")
    try:
        compiled = compile_for_gpus(made.function, *made.arguments, mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the compiler refuses {task} on {topology}: {reason}") from error
    found = roofline(compiled.text, rates, compiled.kernels)
    memory = memory_parts(compiled.executable)
    flops = found.flops + found.kernel_flops
    peak = found.seconds * mesh.size * rates.chip.flops
    model_flops = needed_flops(config, made)
    band, words = measured_band(rates.topology.family, found.seconds)
    return Report(
        task=task,
        topology=topology,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        tokens=made.tokens,
        memory=memory,
        hbm=rates.chip.hbm,
        reserved=RESERVED,
        cost=Cost(flops, found.bytes, None, found.seconds),
        attention_flops=found.attention_flops,
        collectives=found.collectives,
        links=found.links,
        seconds=found.seconds,
        band=band,
        parts=found.parts,
        xla_seconds=found.xla_seconds or None,
        model_flops=model_flops,
        mfu=model_flops / peak,
        mfu_full=needed_flops(config, made, causal=False) / peak,
        kernels=tuple(sorted(compiled.kernels, key=lambda k: k.name not in found.pallas)),
        compile_seconds=time.perf_counter() - began,
        sources={**_sources(found, rates), "calibration": words},
    )


def _sources(found: Roofline, rates: Rates) -> dict[str, str]:
    """Where each figure comes from, and what is missing from it."""
    sources = {
        "memory": f"compiler, whole program; assumption: {RESERVED / 2**30:.1f} GiB of a GPU are "
        "CUDA's own",
        "flops, bytes": "compiler: matrix products and arrays of the optimised program, loops by "
        "their trip counts",
        "attention": "formula, from the shapes of cuDNN's calls; a causal mask hides half",
        "collectives": "compiler, as flops",
        "kernels": "ptxas and PTX, of XLA's and Triton's kernels; on a GPU XLA tries several for a "
        "matrix product (cuBLAS among them) and may take another",
        "seconds": "roofline over the operations in the compiler's schedule; assumption: "
        f"{rates.assumptions()}, {LAUNCH * 1e6:.0f} µs between kernels",
        "xla": "XLA's own model of the operations that it has a figure for, one after the other; "
        "cuDNN's and Pallas kernels are not among them"
        if found.xla_seconds
        else "none: this XLA has no table for such a GPU",
    }
    if found.uncounted:
        sources["missing"] = (
            f"FLOPs of the Pallas kernels {', '.join(found.uncounted)}, which do not say them: "
            "their bytes alone count, and the time is too short"
        )
    if found.unknown_loops:
        sources["loops"] = f"of unknown length, counted once: {', '.join(found.unknown_loops)}"
    return sources
