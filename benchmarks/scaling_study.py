"""How the loss of next tokens falls with compute: three sizes of `mini` by several budgets.

    python -m benchmarks.scaling_study DATA OUT [--budgets 4e12,8e12,1.6e13] [--plot FILE.png]

A budget is a number of FLOPs (forward and backward), not of minutes, so that a busy machine changes
nothing but the time. Each size is trained once for each budget, with a learning rate that has
fallen at its end; what is done is kept in OUT/runs.jsonl, and run again the study goes on. Then
L(C) = E + A / C^a is fitted to the lowest loss of each budget, and both are drawn. On two quiet
cores (about 60 GFLOP/s) the budgets given are 1, 2 and 4 minutes; 5e13 to 1.5e14 are 15 to 40.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from aria_jax.config import RunConfig, with_overrides
from aria_jax.presets import for_task
from aria_jax.train.loop import run
from aria_jax.train.plan import tokens_per_step, train_flops_per_token
from aria_jax.train.tasks import resolve

SIZES = {"128 x 4": (128, 4, 4), "192 x 4": (192, 6, 4), "256 x 4": (256, 8, 4)}
"""Width × layers: width, heads, layers."""


def config_of(size: str, budget: float, data: Path, settings: list[str]) -> RunConfig:
    """A run of `mini`'s recipe with another shape and as many steps as the budget allows."""
    width, heads, layers = SIZES[size]
    run_config = for_task("mini", "pretrain")
    model = dataclasses.replace(run_config.model, d_model=width, n_heads=heads, n_layers=layers)
    changed = with_overrides(dataclasses.replace(run_config, model=model), settings)
    resolved = resolve(changed, data)
    steps = round(budget / (train_flops_per_token(resolved) * tokens_per_step(resolved)))
    if steps < 1:
        raise SystemExit(f"a budget of {budget:g} FLOPs is less than one step of {size}")
    warmup = min(resolved.optimizer.warmup_steps, steps // 5)
    return with_overrides(
        resolved,
        [f"steps={steps}", f"warmup_steps={warmup}", "checkpoint_every=1000000",
         f"eval_every={steps}", "keep_checkpoints=1"],
    )  # fmt: skip


def fitted(compute: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """E, A and a of L = E + A / C^a, C in 1e12 FLOPs, by least squares over a grid of exponents."""
    best: dict[str, float] = {}
    for exponent in np.linspace(0.02, 1.0, 99):
        design = np.stack([np.ones_like(compute), (compute / 1e12) ** -exponent], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(design, loss, rcond=None)
        error = float(np.square(design @ [floor, scale] - loss).sum())
        if floor >= 0 and error < best.get("error", np.inf):
            best = {"E": float(floor), "A": float(scale), "a": float(exponent), "error": error}
    return best


def plot(rows: list[dict], fit: dict[str, float], path: str) -> None:
    """Loss against compute, a line for each size, and the fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for size in SIZES:
        points = sorted((row["flops"], row["val_loss"]) for row in rows if row["size"] == size)
        axes.plot(*zip(*points, strict=True), "o-", label=size)
    if fit:
        budgets = sorted({row["flops"] for row in rows})
        grid = np.geomspace(budgets[0], 10 * budgets[-1], 50)
        label = f"{fit['E']:.2f} + {fit['A']:.2f} / C^{fit['a']:.2f}"
        axes.plot(grid, fit["E"] + fit["A"] * (grid / 1e12) ** -fit["a"], "k--", label=label)
    axes.set(xscale="log", xlabel="FLOPs", ylabel="validation loss, nats per token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains what is missing, prints a JSON line for each run, then the fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", default="4e12,8e12,1.6e13")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--plot")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    log = args.out / "runs.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    for budget in map(float, args.budgets.split(",")):
        for size in args.sizes.split(","):
            key = {"size": size, "flops": budget, "settings": args.settings}
            if any(row | key == row for row in rows):
                continue
            config = config_of(size, budget, args.data, args.settings)
            workdir = args.out / f"{size.replace(' ', '')}-{budget:g}"
            result = run(config, args.data, workdir)
            row = {**key, "steps": config.train.steps, "val_loss": result.metrics["val/loss"],
                   "train_loss": result.metrics["train/loss"]}  # fmt: skip
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    budgets = sorted({row["flops"] for row in rows})
    lowest = [min(row["val_loss"] for row in rows if row["flops"] == b) for b in budgets]
    fit = fitted(np.array(budgets), np.array(lowest)) if len(budgets) > 2 else {}
    print(json.dumps({"fit": fit}), flush=True)
    if args.plot:
        plot(rows, fit, args.plot)


if __name__ == "__main__":
    main()
