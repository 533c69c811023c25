"""Time and peak memory of the contrastive loss and its gradient, naive against blockwise.

    python -m benchmarks.bench_contrastive [--rows 1024 4096 ... 65536] [--width 512] [--json]

One process per measurement: the peak of its memory, less what it held before the first call, and
the two views themselves. Naive runs that would not fit into the free memory are left out and
marked. The largest batch on a device of 80 GB is extrapolated from the growth measured here.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROWS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
LIMIT_BYTES = 80e9
"""Of the device that the largest batch is extrapolated for."""


def naive_loss(z1, z2, temperature):
    """The reference's formula on the whole matrix of similarities."""
    import jax
    import jax.numpy as jnp

    z1, z2 = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2))
    logits = z1 @ z2.T / temperature
    positive = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - positive
    columns = jax.nn.logsumexp(logits, axis=0) - positive
    return (rows.mean() + columns.mean()) / 2


def measure(name: str, rows: int, width: int) -> dict[str, float]:
    """Best time of loss and gradient (one call at large sizes) and peak bytes, in this process."""
    import jax

    from aria_jax.losses.contrastive import contrastive_loss

    def blockwise(z1, z2):
        return contrastive_loss(z1, z2, temperature=0.1)[0]

    loss = blockwise if name == "blockwise" else lambda z1, z2: naive_loss(z1, z2, 0.1)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    views = jax.random.normal(jax.random.key(0), (2, rows, width))
    z1, z2 = jax.block_until_ready((views[0], views[1]))
    compiled = step.lower(z1, z2).compile()
    before = resident_bytes()
    times = []
    for _ in range(1 if rows > 8192 else 3):
        began = time.perf_counter()
        value, _ = jax.block_until_ready(compiled(z1, z2))
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": min(times),
        "bytes": peak - before + z1.nbytes + z2.nbytes,
        "process_bytes": peak,
        "loss": float(value),
    }


def resident_bytes() -> int:
    """What this process holds now; where the system does not say, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def in_a_process(name: str, rows: int, width: int) -> dict[str, float]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.bench_contrastive", "--one", name]
    command += ["--rows", str(rows), "--width", str(width)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    return json.loads(done.stdout.splitlines()[-1])


def free_bytes() -> float:
    """What the system could still give, 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next(float(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


def largest_batches(rows: list[dict], width: int) -> dict[str, dict[str, float]]:
    """Pairs that fit into `LIMIT_BYTES`, by the growth between the two largest sizes measured.

    Naive grows with the number of float32 matrices of B², blockwise with that of arrays B × width.
    """
    units = {"naive": lambda n: 4 * n**2, "blockwise": lambda n: 4 * n * width}
    found = {}
    for name, unit in units.items():
        done = [(row["pairs"], row[name]["bytes"]) for row in rows if name in row][-2:]
        if len(done) < 2:
            continue
        (few, less), (many, more) = done
        count = (more - less) / (unit(many) - unit(few))
        left = LIMIT_BYTES - (more - count * unit(many))
        power = 0.5 if name == "naive" else 1
        found[name] = {"count": count, "pairs": (left / count / unit(1)) ** power}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="pairs")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--one", choices=("naive", "blockwise"), help="measure here, print JSON")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.rows[0], args.width)))
        return
    rows = []
    for n in args.rows:
        found = {"pairs": n, "blockwise": in_a_process("blockwise", n, args.width)}
        if 4 * 4 * n**2 < free_bytes():
            found["naive"] = in_a_process("naive", n, args.width)
        rows.append(found)
        if not args.json:
            print(_line(found), flush=True)
    limits = largest_batches(rows, args.width)
    if args.json:
        print(json.dumps({"width": args.width, "rows": rows, "largest_on_80_gb": limits}))
        return
    shapes = {"naive": "matrices of B²", "blockwise": f"arrays of B x {args.width}"}
    print("\nextrapolated to one device of 80 GB, float32:")
    for name, limit in limits.items():
        print(
            f"  {name:<6} {limit['count']:5.1f} {shapes[name]} x 4 bytes = 80e9"
            f"   B = {limit['pairs']:>13,.0f}"
        )


def _line(found: dict) -> str:
    own, naive = found["blockwise"], found.get("naive")
    text = f"{found['pairs']:>7,} pairs"
    text += f"  blockwise {own['seconds']:8.2f} s {own['bytes'] / 1e6:9.0f} MB"
    text += f" (process {own['process_bytes'] / 1e9:.2f} GB)"
    if naive is None:
        return text + "  naive: does not fit"
    return text + (
        f"  naive {naive['seconds']:8.2f} s {naive['bytes'] / 1e6:9.0f} MB"
        f"  time x{naive['seconds'] / own['seconds']:.2f}"
        f"  memory x{naive['bytes'] / max(own['bytes'], 1):.1f}"
        f"  losses differ by {abs(own['loss'] - naive['loss']):.0e}"
    )


if __name__ == "__main__":
    main()
