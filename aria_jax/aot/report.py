"""What the compiler says about a program on a topology, and the time that follows from it.

Three kinds of figures, never mixed up (`Report.sources` says which is which):

- compiler: memory of the whole program; FLOPs, bytes and time of unrolled programs of one and two
  layers. Their difference is one layer, and `n_layers` of those and the rest of the first program
  are the whole, since the compiler counts the body of a loop once, whatever its trip count.
  The packed attention kernel is among them by its own cost estimate, which counts what the matrix
  unit works through (`kernels.packed_attention`).
- formula: FLOPs of the splash attention kernel, which carries no cost estimate, and of all chunks
  of the vocabulary loss but the first, since they are a loop too.
- assumption: the share of the peak that the splash kernel reaches, and data sheet speeds.

How far such times were from those of measured runs stands in `Report.band`.

Where the compiler gives no time of the whole (v5e, v6e), it is the sum of what runs one after the
other: the cycles that it estimates for each operation at the chip's clock, the kernels' cost
estimates at its peak, and collectives at the speed of its network, as if nothing overlapped.
docs/tpu.md holds that sum against the compiler's time where there is one.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from aria_jax.aot import described_devices, is_gpu, measured_band, wrong_topology
from aria_jax.aot.programs import (
    TRAINING,
    Program,
    Task,
    attention_efficiency,
    attention_flops,
    cached_flops,
    collectives,
    cycles,
    kernel_flops,
    moved_bytes,
    needed_flops,
    packed_attention_flops,
    program,
    uncounted_loss_flops,
    uses_splash,
    with_layers,
)
from aria_jax.config import RunConfig
from aria_jax.presets import CHIPS, TOKENS_AT_ONCE, Chip
from aria_jax.sharding import make_mesh
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from aria_jax.aot.gpu import Kernel

_WANTED = re.compile(
    r"(?:Used |temporaries \()([0-9.]+)([KMG])\)? (?:of|exceeds) .*hbm", re.IGNORECASE
)
"""In the words of a compiler that found too little memory: all it wanted, or the temporaries."""


NO_WINDOWS = 1_000_000
"""MiB of an operand from which on XLA makes a loop of a product and its collective: none has."""


@dataclass(frozen=True)
class Cost:
    """What the compiler counts in one program, per chip and call.

    Attributes:
        flops, bytes: arithmetic, and memory traffic.
        seconds: its own time estimate; None where it gives none (negative or zero).
        summed_seconds: of its operations' cycles, kernels and collectives, one after the other.
    """

    flops: float
    bytes: float
    seconds: float | None
    summed_seconds: float

    @classmethod
    def of(cls, compiled: Any, text: str, found_collectives: dict, chip: Chip) -> "Cost":
        """Reads a compiled program, given its text and the collectives there."""
        found = compiled.cost_analysis()
        found = found[0] if isinstance(found, list) else found
        seconds = float(found.get("optimal_seconds", -1.0))
        return cls(
            float(found.get("flops", 0.0)),
            float(found.get("bytes accessed", 0.0)),
            seconds if seconds > 0 else None,
            cycles(text) / chip.clock
            + kernel_flops(text) / chip.flops
            + moved_bytes(found_collectives) / chip.network,
        )

    def repeated(self, two: "Cost", n_layers: int, times: int) -> "Cost":
        """The cost of `n_layers`, given that of one (self) and of two; the whole `times` over."""

        def grown(one: float, both: float) -> float:
            return times * (one + (n_layers - 1) * (both - one))

        seconds = None
        if self.seconds is not None and two.seconds is not None:
            seconds = grown(self.seconds, two.seconds)
        return Cost(
            grown(self.flops, two.flops),
            grown(self.bytes, two.bytes),
            seconds,
            grown(self.summed_seconds, two.summed_seconds),
        )

    def with_flops(self, more: float) -> "Cost":
        """The cost with so many FLOPs added, and bytes and time in proportion."""
        share = 1 + more / max(self.flops, 1.0)
        seconds = None if self.seconds is None else self.seconds * share
        return Cost(self.flops + more, self.bytes * share, seconds, self.summed_seconds * share)


@dataclass(frozen=True)
class Report:
    """A program on a topology; all figures per chip and call unless they say otherwise.

    Attributes:
        memory: bytes of arguments, temporaries and code; `total` is their peak together, or what
            the compiler asked for where it gave up.
        hbm: bytes there are.
        cost: without the splash kernel; None, with all that follows from it, where the program
            does not fit.
        attention_flops: of the splash kernel, 0 where it is not used.
        collectives: kind -> (number, bytes); None where it does not fit.
        seconds: estimate of one call. model_flops: what the mathematics needs, over all chips.
        mfu: model_flops in that time as a share of all chips' peak; mfu_full: with all scores of
            attention counted, as many publications do, instead of the visible half.
        sources: figure -> "compiler", "formula" or "assumption: …".
        reserved: bytes of `hbm` that are not the program's.
        band: (least, most) seconds, by what such estimates were of measured runs; None where none
            was measured on such chips.
        parts: GPUs: seconds by kind of operation. xla_seconds: XLA's own estimate of those it has
            one for.
        links: GPUs: bytes of collectives over NVLink and over the network.
        kernels: GPUs: what `ptxas` and the PTX say of each.
    """

    task: str
    topology: str
    chips: int
    mesh: dict[str, int]
    tokens: int
    memory: dict[str, int]
    hbm: float
    cost: Cost | None
    attention_flops: float
    collectives: dict[str, tuple[int, int]] | None
    seconds: float | None
    model_flops: float
    mfu: float | None
    mfu_full: float | None
    compile_seconds: float
    sources: dict[str, str]
    reserved: float = 0.0
    band: tuple[float, float] | None = None
    parts: dict[str, float] | None = None
    xla_seconds: float | None = None
    links: dict[str, int] | None = None
    kernels: "tuple[Kernel, ...] | None" = None

    @property
    def fits(self) -> bool:
        """Whether the program's memory is there."""
        return self.memory["total"] <= self.hbm - self.reserved


def topology_mesh(config: RunConfig, topology: str) -> Mesh:
    """A mesh of the described chips of e.g. "v5p:4x4x4".

    Raises:
        UserError: an unknown topology, a missing compiler, or a mesh that does not fit.
    """
    family = topology.partition(":")[0]
    if family not in TOKENS_AT_ONCE:
        raise UserError(wrong_topology(topology))
    install = "the compiler is in the package libtpu: pip install 'aria-jax[aot]'"
    devices = described_devices(topology, install, platform="tpu", topology_name=topology)
    return make_mesh(config.mesh, devices)


def compiled(made: Program, mesh: Mesh, **options: Any) -> Any:
    """The program, compiled for the mesh's devices."""
    with jax.set_mesh(mesh):
        lowered = made.function.trace(*made.arguments).lower(lowering_platforms=("tpu",))
        return lowered.compile(compiler_options=options)


def compiled_text(made: Program, mesh: Mesh) -> tuple[Any, str]:
    """The program and its final text, which only the compiler itself can print for every family.

    Its products are whole: one that XLA would make a loop, of parts that chips pass round, counts
    once in all that the compiler says.
    """
    with TemporaryDirectory() as folder:
        executable = compiled(
            made,
            mesh,
            xla_dump_to=folder,
            xla_dump_hlo_as_text=True,
            xla_jf_spmd_threshold_for_windowed_einsum_mib=NO_WINDOWS,
        )
        printed = list(Path(folder).glob("*.after_codegen.txt"))
        if not printed:
            raise UserError("the compiler has printed no program: another version of libtpu?")
        whole = max(printed, key=lambda path: path.stat().st_size)
        return executable, whole.read_text(encoding="utf-8", errors="replace")


def compile_report(
    config: RunConfig,
    task: Task,
    topology: str,
    *,
    on_compile: Callable[[str], None] = lambda what: None,
) -> Report:
    """Compiles a task for chips that are not here and puts together what it takes.

    For TPUs it is compiled three times (whole, one layer, two), for GPUs once.

    Args:
        on_compile: told what is compiled next: each takes up to minutes.

    Raises:
        UserError: see `topology_mesh`; a batch that does not divide; a program that the compiler
            refuses, other than for memory.
    """
    if is_gpu(topology):
        from aria_jax.aot.roofline import gpu_report

        return gpu_report(config, task, topology, on_compile=on_compile)
    began = time.perf_counter()
    mesh = topology_mesh(config, topology)
    chip = CHIPS[topology.partition(":")[0]]
    made = program(config, task, mesh)
    on_compile("the whole program")
    memory = _memory(made, mesh)
    splash, attention = splash_flops(config, task, made, mesh)
    cost, moved = None, None
    if memory["total"] <= chip.hbm:
        cost, moved = program_cost(config, task, made, mesh, chip, on_compile)
    seconds, source = estimated_seconds(cost, attention, config.model.d_head, chip)
    model_flops = needed_flops(config, made)
    band, words = measured_band(topology.partition(":")[0], seconds)
    return Report(
        task=task,
        topology=topology,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        tokens=made.tokens,
        memory=memory,
        hbm=chip.hbm,
        cost=cost,
        attention_flops=attention,
        collectives=moved,
        seconds=seconds,
        band=band,
        model_flops=model_flops,
        mfu=seconds and model_flops / (seconds * mesh.size * chip.flops),
        mfu_full=seconds
        and needed_flops(config, made, causal=False) / (seconds * mesh.size * chip.flops),
        compile_seconds=time.perf_counter() - began,
        sources={
            "memory": "compiler, whole program",
            "flops, bytes": "compiler, from unrolled programs of 1 and 2 layers; formula for all "
            "chunks of the vocabulary loss but one",
            "attention": "formula"
            if splash
            else "in the compiler's figures; a packed kernel by "
            "its cost estimate, zeros and hidden scores included",
            "collectives": "compiler, as flops",
            "seconds": source,
            "calibration": words,
        },
    )


def splash_flops(config: RunConfig, task: Task, made: Program, mesh: Mesh) -> tuple[bool, float]:
    """Whether attention is the splash kernel, and its FLOPs per chip and call."""
    if not uses_splash(config, task, mesh):
        return False, 0.0
    again = cached_flops(config, task, made, mesh)["attention"]
    return True, attention_flops(config, made, mesh) + again


def program_cost(
    config: RunConfig,
    task: Task,
    made: Program,
    mesh: Mesh,
    chip: Chip,
    on_compile: Callable[[str], None],
) -> tuple[Cost, dict[str, tuple[int, int]]]:
    """What the compiler counts in programs of one and two layers, made into the whole.

    Returns:
        The cost of one call, without the splash kernel; and its collectives.
    """
    accumulation = config.train.grad_accumulation if task in TRAINING else 1
    costs, per_program = [], []
    for n in (1, 2):
        on_compile(f"{n} of its {config.model.n_layers} layers")
        part = _one_part(with_layers(config, n), accumulation)
        executable, text = compiled_text(program(part, task, mesh), mesh)
        per_program.append(collectives(text))
        costs.append(Cost.of(executable, text, per_program[-1], chip))
    cost = costs[0].repeated(costs[1], config.model.n_layers, accumulation)
    cached = cached_flops(config, task, made, mesh)
    more = uncounted_loss_flops(config, task, made, mesh) + cached["blocks"]
    if not uses_splash(config, task, mesh):
        more += packed_attention_flops(cached["attention"], config.model.d_head, chip)
    return (
        cost.with_flops(more),
        _repeated(per_program[0], per_program[1], config.model.n_layers, accumulation),
    )


def _one_part(config: RunConfig, accumulation: int) -> RunConfig:
    """One micro-batch: gradient accumulation is a loop too."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, global_batch=config.data.global_batch // accumulation
        ),
        train=dataclasses.replace(config.train, grad_accumulation=1),
    )


def _memory(made: Program, mesh: Mesh) -> dict[str, int]:
    """Bytes per chip; a compiler that runs out of memory says how much it wanted."""
    try:
        return memory_parts(compiled(made, mesh))
    except jax.errors.JaxRuntimeError as error:
        if (wanted := _WANTED.search(str(error))) is None:
            raise
        return {"total": int(float(wanted[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[wanted[2]])}


def memory_parts(executable: Any) -> dict[str, int]:
    """Bytes per chip of a program: arguments, outputs, temporaries, code, and in total."""
    found = executable.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def _repeated(
    one: dict[str, tuple[int, int]], two: dict[str, tuple[int, int]], n_layers: int, times: int
) -> dict[str, tuple[int, int]]:
    """Collectives of the whole call, from those of one layer and of two; see `Cost.repeated`."""
    total = {}
    for kind in sorted(one.keys() | two.keys()):
        pairs = zip(one.get(kind, (0, 0)), two.get(kind, (0, 0)), strict=True)
        number, size = (times * (first + (n_layers - 1) * (both - first)) for first, both in pairs)
        total[kind] = (number, size)
    return total


def estimated_seconds(
    cost: Cost | None, attention_flops: float, d_head: int, chip: Chip
) -> tuple[float | None, str]:
    """Seconds of one call, and where they come from."""
    if cost is None:
        return None, "none: it does not fit"
    efficiency = attention_efficiency(d_head, chip)
    attention = attention_flops / (chip.flops * efficiency)
    extra = ""
    if attention_flops:
        extra = (
            f" + {attention:.3g} s of attention (assumption: {efficiency:.0%} of the peak, since "
            f"heads of {d_head} fill {min(d_head / chip.matrix_unit, 1):.0%} of a matrix unit)"
        )
    if cost.seconds is not None:
        return cost.seconds + attention, "compiler" + extra
    source = "sum of the compiler's cycles, and of kernels and collectives at data sheet speed"
    return cost.summed_seconds + attention, source + extra
