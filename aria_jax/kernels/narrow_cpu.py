"""Int8 or bfloat16 weights times a few float32 rows on a CPU, at the speed of its memory.

XLA's CPU backend has no such product: it converts each value on its own, and float32 with two or
four times the bytes is faster. numba compiles one that converts in vector registers, and XLA calls
it through its foreign function interface (`narrow_handler`). Without numba, or with an interface
of another version, the product is written as a sum, which XLA fuses.
"""

import ctypes
import functools
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aria_jax.sharding import usable_cpus


def most_rows(dtype: jnp.dtype) -> int:
    """With more rows of activations a matrix is better converted once and multiplied by XLA."""
    return 16 if available() or dtype == jnp.int8 else 2


_KNOWN_INTERFACE = ("0", "3")  # version of the structures that the handler reads


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
    from aria_jax.kernels.narrow_handler import handler

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
