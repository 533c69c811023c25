"""Training speed on this machine, against a plain PyTorch implementation of the same network.

    python -m benchmarks.bench_train [--preset tiny] [--steps 5] [--rounds 5]

One process, float32, the sides take turns: a few steps of aria_jax, a few of PyTorch, and again, so
that whatever else the machine does falls on both. aria_jax with the softmax over all ids, as
PyTorch has it, and over those that piano can have (model.vocabulary=corpus): the same loss where no
other id has a probability, but less work, so that row is no comparison of implementations. Then
batches from a loader against one batch given again and again. PyTorch is optional: pip install
torch.
"""

import argparse
import dataclasses
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from aria_jax.config import CORPUS, MeshConfig, RunConfig
from aria_jax.presets import for_task
from aria_jax.sharding import batch_sharding, make_mesh
from aria_jax.train.init import InitFrom
from aria_jax.train.objectives import loss_function
from aria_jax.train.state import first_state, shardings_of
from aria_jax.train.step import make_train_step
from aria_jax.train.tasks import build_task, resolve
from tests.corpora import random_performance, write_corpus


def our_steps(config: RunConfig, batches: Iterator[dict]) -> Callable[[int], float]:
    """n -> seconds for n steps of the training loop's own compiled step."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    network, state, _ = first_state(config, mesh, InitFrom("scratch", None, ""), None, {})
    loss = loss_function(config, mesh)
    step = make_train_step(config, network.build, loss, shardings_of(state))
    sharding = batch_sharding(mesh)
    held = {"state": state, "number": 0}

    def run(n: int) -> float:
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            for _ in range(n):
                batch = jax.device_put(next(batches), sharding)
                held["state"], metrics = step(held["state"], batch, np.int32(held["number"]))
                held["number"] += 1
            float(metrics["loss"])
        return time.perf_counter() - began

    return run


def torch_steps(config: RunConfig, batch: dict) -> Callable[[int], float]:
    """The same for PyTorch: forward, backward, clipping and AdamW of a network written plainly."""
    import torch

    from benchmarks.torch_model import Decoder

    model = Decoder(config.model)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=o.peak_lr,
        betas=(o.b1, o.b2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )
    inputs, targets = (torch.from_numpy(batch[n]).long() for n in ("inputs", "targets"))

    def run(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            logits = model(inputs)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
            optimizer.step()
            float(loss.detach())
        return time.perf_counter() - began

    return run


def interleaved(sides: dict[str, Callable[[int], float]], steps: int, rounds: int) -> dict:
    """Least seconds a step of each side, after a warm-up; sides take turns."""
    for run in sides.values():
        run(2)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(run(steps) / steps)
    return {name: min(values) for name, values in seconds.items()}


def corpus(folder: Path) -> Path:
    """Token shards of 200 made-up pieces."""
    from data_pipeline.tokenizers import Tokenizer

    rng, tokenizer = np.random.default_rng(0), Tokenizer.preset("aria")
    pieces = [(tokenizer.encode(random_performance(rng, 800)), {}) for _ in range(200)]
    write_corpus(folder, "train", pieces)
    return folder


def bench(preset: str, steps: int, rounds: int, data: Path) -> dict:
    """All sides of one preset."""
    config = dataclasses.replace(for_task(preset, "pretrain"), mesh=MeshConfig(1, 1, 1))
    batches = build_task(config, data).train.iterate()
    batch = next(batches)

    def again() -> Iterator[dict]:
        while True:
            yield batch

    model = dataclasses.replace(config.model, vocabulary=CORPUS)
    closed = resolve(dataclasses.replace(config, model=model), data)
    sides = {
        "aria_jax": our_steps(config, again()),
        "aria_jax, loader": our_steps(config, batches),
        f"aria_jax, vocabulary of {closed.model.n_rows}": our_steps(closed, again()),
    }
    if importlib.util.find_spec("torch"):
        sides["torch"] = torch_steps(config, batch)
    seconds = interleaved(sides, steps, rounds)
    tokens = config.data.global_batch * config.data.seq_len
    result = {"preset": preset, "tokens_per_step": tokens}
    result["tokens_per_s"] = {name: round(tokens / s) for name, s in seconds.items()}
    result["loader / synthetic"] = round(seconds["aria_jax"] / seconds["aria_jax, loader"], 3)
    if "torch" in seconds:
        for name in (name for name in seconds if name.startswith("aria_jax")):
            result[f"{name} / torch"] = round(seconds["torch"] / seconds[name], 3)
    else:
        result["torch"] = "not installed (pip install torch)"
    return result


def main() -> None:
    """Prints one JSON line per preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", action="append", help="tiny and small by default")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = corpus(Path(folder))
        for preset in args.preset or ("tiny", "small"):
            print(json.dumps(bench(preset, args.steps, args.rounds, data)), flush=True)


if __name__ == "__main__":
    main()
