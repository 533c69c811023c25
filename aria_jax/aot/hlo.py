"""Collectives in the text of a compiled program."""

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
        shapes, kind, _ = match.groups()
        operands = line[match.end() :].partition(")")[0]
        sizes = [_size(*shape) for shape in _SHAPE.findall(shapes + " " + operands)]
        number, total = found.get(kind, (0, 0))
        found[kind] = (number + 1, total + max(sizes, default=0))
    return found


def _size(kind: str, dimensions: str) -> int:
    """Bytes of an array such as bf16[8,128]."""
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    size = bits
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size // 8
