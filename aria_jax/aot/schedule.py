"""How busy the packed attention kernel keeps a TPU's matrix units, by the compiler's own schedule.

Told to (`environment.prepare`), libtpu writes what it schedules: one line a bundle, the
instructions that start in one cycle, and how many of them each unit of the core takes. A kernel's
bundles fall into regions between branches: what is done for a pair of tiles below the diagonal, for
one on it, and what is done once for a tile of queries or keys. Their cycles times how often they
run are the kernel's time, but for waiting on memory, of which a tile needs far less than it
computes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError

KERNELS = {"forward": "rotary_attention_.", "backward": "rotary_attention_gradient"}
CYCLES = {"v5e": 16, "v5p": 16, "v6e": 8}
"""Of one instruction's matrix product, 16 rows of bfloat16, at the data sheet's speed. The schedule
counts a little less."""
_PER_STEP = 500
"""Shorter regions without products run at every pair of tiles, longer ones once a tile."""
_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+)\s")


@dataclass(frozen=True)
class Region:
    """Bundles between two branches.

    Attributes:
        bundles: cycles, by the schedule.
        products: instructions that start a matrix product.
    """

    bundles: int
    products: int


@dataclass(frozen=True)
class KernelTime:
    """Cycles of one block of heads over one sequence.

    Attributes:
        total: of the whole kernel; a region takes no less than its products need.
        matrix: of the matrix units, all at work.
    """

    total: float
    matrix: float

    @property
    def busy(self) -> float:
        """Share of the time that the matrix units work."""
        return self.matrix / self.total


def kernel_time(folder: Path, family: str, kernel: str, tiles: int) -> KernelTime:
    """Reads what was dumped for a family of TPUs of one of `KERNELS`, so many tiles a sequence.

    Raises:
        UserError: the compiler has written no schedule that this can read.
    """
    name = KERNELS[kernel]
    bundles = _newest(folder, f"*{name}*-final_bundles.txt", without="schedule-analysis")
    usage = _newest(folder, f"*{name}*-final_hlo-static-per-bundle-utilization.txt")
    units = int(usage.split("\n", 2)[2].split()[0])
    found = regions(bundles)
    full, diagonal, *rest = sorted(
        [*found, Region(0, 0), Region(0, 0)], key=lambda region: -region.products
    )
    if not diagonal.products:
        raise UserError(f"no products in the schedule of {name}: another version of libtpu?")
    once_a_tile = [r for r in rest if r.bundles >= _PER_STEP]
    every_step = sum(r.bundles for r in rest if r.bundles < _PER_STEP)
    pairs = tiles * (tiles - 1) // 2

    def needs(region: Region) -> float:
        return region.products * CYCLES[family] / units

    matrix = pairs * needs(full) + tiles * needs(diagonal)
    total = pairs * max(full.bundles, needs(full)) + tiles * max(diagonal.bundles, needs(diagonal))
    total += tiles * sum(r.bundles for r in once_a_tile) + (pairs + tiles) * every_step
    return KernelTime(total, matrix)


def regions(bundles: str) -> Sequence[Region]:
    """Of the text of a kernel's final bundles, in order."""
    found, begin, products, address = [], 0, 0, 0
    for line in bundles.splitlines():
        if (match := _ADDRESS.match(line)) is None:
            continue
        address = int(match[1], 16)
        products += len(re.findall(r"vmatmul\.", line))
        if "sbr.rel" in line:
            found.append(Region(address + 1 - begin, products))
            begin, products = address + 1, 0
    found.append(Region(address + 1 - begin, products))
    return found


def _newest(folder: Path, pattern: str, without: str = "\n") -> str:
    paths = [path for path in sorted(folder.glob(pattern)) if without not in path.name]
    if not paths:
        raise UserError(
            f"the compiler wrote no {pattern} into {folder}: another version of libtpu?"
        )
    return paths[-1].read_text(encoding="utf-8", errors="replace")
