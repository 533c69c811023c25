"""What the text of a compiled program says: collectives, cycles, FLOPs of kernels."""

import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1
"""Cycles of an operation that the TPU compiler has no estimate for."""
_KERNEL = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of each kind of collective in HLO text; bytes per device and call.

    A collective counts the larger of what it takes and what it gives; asynchronous ones count
    once, at their start. Each operation counts once, also within a loop.
    """
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if (match := _OPERATION.search(line)) is None:
            continue
        shapes, kind, started = match.groups()
        given = _SHAPE.findall(shapes)
        if started and kind != "all-reduce":  # gives operands, results and scalars of its own
            given = [shape for shape in given if shape[1]]
            given = given[len(given) // 2 :]
        taken = _SHAPE.findall(line[match.end() :].partition(")")[0])
        size = max(sum(_size(*shape) for shape in part) for part in (given, taken))
        number, total = found.get(kind, (0, 0))
        found[kind] = (number + 1, total + size)
    return found


def moved_bytes(found: dict[str, tuple[int, int]]) -> float:
    """What a device sends for such collectives: sums are reduced and handed round."""
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in found.items())


def cycles(text: str) -> int:
    """Sum of what a TPU's compiler estimates for each operation; the body of a loop counts once."""
    return sum(n for n in map(int, _CYCLES.findall(text)) if n < _UNKNOWN)


def kernel_flops(text: str) -> float:
    """Sum of the cost estimates that kernels brought along."""
    return float(sum(map(int, _KERNEL.findall(text))))


def _size(kind: str, dimensions: str) -> int:
    """Bytes of an array such as bf16[8,128]."""
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    size = bits
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size // 8
