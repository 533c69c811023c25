"""Int8 or bfloat16 weights times a few float32 rows on a CPU, at the speed of its memory.

XLA's CPU backend has no such product: it converts each value on its own, and float32 with two or
four times the bytes is faster. numba compiles one that converts in vector registers, and XLA calls
it through its foreign function interface (`narrow_handler`). Without numba, or with an interface
of another version, the product is written as a sum, which XLA fuses.

XLA runs the calls of its foreign function interface one after the other, so a call cuts its matrix
into parts and offers them to the pool (XLA_FFI_ThreadPool_Schedule). Whoever is free takes the next
part, the caller too: it never waits for a part that nobody has begun, so that a pool of one thread,
or a busy one, cannot block it. What the parts share is a block of memory that the last one frees: a
task may begin long after the call has returned.

Structures are read as 64-bit words, by the offsets of version 0.3 of xla/ffi/api/c_api.h.
"""

import ctypes
import functools
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.sharding import usable_cpus

_KNOWN_INTERFACE = ("0", "3")
"""Version of the structures that the handler reads."""
PARTS_PER_THREAD = 4
"""Enough for threads of unequal speed; a part is still a few hundred rows."""

# Words of the block that the parts of one call share.
_NEXT, _DONE, _USERS, _PARTS, _ROWS, _SCALE, _X, _Y, _BATCH, _OUTPUTS, _INPUTS, _TASK = range(12)
_ERROR = _TASK + 5  # after the five words of XLA_FFI_ThreadPool_Schedule_Args
_WORDS = _ERROR + 3  # and the three of XLA_FFI_Error_Destroy_Args
# Words of XLA_FFI_Api.
_VERSION, _DESTROY, _SCHEDULE = 4, 8, 17
# Words of XLA_FFI_CallFrame: size, extension, interface, context, stage, arguments and results,
# each of: size, extension, count, types, list.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 1, 2, 3, 9, 14


def most_rows(dtype: jnp.dtype) -> int:
    """With more rows of activations a matrix is better converted once and multiplied by XLA."""
    return 16 if available() or dtype == jnp.int8 else 2


def on_cpu() -> bool:
    """Whether programs run on a CPU here."""
    return jax.default_backend() == "cpu"


@functools.cache
def available() -> bool:
    """Whether the compiled product can be used: with numba, and an interface it knows.

    On Windows there is no `sched_yield` to wait with.
    """
    try:
        import jaxlib
        import numba  # noqa: F401
    except ImportError:
        return False
    header = Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
    if not header.is_file() or sys.platform == "win32":
        return False
    text = header.read_text(encoding="utf-8")
    version = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", text)
    return tuple(version) == _KNOWN_INTERFACE


def narrow_matmul(
    x_BxI: jax.Array, rows_OxI: jax.Array, scale_O: jax.Array | None = None
) -> jax.Array:
    """x @ (rows * scale).T, float32 [B, O].

    Args:
        x_BxI: float32, at most `most_rows` of them.
        rows_OxI: int8 or bfloat16.
        scale_O: float32, for int8.
    """
    kinds = x_BxI.dtype.name, rows_OxI.dtype.name, "none" if scale_O is None else scale_O.dtype.name
    if kinds not in (("float32", "int8", "float32"), ("float32", "bfloat16", "none")):
        raise TypeError(f"rows of activations, matrix and scale of {kinds}")
    if not available():
        # Fused into one pass over the matrix for each row of x.
        sums = [jnp.sum(rows_OxI.astype(jnp.float32) * x_I, axis=1) for x_I in x_BxI]
        return jnp.stack(sums) * (1.0 if scale_O is None else scale_O)
    n_outputs = len(rows_OxI)
    if scale_O is None:
        scale_O = jnp.ones(n_outputs, jnp.float32)
    shape = jax.ShapeDtypeStruct((len(x_BxI), n_outputs), jnp.float32)
    with _compiling:
        target = _registered(rows_OxI.dtype.name, usable_cpus())
    return jax.ffi.ffi_call(target, shape)(rows_OxI, scale_O, x_BxI)


@functools.cache
def _registered(kind: str, n_threads: int) -> str:
    """Compiles a product and makes it known to XLA, once a process; its name there."""
    compiled = handler(kind, n_threads)  # type: ignore[arg-type]
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = f"aria_jax_{kind}_rows_{n_threads}"
    jax.ffi.register_ffi_target(name, new(compiled[0].address, None, None), platform="cpu")
    _alive.append(compiled)
    return name


_compiling = threading.Lock()
_alive: list[Any] = []  # compiled code must outlive the programs that call it


def handler(kind: Literal["int8", "bfloat16"], n_threads: int) -> tuple[Any, ...]:
    """Compiles the handler, a C function of one pointer to XLA_FFI_CallFrame.

    Its arguments are rows [O, I] of that kind, scale float32 [O] and x float32 [B, I]; its result
    is x @ (rows * scale).T, float32 [B, O].

    Returns:
        numba's functions, the handler first; they must outlive every program that calls it.
    """
    from llvmlite import ir
    from numba import carray, cfunc, njit, types
    from numba.extending import intrinsic

    word = ir.IntType(64)

    def pointer(typing_context: Any, address: Any) -> tuple[Any, Callable]:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

        return types.voidptr(types.uint64), code

    def fetch_add(typing_context: Any, address: Any, value: Any) -> tuple[Any, Callable]:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], word.as_pointer())
            return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

        return types.int64(types.uint64, types.int64), code

    def call(typing_context: Any, function: Any, argument: Any) -> tuple[Any, Callable]:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(word, [word]).as_pointer()
            return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

        return types.uint64(types.uint64, types.uint64), code

    def from_bfloat16(typing_context: Any, bits: Any) -> tuple[Any, Callable]:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            wide = builder.zext(arguments[0], ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, 16)), ir.FloatType())

        return types.float32(types.uint16), code

    view: Any = carray  # its stub knows Python's own integers only
    at: Any = intrinsic(pointer)
    add: Any = intrinsic(fetch_add)
    invoke: Any = intrinsic(call)
    stored: Any
    widen: Any
    if kind == "int8":
        stored, widen = np.int8, njit(lambda value: np.float32(value))
    else:
        stored, widen = np.uint16, intrinsic(from_bfloat16)
    allocate: Any = types.ExternalFunction("malloc", types.uint64(types.uint64))
    release: Any = types.ExternalFunction("free", types.void(types.uint64))
    give_way: Any = types.ExternalFunction("sched_yield", types.int32())

    @njit(fastmath=True)
    def product(rows: Any, scale: Any, x: Any, y: Any, start: Any, stop: Any) -> None:
        for i in range(start, stop):
            row, factor = rows[i], scale[i]
            for b in range(y.shape[0]):
                total = np.float32(0)
                for k in range(row.shape[0]):
                    total += widen(row[k]) * x[b, k]
                y[b, i] = total * factor

    @njit
    def work(block: Any) -> None:
        """Takes parts until none is left."""
        words = view(at(block), _WORDS, np.uint64)
        parts, outputs = np.int64(words[_PARTS]), np.int64(words[_OUTPUTS])
        batch, inputs = np.int64(words[_BATCH]), np.int64(words[_INPUTS])
        rows = view(at(words[_ROWS]), (outputs, inputs), stored)
        scale = view(at(words[_SCALE]), outputs, np.float32)
        x = view(at(words[_X]), (batch, inputs), np.float32)
        y = view(at(words[_Y]), (batch, outputs), np.float32)
        while True:
            part = add(block + np.uint64(8 * _NEXT), np.int64(1))
            if part >= parts:
                return
            product(rows, scale, x, y, part * outputs // parts, (part + 1) * outputs // parts)
            add(block + np.uint64(8 * _DONE), np.int64(1))

    @njit
    def leave(block: Any) -> None:
        if add(block + np.uint64(8 * _USERS), np.int64(-1)) == 1:
            release(block)

    @cfunc(types.void(types.uint64))
    def task(block: Any) -> None:
        work(block)
        leave(block)

    task_address: Any = task.address

    @njit
    def buffer(frame: Any, place: Any, number: Any) -> Any:
        """Words of XLA_FFI_Buffer: size, extension, type, data, rank, dimensions."""
        return view(at(view(at(frame[place]), number + 1, np.uint64)[number]), 6, np.uint64)

    @njit
    def dimension(words: Any, axis: Any) -> Any:
        return view(at(words[5]), axis + 1, np.uint64)[axis]

    @cfunc(types.uint64(types.uint64))
    def handle(frame_address: Any) -> Any:
        frame = view(at(frame_address), _RESULTS + 1, np.uint64)
        api = view(at(frame[_API]), _SCHEDULE + 1, np.uint64)
        if frame[_EXTENSION] != 0:  # XLA asks for the interface's version: the one it has
            extension = view(at(frame[_EXTENSION]), 4, np.uint64)
            metadata = view(at(extension[3]), 5, np.uint64)
            metadata[3] = api[_VERSION]
            metadata[4] = 0
            return np.uint64(0)
        rows, x = buffer(frame, _ARGUMENTS, 0), buffer(frame, _ARGUMENTS, 2)
        block = allocate(np.uint64(8 * _WORDS))
        words = view(at(block), _WORDS, np.uint64)
        words[_NEXT], words[_DONE], words[_USERS] = 0, 0, n_threads
        words[_PARTS] = n_threads * PARTS_PER_THREAD
        words[_ROWS], words[_X] = rows[3], x[3]
        words[_SCALE] = buffer(frame, _ARGUMENTS, 1)[3]
        words[_Y] = buffer(frame, _RESULTS, 0)[3]
        words[_BATCH], words[_OUTPUTS], words[_INPUTS] = (
            dimension(x, 0),
            dimension(rows, 0),
            dimension(rows, 1),
        )
        words[_TASK], words[_TASK + 1], words[_TASK + 2] = 40, 0, frame[_CONTEXT]
        words[_TASK + 3], words[_TASK + 4] = np.uint64(task_address), block
        for _ in range(n_threads - 1):
            error = invoke(api[_SCHEDULE], block + np.uint64(8 * _TASK))
            if error != 0:  # there is no pool: the parts are all the caller's
                words[_ERROR], words[_ERROR + 1], words[_ERROR + 2] = 24, 0, error
                invoke(api[_DESTROY], block + np.uint64(8 * _ERROR))
                leave(block)
        work(block)
        while add(block + np.uint64(8 * _DONE), np.int64(0)) < np.int64(words[_PARTS]):
            give_way()
        leave(block)
        return np.uint64(0)

    return handle, task
