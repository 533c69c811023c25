"""Int8 or bfloat16 weights times a few float32 rows on a CPU, at the speed of its memory.

XLA's CPU backend has no such product: it converts each value on its own, and float32 with two or
four times the bytes is faster. Written as a sum the product with bfloat16 is fused and vectorised.
For int8 numba compiles one that converts in vector registers; XLA calls it through its foreign
function interface (xla/ffi/api/c_api.h), and threads of XLA's own pool run the parts that a matrix
is cut into.
"""

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def most_rows(dtype: jnp.dtype) -> int:
    """With more rows of activations a matrix is better converted once and multiplied by XLA."""
    return 2 if dtype == jnp.bfloat16 else 16


_TARGET = "aria_jax_int8_rows"
_KNOWN_INTERFACE = ("0", "3")  # version of the structures read below


def on_cpu() -> bool:
    """Whether programs run on a CPU here."""
    return jax.default_backend() == "cpu"


@functools.cache
def available() -> bool:
    """Whether the compiled product can be used: with numba, and an interface it knows."""
    try:
        import jaxlib
        import numba  # noqa: F401
    except ImportError:
        return False
    header = Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
    if not header.is_file():
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
    if scale_O is None or not available():
        # Fused into one pass over the matrix for each row of x.
        sums = [jnp.sum(rows_OxI.astype(jnp.float32) * x_I, axis=1) for x_I in x_BxI]
        return jnp.stack(sums) * (1.0 if scale_O is None else scale_O)
    _register()
    n_rows, n_outputs = x_BxI.shape[0], rows_OxI.shape[0]
    cuts = np.linspace(0, n_outputs, min(_n_threads(), n_outputs) + 1).astype(np.int32)
    parts = [
        jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((n_rows, stop - start), jnp.float32))(
            rows_OxI, scale_O, x_BxI, jnp.array([start], jnp.int32)
        )
        for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def _n_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _register() -> None:
    """Compiles the product and makes it known to XLA, once a process."""
    handler = _compiled()
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    jax.ffi.register_ffi_target(_TARGET, new(handler.address, None, None), platform="cpu")
    _alive.append(handler)


_alive: list[Any] = []  # compiled code must outlive the programs that call it


def _compiled() -> Any:
    """The handler: a C function of one pointer to XLA_FFI_CallFrame that returns no error."""
    from numba import carray, cfunc, njit, types
    from numba.extending import intrinsic

    def pointer(typing_context, address):
        def code(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

        return types.voidptr(types.uint64), code

    at: Any = intrinsic(pointer)

    @njit(fastmath=True)
    def product(rows, scale, x, start, y):
        for i in range(y.shape[1]):
            row, factor = rows[start + i], scale[start + i]
            for b in range(y.shape[0]):
                total = np.float32(0)
                for k in range(row.shape[0]):
                    total += np.float32(row[k]) * x[b, k]
                y[b, i] = total * factor

    @njit
    def buffer(list_address, number):
        """Words of XLA_FFI_Buffer: size, extension, type, data, rank, dimensions."""
        return carray(at(carray(at(list_address), number + 1, np.uint64)[number]), 6, np.uint64)

    @njit
    def dimension(words, axis):
        return np.int64(carray(at(words[5]), axis + 1, np.int64)[axis])

    @cfunc(types.uint64(types.uint64))
    def handler(frame_address):
        # Words of XLA_FFI_CallFrame: size, extension, interface, context, stage, then arguments
        # and results, each of: size, extension, count, types, list.
        frame = carray(at(frame_address), 15, np.uint64)
        if frame[1] != 0:  # XLA asks which version of its interface this is: the one it has
            extension = carray(at(frame[1]), 4, np.uint64)
            metadata = carray(at(extension[3]), 5, np.uint64)
            metadata[3] = carray(at(frame[2]), 5, np.uint64)[4]
            metadata[4] = 0
            return np.uint64(0)
        rows, scale, x, start = (
            buffer(frame[9], 0),
            buffer(frame[9], 1),
            buffer(frame[9], 2),
            buffer(frame[9], 3),
        )
        y = buffer(frame[14], 0)
        n_inputs = dimension(rows, 1)
        product(
            carray(at(rows[3]), (dimension(rows, 0), n_inputs), np.int8),
            carray(at(scale[3]), dimension(scale, 0), np.float32),
            carray(at(x[3]), (dimension(x, 0), n_inputs), np.float32),
            np.int64(carray(at(start[3]), 1, np.int32)[0]),
            carray(at(y[3]), (dimension(y, 0), dimension(y, 1)), np.float32),
        )
        return np.uint64(0)

    return handler
