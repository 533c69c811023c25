"""The text of a compiled program: which operations it has, how often each runs, what each computes
and moves.

Compilers count the body of a loop once, whatever its trip count, and count nothing for GPUs; here
the text is read instead. A fusion's FLOPs are those of the matrix products inside it, its bytes
those that it reads and writes in device memory: of a parameter that is only sliced, the slice.
"""

import math
import re
from dataclasses import dataclass, field

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_SHAPE = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([0-9,]*)\](?:\{(\d+))?")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONTRACTED = re.compile(
    r"lhs_contracting_dims=\{([0-9,]*)\}|\"lhs_contracting_dimensions\":\[([0-9,\"]*)\]"
)
_EXACT = re.compile(r'operand_precision(?:=\{highest|":\["HIGHEST)')
_CUBLAS = 'custom_call_target="__cublas$'

FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
     "replica-id", "optimization-barrier", "domain")
)  # fmt: skip
"""Operations that no kernel runs."""
_MOVES = FREE | {
    "broadcast", "reshape", "transpose", "copy", "slice", "dynamic-slice", "dynamic-update-slice",
    "concatenate", "iota", "pad", "gather", "convert", "bitcast-convert", "reverse", "custom-call",
}  # fmt: skip
_SLOW = {
    "exponential", "log", "log-plus-one", "exponential-minus-one", "tanh", "power", "divide",
    "sqrt", "rsqrt", "logistic", "erf", "cosine", "sine",
}  # fmt: skip
TILE = 128 * 128
"""Results of a matrix product that one multiprocessor works on at a time."""
TILE_DEPTH = 1024
"""Terms of its sums that are worth a part of their own where there are too few tiles."""
SLOW_OPERATIONS = 8
"""Additions that an exponential and its like take the time of (CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Shape:
    """An array such as bf16[8,128]{1,0}.

    Attributes:
        minor: the axis along which neighbours lie side by side in memory.
    """

    dtype: str
    dims: tuple[int, ...]
    minor: int = -1

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.elements * self._bits // 8

    @property
    def aligned(self) -> bool:
        """Whether its rows begin at multiples of 16 bytes, as tensor cores are best fed."""
        return len(self.dims) < 2 or self.dims[self.minor] * self._bits % 128 == 0

    @property
    def _bits(self) -> int:
        return _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or [0])[0])


def shapes(text: str) -> tuple[Shape, ...]:
    """All arrays that a type such as "(bf16[8,128]{1,0}, f32[])" names."""
    return tuple(
        Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), int(minor or -1))
        for dtype, dims, minor in _SHAPE.findall(text)
    )


@dataclass(frozen=True)
class Operation:
    """One instruction.

    Attributes:
        shapes: of the result; of each part, where it is a tuple.
        operands: names of operations of the same computation.
        text: what follows the operands.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product: XLA's own, or a call of cuBLAS."""
        return self.opcode == "dot" or (self.opcode == "custom-call" and _CUBLAS in self.text)

    @property
    def called(self) -> str | None:
        """The computation of a fusion, a call or a loop's body."""
        match = _CALLED.search(self.text)
        return match[1] if match else None

    @property
    def trips(self) -> int | None:
        """How often a loop's body runs; None where the compiler does not know."""
        match = _TRIPS.search(self.text)
        return int(match[1]) if match else None

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations that a conditional chooses from."""
        match = _BRANCHES.search(self.text)
        return tuple(name.strip().lstrip("%") for name in match[1].split(",")) if match else ()


Computation = dict[str, Operation]


@dataclass
class Work:
    """What an operation takes.

    Attributes:
        products: FLOPs of matrix products, by dtype of their operands; "f32 exact" where TF32 is
            not allowed, "bf16 unaligned" where rows do not begin at multiples of 16 bytes.
        tiles: parts that they can be divided into, tiles of the result times parts of its sums.
        additions: of float32 units; slower operations count for several.
        bytes: to and from device memory.
    """

    products: dict[str, float] = field(default_factory=dict)
    tiles: float = 0.0
    additions: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Module:
    """A program's computations, each in the order in which it runs.

    Attributes:
        computations: name -> its operations by name.
        entry: name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Of `jax.stages.Compiled.as_text()`."""
        computations: dict[str, Computation] = {}
        current: Computation = {}
        entry = ""
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
            elif (operation := parse_operation(line)) is not None:
                current[operation.name] = operation
        return cls(computations, entry)

    def unknown_loops(self) -> list[str]:
        """Loops of which the compiler knows no trip count."""
        return [
            operation.name
            for computation in self.computations.values()
            for operation in computation.values()
            if operation.opcode == "while" and operation.trips is None
        ]

    def operand_shapes(self, operation: Operation, computation: str) -> tuple[Shape, ...]:
        """Of all operands, one after the other; tuples by their parts."""
        here = self.computations[computation]
        return tuple(s for name in operation.operands if name in here for s in here[name].shapes)

    def work(self, operation: Operation, computation: str) -> Work:
        """What an operation that `runs` takes; of a custom call the bytes alone."""
        work = Work()
        body = operation.called if operation.opcode in ("fusion", "async-start") else None
        if body in self.computations:
            self._add_inside(work, body)
            work.bytes = self._fusion_bytes(operation, computation, body)
        else:
            self._add(work, operation, computation)
            work.bytes = self._bytes_alone(operation, computation)
        return work

    def _add_inside(self, work: Work, body: str) -> None:
        for operation in self.computations[body].values():
            if operation.opcode == "fusion" and operation.called in self.computations:
                self._add_inside(work, operation.called)
            else:
                self._add(work, operation, body)

    def _add(self, work: Work, operation: Operation, computation: str) -> None:
        """The arithmetic of one operation."""
        if operation.is_product:
            lhs = self.computations[computation][operation.operands[0]].shapes[0]
            match = _CONTRACTED.search(operation.text)
            axes = (match[1] or match[2] or "").replace('"', "") if match else ""
            contracted = [int(i) for i in filter(None, axes.split(","))]
            size = math.prod(lhs.dims[i] for i in contracted)
            exact = _EXACT.search(operation.text) is not None and lhs.dtype == "f32"
            dtype = "f32 exact" if exact else lhs.dtype
            rhs = self.computations[computation][operation.operands[1]].shapes[0]
            if not all(shape.aligned for shape in (lhs, rhs, operation.shapes[0])):
                dtype += " unaligned"
            flops = 2.0 * operation.shapes[0].elements * size
            work.products[dtype] = work.products.get(dtype, 0.0) + flops
            parts = max(size // TILE_DEPTH, 1)
            work.tiles += math.ceil(operation.shapes[0].elements / TILE) * parts
        elif operation.opcode in ("reduce", "reduce-window", "sort", "scatter"):
            given = self.operand_shapes(operation, computation)
            work.additions += max((shape.elements for shape in given), default=0)
        elif operation.opcode not in _MOVES:
            cost = SLOW_OPERATIONS if operation.opcode in _SLOW else 1
            work.additions += cost * max((shape.elements for shape in operation.shapes), default=0)

    def _bytes_alone(self, operation: Operation, computation: str) -> float:
        given = [shape.bytes for shape in self.operand_shapes(operation, computation)]
        made = sum(shape.bytes for shape in operation.shapes)
        if operation.is_product:  # cuBLAS' working space is no traffic
            made = operation.shapes[0].bytes
        if operation.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * made
        if operation.opcode == "dynamic-update-slice":  # in place
            return 2.0 * given[1]
        return float(made + sum(given))

    def _fusion_bytes(self, operation: Operation, computation: str, body: str) -> float:
        inside = self.computations[body]
        here = self.computations[computation]
        users: dict[str, list[Operation]] = {}
        for one in inside.values():
            for name in one.operands:
                users.setdefault(name, []).append(one)
        total = 0.0
        parameters = [one for one in inside.values() if one.opcode == "parameter"]
        parameters.sort(key=lambda one: int(one.text.partition(")")[0] or 0))
        for parameter, given in zip(parameters, operation.operands, strict=False):
            whole = sum(s.bytes for s in here.get(given, parameter).shapes)
            total += min(_read(parameter, users), whole)
        root = next(one for one in inside.values() if one.root)
        outputs = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return total + sum(_written(one, inside) for one in outputs)


def _read(parameter: Operation, users: dict[str, list[Operation]]) -> float:
    """Bytes that a fusion reads of a parameter: of slices of it, the slices."""
    total = 0.0
    for user in users.get(parameter.name, ()):
        if user.opcode in ("dynamic-slice", "slice", "gather") and (
            user.operands[0] == parameter.name
        ):
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # in place: what is not replaced is not read
        elif user.opcode in ("bitcast", "reshape"):
            total += _read(user, users)
        else:
            return float(sum(shape.bytes for shape in parameter.shapes))
    return total


def _written(root: Operation, inside: Computation) -> float:
    """Bytes that a fusion writes: of an array replaced in part, the part."""
    while root.opcode in ("bitcast", "reshape") and root.operands[0] in inside:
        root = inside[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return float(sum(shape.bytes for shape in inside[root.operands[1]].shapes))
    return float(sum(shape.bytes for shape in root.shapes))


def parse_operation(line: str) -> Operation | None:
    """The operation of a line of HLO text; None where the line is none."""
    match = _OPERATION.match(line)
    if match is None:
        return None
    root, name, kind, opcode = match.groups()
    inside, text = _operands(line, match.end())
    if opcode in ("parameter", "constant"):
        return Operation(name, opcode, shapes(kind), (), inside + ")" + text, bool(root))
    names = tuple(_NAME.findall(_COMMENT.sub("", inside)))
    return Operation(name, opcode, shapes(kind), names, text, bool(root))


def _operands(line: str, start: int) -> tuple[str, str]:
    """What stands in the parentheses that open before `start`, and what follows them."""
    depth = 1
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            end = start + match.start()
            return line[start:end], line[end + 1 :]
    return line[start:], ""


@dataclass(frozen=True)
class Collective:
    """What a collective moves.

    Attributes:
        kind: one of `COLLECTIVES`.
        bytes: the larger of what one device gives and gets.
        groups: ids of the devices that take part together; empty where the text is not understood
            or names all of them.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]


def collective(operation: Operation, given: tuple[Shape, ...]) -> Collective | None:
    """Of an operation that starts one; None for all others, the ends of asynchronous ones too.

    Args:
        given: shapes of its operands.
    """
    kind = operation.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    started = operation.opcode.endswith("-start")
    size = collective_bytes(kind, started, operation.shapes, given)
    return Collective(kind, size, device_groups(operation.text))


def collective_bytes(
    kind: str, started: bool, made: tuple[Shape, ...], given: tuple[Shape, ...]
) -> int:
    """The larger of what a collective gives and takes, of one device.

    Args:
        started: whether it is the start of an asynchronous one, which gives operands, results and
            scalars of its own.
    """
    if started and kind != "all-reduce":
        made = tuple(shape for shape in made if shape.dims)
        made = made[len(made) // 2 :]
    return max(sum(shape.bytes for shape in part) for part in (made, given))


_EXPLICIT = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[0-9,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}")


def device_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Which devices take part together, in any of the three ways of writing it."""
    if match := _EXPLICIT.search(text):
        found = re.findall(r"\{([0-9, ]*)\}", match[1])
        return tuple(tuple(map(int, one.split(","))) for one in found if one.strip())
    if match := _IOTA.search(text):
        dims = [int(n) for n in match[3].split(",")]
        order = [int(n) for n in match[4].split(",")] if match[4] else list(range(len(dims)))
        ids, size = _transposed(dims, order), int(match[2])
        return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))
    if match := _MESH.search(text):
        axes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])]
        chosen = set(re.findall(r"'(\w+)'", match[2]))
        if "(" in match[2] or not axes:
            return ()  # parts of axes
        dims = [n for _, n in axes]
        last = [i for i, (name, _) in enumerate(axes) if name in chosen]
        ids = _transposed(dims, [i for i in range(len(dims)) if i not in last] + last)
        size = math.prod(dims[i] for i in last)
        return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))
    return ()


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """Numbers 0, 1, … laid out as `dims`, read with the axes in another order."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ids = [0]
    for axis in order:
        ids = [start + i * strides[axis] for start in ids for i in range(dims[axis])]
    return ids
