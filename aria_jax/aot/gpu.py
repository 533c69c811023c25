"""GPUs that are not here: descriptions, speeds, programs compiled for them, and the machine code.

jax's CUDA plug-in compiles for a GPU of which it is told the data sheet (`gpus.toml`); neither a
GPU nor a driver is needed. Of every kernel that XLA or Triton made, the compiler leaves the PTX,
and `ptxas` says what becomes of it on that GPU: registers, stack, spills. Whether a kernel uses
tensor cores stands in its PTX.

Not seen: kernels inside cuBLAS and cuDNN, and those of Mosaic GPU, which compiles them when the
program is loaded.
"""

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from jax.sharding import Mesh

from aria_jax.aot import GpuTopology, described_devices, gpus
from aria_jax.aot.hlo import Collective, Work
from aria_jax.config import MeshConfig
from aria_jax.presets import CHIPS, Chip
from aria_jax.sharding import make_mesh, replicated
from data_pipeline.errors import UserError

MEMORY_SHARE = 0.9
"""Assumed share of the memory's bandwidth that a kernel reaches."""
LINK_SHARE = 0.8
"""Assumed share of the links' speed, one way, that NCCL reaches with large arrays."""
LATENCY = {"NVLink": 10e-6, "PCIe": 20e-6, "network": 30e-6}
"""Assumed seconds of a collective of no size."""
UNALIGNED = 2.0
"""Times as long as others that matrix products take whose rows do not begin at multiples of 16
bytes; of the 25 % that padding 50,257 columns to 50,304 gave nanoGPT (its author, February 2023).
"""
INSTALL = "the compiler is in jax's CUDA plug-in: pip install 'aria-jax[aot-gpu]'"


def description(family: str) -> str:
    """What XLA wants to know of a GPU: a text `stream_executor.GpuTargetConfigProto`."""
    gpu, chip = gpus()[family], CHIPS[family]
    major, minor = gpu["capability"].split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {gpu["threads"]}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu["shared_of_block"]}
  shared_memory_per_core: {gpu["shared"]}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {gpu["cores"]}
  fpus_per_core: {gpu["fp32"]}
  clock_rate_ghz: {gpu["clock_ghz"]}
  l2_cache_size: {gpu["l2"]}
  device_memory_size: {int(chip.hbm)}
  memory_bandwidth: {int(chip.bandwidth)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{gpu["device"]}"
"""


def gpu_devices(topology: str) -> list[Any]:
    """The described devices of e.g. "h100:8" or "2x h100:8".

    Raises:
        UserError: an unknown topology, or a missing compiler.
    """
    asked = GpuTopology.parse(topology)
    # The plug-in asks a driver for its version, which is not there, unless jax is kept to CPUs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return described_devices(
        topology,
        INSTALL,
        platform="cuda",
        topology_name="",
        topology=f"1x{asked.hosts}x{asked.gpus}",
        target_config=description(asked.family),
    )


def family_of(device_kind: str) -> str:
    """The name in `gpus()` of a described device."""
    return next(name for name, gpu in gpus().items() if gpu["device"] == device_kind)


@dataclass(frozen=True)
class Rates:
    """Speeds of one GPU: data sheet and assumed shares (`gpus.toml`).

    Attributes:
        chip: peak, bandwidth and links.
        gpu: of `gpus()`.
        topology: which GPUs share a host.
    """

    chip: Chip
    gpu: dict
    topology: GpuTopology

    @classmethod
    def of(cls, topology: str) -> "Rates":
        """Of e.g. "2x h100:8"."""
        parsed = GpuTopology.parse(topology)
        return cls(CHIPS[parsed.family], gpus()[parsed.family], parsed)

    def product_peak(self, dtype: str) -> float:
        """FLOP/s of the data sheet for products of arrays of a dtype.

        Tensor cores work float32 as TF32, at half the speed, unless the highest precision is asked
        for, and eight bits at twice the speed.
        """
        if dtype.startswith("f32 exact"):
            return 2 * self.additions
        narrow = dtype.startswith(("f8", "s8", "u8"))
        return self.chip.flops * (2.0 if narrow else 0.5 if dtype.startswith("f32") else 1.0)

    @property
    def additions(self) -> float:
        """Float32 additions a second."""
        return self.gpu["cores"] * self.gpu["fp32"] * self.gpu["clock_ghz"] * 1e9

    def product_seconds(self, work: Work) -> float:
        """Of the matrix products of one operation."""
        fill = min(work.tiles / self.gpu["cores"], 1.0)
        seconds = 0.0
        for dtype, flops in work.products.items():
            share = fill * (1.0 if "exact" in dtype else self.share)
            times = UNALIGNED if "unaligned" in dtype else 1.0
            seconds += times * flops / (self.product_peak(dtype) * share)
        return seconds

    @property
    def share(self) -> float:
        """Assumed share of the tensor cores' peak in matrix products."""
        return float(self.gpu["products"])

    def attention_share(self, d_head: int, backward: bool) -> float:
        """Assumed share of the peak in cuDNN's attention, between those of heads of 64 and 128."""
        narrow, wide = (self.gpu["attention"][i + backward] for i in (0, 2))
        return float(narrow + (wide - narrow) * min(max(d_head / 64 - 1, 0), 1)) * min(
            d_head / 64, 1
        )

    def memory_seconds(self, size: float) -> float:
        """Of so many bytes to and from memory."""
        return size / (self.chip.bandwidth * MEMORY_SHARE)

    def link(self, found: Collective) -> str:
        """What the slowest part of a collective goes over: "NVLink", "PCIe" or "network"."""
        per_host = self.topology.gpus
        groups = found.groups or (tuple(range(self.topology.hosts * per_host)),)
        crosses = any(len({device // per_host for device in group}) > 1 for group in groups)
        return "network" if crosses else str(self.gpu["link"])

    def collective_seconds(self, found: Collective) -> float:
        """As rings work it: each device sends all but its own share, for sums twice."""
        per_host = self.topology.gpus
        groups = found.groups or (tuple(range(self.topology.hosts * per_host)),)
        n = max(map(len, groups))
        link = self.link(found)
        speed = self.chip.network / 2
        if link == "network":
            # Every device of a group on one host brings its own adapter along.
            together = max(Counter(device // per_host for device in groups[0]).values())
            speed = min(speed, together * self.gpu["host_network"])
        share = 1.0 if found.kind == "collective-permute" else (n - 1) / n
        sent = found.bytes * share * (2 if found.kind == "all-reduce" else 1)
        return LATENCY[link] + sent / (speed * LINK_SHARE)

    def assumptions(self) -> str:
        """What the time rests on, in a sentence."""
        narrow, narrow_back, wide, wide_back = self.gpu["attention"]
        return (
            f"{self.share:.0%} of the tensor cores' {self.chip.flops / 1e12:.0f} TFLOP/s in matrix "
            f"products (half that speed where rows are not aligned), in cuDNN's attention "
            f"{narrow:.0%} forward and {narrow_back:.0%} backward at heads of 64 ({wide:.0%} and "
            f"{wide_back:.0%} at 128), {MEMORY_SHARE:.0%} of "
            f"{self.chip.bandwidth / 1e12:.2f} TB/s, {LINK_SHARE:.0%} of the links"
        )


@dataclass(frozen=True)
class Kernel:
    """What `ptxas` and the PTX say of one kernel.

    Attributes:
        name: its entry; XLA's kernels bear the name of the operation.
        registers: of a thread.
        stack, spill_stores, spill_loads: bytes of a thread in slow local memory.
        shared: bytes of shared memory that it declares; what it asks for at its launch is not seen.
        mma: tensor core instructions in the text, by kind, e.g. {"wgmma.mma_async.….bf16.bf16": 4}.
    """

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    mma: dict[str, int] = field(default_factory=dict)

    @property
    def spills(self) -> int:
        """Bytes that a thread spills and fills."""
        return self.spill_stores + self.spill_loads

    @property
    def tensor_core(self) -> bool:
        """Whether it uses tensor cores at all."""
        return bool(self.mma)


@dataclass(frozen=True)
class GpuProgram:
    """A program compiled for GPUs.

    Attributes:
        executable: `jax.stages.Compiled`.
        text: the optimised and scheduled HLO.
        kernels: made by XLA, Triton and Pallas (Triton), in the order of their names.
    """

    executable: Any
    text: str
    kernels: tuple[Kernel, ...]


def compile_for_gpus(
    function: Any, *arguments: Any, topology: str | None = None, mesh: Mesh | None = None
) -> GpuProgram:
    """Compiles a function for GPUs that are not here, and reads its kernels.

    Args:
        function: jitted, or not.
        arguments: trees of arrays or `jax.ShapeDtypeStruct`; those without a sharding of the
            described devices are replicated.
        topology: e.g. "h100:1" for a mesh of one device.
        mesh: of `gpu_devices`, where it has axes to speak of; in place of `topology`.

    Raises:
        UserError: see `gpu_devices`; no `ptxas`, or no PTX to read.
    """
    if mesh is None:
        mesh = make_mesh(MeshConfig(), gpu_devices(topology or "h100:1"))
    whole, family = replicated(mesh), family_of(mesh.devices.flat[0].device_kind)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        here = sharding is not None and getattr(sharding, "mesh", None) == mesh
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if here else whole)

    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with TemporaryDirectory() as folder, jax.set_mesh(mesh):
        lowered = jitted.trace(*jax.tree.map(placed, arguments)).lower(lowering_platforms=("cuda",))
        options = {
            "xla_dump_to": folder,
            "xla_gpu_collect_cost_model_stats": gpus()[family]["cost_model"],
        }
        with _uncached():
            executable = lowered.compile(compiler_options=options)
        text, kernels = executable.as_text(), read_kernels(Path(folder))
        if not kernels and " fusion(" in text:
            raise UserError("the compiler has left no PTX of its kernels: another version of jax?")
        return GpuProgram(executable, text, kernels)


@contextmanager
def _uncached() -> Iterator[None]:
    """A program out of jax's compilation cache would leave no PTX."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


_FUNCTION = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_ENTRY = re.compile(r"^\.visible \.entry ([\w$.]+)\(", re.MULTILINE)
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_MMA = re.compile(r"^\s+(?:@%?!?\w+ )?((?:mma|wmma\.mma|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+)",
                  re.MULTILINE)  # fmt: skip


def read_kernels(folder: Path) -> tuple[Kernel, ...]:
    """The kernels of all PTX files in a folder, assembled for the GPUs they name.

    Raises:
        UserError: no `ptxas` is installed, or it refuses a file.
    """
    by_target: dict[str, list[Path]] = {}
    mma: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if (target := _TARGET.search(text)) is None or not _ENTRY.search(text):
            continue  # nothing to assemble
        by_target.setdefault(target[1], []).append(path)
        mma |= tensor_core_instructions(text)
    found = []
    for arch, paths in by_target.items():
        made = folder / "assembled"  # ptxas removes what it could not finish, so no /dev/null
        printed = subprocess.run(
            [ptxas(), "-v", f"-arch={arch}", "-o", made, *paths], capture_output=True, text=True
        )
        said = printed.stdout + printed.stderr
        if printed.returncode:
            reason = (said.strip().splitlines() or ["nothing said"])[-1]
            raise UserError(
                f"ptxas ends with {printed.returncode} on the kernels for {arch}: {reason}"
            )
        found += list(parse_ptxas(said, mma))
    return tuple(sorted(found, key=lambda kernel: kernel.name))


def tensor_core_instructions(ptx: str) -> dict[str, dict[str, int]]:
    """Entry -> kind of tensor core instruction -> how many, in a PTX file."""
    starts = [(match.start(), match[1]) for match in _ENTRY.finditer(ptx)]
    ends = [start for start, _ in starts[1:]] + [len(ptx)]
    return {
        name: dict(Counter(match[1] for match in _MMA.finditer(ptx, start, end)))
        for (start, name), end in zip(starts, ends, strict=True)
    }


def parse_ptxas(printed: str, mma: dict[str, dict[str, int]]) -> Iterator[Kernel]:
    """The kernels of what `ptxas -v` prints; device functions that entries call are left out.

    Args:
        mma: of `tensor_core_instructions`; its names are the entries.
    """
    name, stack = "", (0, 0, 0)
    for line in printed.splitlines():
        if match := _FUNCTION.search(line):
            name = match[1]
        elif match := _STACK.search(line):
            stack = int(match[1]), int(match[2]), int(match[3])
        elif name in mma and (match := _USED.search(line)):
            yield Kernel(name, int(match[1]), *stack, int(match[2] or 0), mma[name])


@functools.cache
def ptxas() -> str:
    """Path of the assembler of CUDA's wheels.

    Raises:
        UserError: none is installed.
    """
    for folder in map(Path, sys.path):
        for path in sorted(folder.glob("nvidia/*/bin/ptxas")):
            return str(path)
    raise UserError(f"ptxas is not installed (package nvidia-cuda-nvcc): {INSTALL}")
