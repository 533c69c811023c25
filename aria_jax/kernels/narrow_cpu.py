"""Int8 or bfloat16 weights times a few float32 rows on a CPU, at the speed of its memory, and the
attention of such a decoder.

XLA's CPU backend has no such product: it converts each value on its own, and float32 with two or
four times the bytes is faster. `narrow_cpu.cc` has one that converts in vector registers, written
against the headers that jax brings for its foreign function interface; its attention reads what a
cache holds, not the room that is left. The machine's compiler makes a library of it once, which is
kept beside what jax compiled. Where that fails, a warning says why, the product is written as a
sum, which XLA fuses, and attention is XLA's.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import mmap
import os
import platform
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from aria_jax.sharding import usable_cpus
from data_pipeline.artifact import atomic
from data_pipeline.storage import mirror

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_loading = threading.Lock()


def most_rows(dtype: jnp.dtype) -> int:
    """With more rows of activations a matrix is better converted once and multiplied by XLA."""
    return 16 if available() or dtype == jnp.int8 else 2


def on_cpu() -> bool:
    """Whether programs run on a CPU here."""
    return jax.default_backend() == "cpu"


def available() -> bool:
    """Whether the compiled product can be used.

    The first call of a process loads it, and the first one of a machine builds it, which takes
    some seconds; a warning says why there is none.
    """
    with _loading:
        return _loaded() is not None


@functools.cache
def _loaded() -> Path | None:
    """The library whose handlers XLA knows; None, after a warning, where there is none."""
    try:
        library = built()
        register(library)
        # In a thread of its own: this may be asked while another program is being traced.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check).result()
        return library
    except (OSError, subprocess.SubprocessError, NotBuilt, jax.errors.JaxRuntimeError) as error:
        warnings.warn(
            f"int8 and bfloat16 weights decode slower than they could: {error}", stacklevel=2
        )
        return None


class NotBuilt(RuntimeError):
    """Why there is no library."""


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
    if available():
        return _call(x_BxI, rows_OxI, scale_O)
    # Fused into one pass over the matrix for each row of x.
    sums = [jnp.sum(rows_OxI.astype(jnp.float32) * x_I, axis=1) for x_I in x_BxI]
    return jnp.stack(sums) * (1.0 if scale_O is None else scale_O)


def _call(x_BxI: jax.Array, rows_OxI: jax.Array, scale_O: jax.Array | None) -> jax.Array:
    call = jax.ffi.ffi_call(
        f"aria_jax_{rows_OxI.dtype.name}_rows",
        jax.ShapeDtypeStruct((len(x_BxI), len(rows_OxI)), jnp.float32),
    )
    scales = () if scale_O is None else (scale_O,)
    return call(rows_OxI, *scales, x_BxI, threads=np.int64(usable_cpus()))


def cached_attention(
    q_RxHxK: jax.Array,
    k_RxHxK: jax.Array,
    v_RxHxK: jax.Array,
    shared: tuple[jax.Array, jax.Array],
    past: tuple[jax.Array, jax.Array],
    visible_PxT: jax.Array,
    filled: jax.Array,
) -> jax.Array:
    """[R, H, K]: attention of each row's new token to its branch's prompt, its past and itself.

    Only what is visible or filled is read. It needs `available()`.

    Args:
        q_RxHxK, k_RxHxK, v_RxHxK: of the new tokens, float32.
        shared: keys [P, H, T, K] and values [P, H, K, T], float32 or bfloat16, or the bits of
            bfloat16 as uint16. P divides R.
        past: keys [R, H, G, K] and values [R, H, K, G] of the same dtype.
        visible_PxT: bool.
        filled: int32; slots of `past` that hold a token.
    """
    stored = {x.dtype.name for x in (*shared, *past)}
    if stored not in ({"float32"}, {"bfloat16"}, {"uint16"}):
        raise TypeError(f"caches of {' and '.join(sorted(stored))}")
    call = jax.ffi.ffi_call(
        "aria_jax_cached_attention", jax.ShapeDtypeStruct(q_RxHxK.shape, jnp.float32)
    )
    return call(
        *(q_RxHxK, k_RxHxK, v_RxHxK, *shared, visible_PxT, *past, filled),
        threads=np.int64(usable_cpus()),
    )


class LargePages:
    """Memory of large pages, as far as the system has them: a product reads it a tenth faster.

    With pages of 4 KB a core looks up where each lies, and its prefetching ends with each.
    """

    CHUNK = 64 << 20
    MIN_ARRAY = 1 << 20
    """Bytes; what is smaller stays where it is."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)
        self._used = 1

    def put(self, array: jax.Array) -> jax.Array:
        """The same array there, on its one device; as it was where that cannot be."""
        if array.nbytes < self.MIN_ARRAY or not hasattr(mmap, "MADV_HUGEPAGE"):
            return array
        if array.nbytes > len(self._memory) - self._used:
            # Python's default is shared memory, of which systems make no large pages.
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory = mmap.mmap(-1, max(self.CHUNK, array.nbytes), flags=private)
            self._used = 0
            with contextlib.suppress(OSError):  # a system without large pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        place = np.frombuffer(self._memory, array.dtype, array.size, self._used)
        place = place.reshape(array.shape)
        place[...] = array
        self._used += -(-array.nbytes // 64) * 64  # jax copies what begins between cache lines
        return jax.device_put(place, array.sharding if array.committed else None)


def built() -> Path:
    """The library for this machine, compiled where the cache has none.

    Raises:
        NotBuilt: no compiler, or it failed, or what it made computes something else.
        OSError: the cache cannot be written.
    """
    cache = mirror() / "compiled"
    library = cache / f"narrow_cpu-{_key()}.so"
    if library.is_file():
        return library
    compiler = _compiler()
    cache.mkdir(parents=True, exist_ok=True)
    with atomic(library) as unfinished:
        include = ("-I", jax.ffi.include_dir())
        _run(*compiler, *FLAGS, *include, str(SOURCE), "-o", str(unfinished))
        # In a process of its own, as code that the machine cannot run would end this one.
        _run(sys.executable, "-m", __name__, str(unfinished))
    return library


def _compiler() -> tuple[str, ...]:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise NotBuilt("there is no C++ compiler; `pip install ziglang` brings one")


def _run(*command: str) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["nothing said"]
        raise NotBuilt(f"{Path(command[0]).name} ends with {result.returncode}: {said[-1]}")


def _key() -> str:
    """Of all that the compiled code depends on, the processor among it: homes are shared."""
    digest = hashlib.sha256(repr((FLAGS, jaxlib.__version__, platform.machine())).encode())
    headers = sorted(Path(jax.ffi.include_dir()).rglob("*.h"))
    for file in (SOURCE, *headers):
        digest.update(file.read_bytes())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What the processor can do, in the words of its operating system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def register(library: Path) -> None:
    """Makes the handlers of a library known to XLA."""
    symbols = ctypes.CDLL(str(library))
    for name in ("int8_rows", "bfloat16_rows", "cached_attention"):
        handler = jax.ffi.pycapsule(getattr(symbols, name))
        jax.ffi.register_ffi_target(f"aria_jax_{name}", handler, platform="cpu")


def check() -> None:
    """Raises NotBuilt where the registered handlers give other numbers than NumPy.

    Products of small integers, whose sums are exact; every width of the tiles, and lengths that
    vectors of no size divide.
    """
    random = np.random.default_rng(0)
    rows_OxI = random.integers(-128, 128, (37, 331)).astype(np.int8)
    x_BxI = random.integers(-64, 65, (7, 331)).astype(np.float32)
    scale_O = 2.0 ** (np.arange(37, dtype=np.float32) % 5)
    product_BxO = x_BxI @ rows_OxI.T.astype(np.float32)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        int8 = jax.jit(_call)(x_BxI, rows_OxI, scale_O)
        bfloat16 = jax.jit(_call)(x_BxI, rows_OxI.astype(jnp.bfloat16), None)
    for kind, found, expected in (
        ("int8", int8, product_BxO * scale_O),
        ("bfloat16", bfloat16, product_BxO),
    ):
        if not np.array_equal(found, expected):
            raise NotBuilt(f"the compiled product of {kind} is wrong")
    with jax.default_device(cpu):
        _check_attention(random)


def _check_attention(random: np.random.Generator) -> None:
    """Two branches of seven rows, with numbers that bfloat16 has."""
    branches, sequences, heads, width, slots, past_slots, filled = 2, 7, 2, 20, 37, 11, 9
    rows = branches * sequences

    def numbers(*shape: int) -> np.ndarray:
        return random.integers(-8, 9, shape).astype(np.float32) / 4

    q, k, v = numbers(3, rows, heads, width)
    shared = numbers(branches, heads, slots, width), numbers(branches, heads, width, slots)
    past = numbers(rows, heads, past_slots, width), numbers(rows, heads, width, past_slots)
    visible_PxT = (random.random((branches, slots)) < 0.7) & (np.arange(slots) < 30)

    keys_RxHxNxK, values_RxHxKxN = (
        np.concatenate(
            [
                np.repeat(of_prompt, sequences, axis=0),
                np.take(of_past, range(filled), axis=axis),
                np.expand_dims(new, axis),
            ],
            axis=axis,
        )
        for of_prompt, of_past, new, axis in zip(shared, past, (k, v), (2, 3), strict=True)
    )
    seen_RxN = np.ones((rows, slots + filled + 1), bool)
    seen_RxN[:, :slots] = np.repeat(visible_PxT, sequences, axis=0)
    scores_RxHxN = np.einsum("rhk,rhnk->rhn", q, keys_RxHxNxK) / width**0.5
    weights_RxHxN = np.exp(scores_RxHxN) * seen_RxN[:, None]
    sums_RxHxK = np.einsum("rhn,rhkn->rhk", weights_RxHxN, values_RxHxKxN)
    expected_RxHxK = sums_RxHxK / weights_RxHxN.sum(-1, keepdims=True)
    for dtype in (jnp.float32, jnp.bfloat16):
        stored, stored_past = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), (shared, past))
        found = jax.jit(cached_attention)(
            q, k, v, stored, stored_past, visible_PxT, np.int32(filled)
        )
        if not np.allclose(found, expected_RxHxK, rtol=1e-5, atol=1e-5):
            raise NotBuilt(f"the compiled attention of {dtype.__name__} is wrong")


if __name__ == "__main__":
    register(Path(sys.argv[1]))
    check()
