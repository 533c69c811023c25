"""Prints how busy the attention kernel keeps the matrix units of a TPU that is not here.

    python -m launch.schedule v5p:2x2x1 v5e:2x2 v6e:2x2 --length 8192

Compiles one block of heads forward and backward and reads the compiler's schedule
(`aria_jax.aot.schedule`). `aria_jax.kernels.attention.packed.BUSY` rests on this table.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError


def compile_kernels(topology: str, length: int, folder: Path) -> None:
    """Writes the schedules of both passes for heads of 64 into a folder."""
    from aria_jax.aot.environment import prepare

    prepare(dump=folder)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from aria_jax.kernels.attention import rope_tables, rotary_attention

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(described.devices[:1]), ("one",))
    shape = jax.ShapeDtypeStruct(
        (1, length, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )

    def scalar(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        cos, sin = rope_tables(jnp.arange(length)[None], 64)
        out = rotary_attention(q, k, v, cos, sin, n_heads=2, implementation="packed")
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(scalar, (0, 1, 2))).trace(shape, shape, shape)
        traced.lower(lowering_platforms=("tpu",)).compile()


def table(topology: str, length: int) -> list[str]:
    """Rows of Markdown, from a compiler of its own."""
    from aria_jax.aot.schedule import KERNELS, kernel_time
    from aria_jax.kernels.attention.packed import tile_of

    tile = tile_of(length)
    rows, family = [], topology.partition(":")[0]
    with tempfile.TemporaryDirectory() as folder:
        one = [sys.executable, "-m", "launch.schedule", topology, "--length", str(length)]
        done = subprocess.run([*one, "--dump", folder], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{topology}: {reason[:200]}")
        for kernel in KERNELS:
            time = kernel_time(Path(folder), family, kernel, -(-length // tile))
            rows.append(f"| {topology} | {kernel} | {time.total:,.0f} | {time.busy:.1%} |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topologies", nargs="+", metavar="TOPOLOGY")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence (8192)")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dump is not None:
        compile_kernels(args.topologies[0], args.length, args.dump)
        return 0
    try:
        return _print_table(args.topologies, args.length)
    except UserError as error:
        print(f"launch.schedule: error: {error}", file=sys.stderr)
        return 2


def _print_table(topologies: Sequence[str], length: int) -> int:
    print("| topology | pass | cycles a block of heads | matrix units busy |\n|---|---|---|---|")
    for topology in topologies:
        print("\n".join(table(topology, length)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
