"""`aria-jax train`: pretrain, continue, contrastive, classify."""

import argparse
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

DESCRIPTION = """\
Train a model on token shards (made by `aria-jax data build`).

tasks:
  pretrain     predict the next token
  continue     the same on pieces with a <D> token 100 tokens before their end, so that the model
               learns to finish; start it from a pretrained checkpoint
  contrastive  slices of one performance attract, slices of different ones repel (SimCLR)
  classify     learn a label, data.label=composer

A run lives in its --workdir: checkpoints, metrics.jsonl, TensorBoard events. The same command run
again goes on where it stopped. Ctrl-C and SIGTERM stop it after the step under way, with a
checkpoint.

Settings are given as key=value, e.g. steps=2000 peak_lr=1e-4 data.global_batch=32 dtype=bfloat16
mesh.fsdp=4; a wrong key is answered with the nearest right ones.

examples:
  aria-jax train pretrain --data my_data --workdir run1 --preset small steps=5000
  aria-jax train contrastive --data my_data --workdir run2 --preset small --init-from run1
  aria-jax train classify --data my_data --workdir run3 --init-from run1 data.label=composer"""

# Settings may stand before, between and after the options.
PARSE = argparse.ArgumentParser.parse_intermixed_args
TASKS = ("pretrain", "continue", "contrastive", "classify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax train`."""
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", required=True, help="folder of token shards")
    parser.add_argument("--workdir", required=True, help="folder of the run; made if needed")
    parser.add_argument("--preset", default="tiny", help="tiny, small or medium (default: tiny)")
    parser.add_argument(
        "--init-from", metavar="C", help="workdir or published .safetensors to start from"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the preset")


def run(args: argparse.Namespace) -> int:
    """Runs the training; 0 when done, 1 when it was interrupted."""
    from aria_jax.cli.console import print_result
    from aria_jax.config import for_task, with_overrides
    from data_pipeline.shards import load_manifest

    config = with_overrides(for_task(args.preset, args.task), args.settings).validate()
    load_manifest(args.data)  # before the seconds that importing jax takes

    from aria_jax.train.loop import run as train
    from aria_jax.train.metrics import JsonlSink, MetricSink, TensorBoardSink
    from aria_jax.train.processes import join_processes

    first = join_processes() == 0
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    sinks: list[MetricSink] = []
    if first:
        sinks = [
            JsonlSink(workdir / "metrics.jsonl"),
            TensorBoardSink(workdir / "tensorboard"),
            ProgressSink(config.train.steps, args.task),
        ]
    try:
        result = train(
            config,
            args.data,
            workdir,
            init_from=args.init_from,
            sinks=sinks,
            on_start=lambda start: print(start.sentence, file=sys.stderr),
        )
    finally:
        for sink in sinks:
            sink.close()
    shown = {name: round(value, 5) for name, value in result.metrics.items()}
    summary = {"step": result.final_step, "interrupted": result.interrupted, "metrics": shown}
    text = f"step {result.final_step}: " + ", ".join(
        f"{name} {shown[name]:.4g}" for name in ("train/loss", "val/loss") if name in shown
    )
    if result.interrupted:
        text += "\ninterrupted; run the same command again to go on"
    if first:
        print_result({**summary, "workdir": str(workdir)}, args.json, text)
    return 1 if result.interrupted else 0


class ProgressSink:
    """A progress bar with loss, tokens a second and time left."""

    def __init__(self, steps: int, task: str):
        from tqdm import tqdm

        self._bar = tqdm(total=steps, desc=task, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._shown: dict[str, str] = {}

    def write(self, step: int, metrics: Mapping[str, float], split: str) -> None:
        """Moves the bar to `step`."""
        self._shown[f"{split} loss"] = f"{metrics['loss']:.3f}"
        if "tokens_per_s" in metrics:
            self._shown["tokens/s"] = f"{metrics['tokens_per_s']:,.0f}"
        if self._bar.n == 0 and step > self._bar.total // 100 + 1:
            self._bar.initial = step  # resumed: the rate counts this session's steps only
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(self._shown)

    def close(self) -> None:
        """Leaves the bar on the screen."""
        self._bar.close()
