"""Compiles several settings for topologies of TPUs or GPUs and prints one table row each.

    python -m benchmarks.compile_table v5p:4x4x4 v5e:8x8 -- --preset medium remat=full
    python -m benchmarks.compile_table v5p:4x4x4 --each remat=full,dots --each global_batch=256,512

Each combination is one `aria-jax compile … --json` in a process of its own, so that a compiler
that runs out of memory ends that row only. What is compiled and how is in `aria_jax.aot`.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence

COLUMNS = (
    "topology", "settings", "GiB a chip", "of", "s a call", "tokens/s a chip", "MFU (all scores)",
    "kernels that spill", "compiled in",
)  # fmt: skip


def combinations(topologies: Sequence[str], each: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every topology with every choice of settings; `each` holds "key=a,b,c"."""
    choices = []
    for one in each:
        key, _, values = one.partition("=")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [
        (topology, list(chosen))
        for topology in topologies
        for chosen in itertools.product(*choices)
    ]


def row(topology: str, settings: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """One line of the table, by a compiler of its own."""
    command = [sys.executable, "-m", "aria_jax.cli.main", "compile", "--json"]
    command += ["--topology", topology, *arguments, *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [topology, " ".join(settings), reason[:80], *[""] * (len(COLUMNS) - 3)]
    report = json.loads(done.stdout.splitlines()[-1])
    gib = 2**30
    settings = [*settings] or ["the preset's"]
    seconds, kernels = report["seconds"], report["kernels"]
    spilling = [k["name"] for k in kernels or () if k["spill_stores"]]
    return [
        topology,
        " ".join(settings),
        f"{report['memory']['total'] / gib:.1f}" + ("" if report["fits"] else " (does not fit)"),
        f"{report['hbm'] / gib:.0f}",
        f"{seconds:.3g}" if seconds else "",
        f"{report['tokens'] / report['chips'] / seconds:,.0f}" if seconds else "",
        f"{report['mfu']:.1%} ({report['mfu_full']:.1%})" if seconds else "",
        "" if kernels is None else f"{len(spilling)} of {len(kernels)}",
        f"{report['compile_seconds']:.0f} s",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topologies", nargs="+", metavar="TOPOLOGY")
    parser.add_argument("--each", action="append", default=[], metavar="KEY=A,B")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for topology, settings in combinations(args.topologies, args.each):
        print("| " + " | ".join(row(topology, settings, argv[split + 1 :])) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
