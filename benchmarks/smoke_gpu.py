"""What a GPU says: `python -m benchmarks.smoke_gpu [--out smoke-gpu.json]`, under five minutes.

    kernels      every kernel for GPUs against the plain computation, values and gradients
    pretrain     `small` and `medium`: seconds a step, tokens/s, MFU, memory; and what the estimator
                 of `aria-jax compile` says of that very program
    decode       tokens/s of `small`
    embed        files/s of `small`, from MIDI to Parquet
    contrastive  seconds and bytes of the loss and its gradient, beside the naive one's

A section that fails is reported and the others still run; one that would begin after the budget is
left out, and the report says so. What still runs after `LIMIT_SECONDS` ends the whole: the report
has what was found until then. Exit status 1 where a section failed, was too slow, or a kernel is
wrong. Without a GPU it says so, runs nothing and exits 0.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig, MeshConfig, RunConfig, with_overrides
from aria_jax.embed.encode import model_encoder
from aria_jax.embed.export import export
from aria_jax.embed.pieces import Slicing, open_source
from aria_jax.generate.decoding import Decoding, decode
from aria_jax.generate.weights import decoder_weights
from aria_jax.kernels.attention import attention
from aria_jax.kernels.contrastive import Implementation, PairSharding, pair_statistics
from aria_jax.losses.contrastive import contrastive_loss
from aria_jax.models.heads import build_model
from aria_jax.presets import CHIPS, Chip, chip_of, for_task
from aria_jax.sharding import batch_sharding, make_mesh
from aria_jax.train.objectives import loss_function
from aria_jax.train.plan import tokens_per_step, train_flops_per_token
from aria_jax.train.state import random_state, shardings_of
from aria_jax.train.step import make_train_step
from aria_jax.train.tasks import batch_shapes
from benchmarks.bench_contrastive import naive_loss
from data_pipeline.midi import write_midi
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

BUDGET_SECONDS = 240
"""No section begins later."""
LIMIT_SECONDS = 295
"""No section runs for longer, counted from the start of the first."""


@dataclass(frozen=True)
class Sizes:
    """What the sections run; the tests run the same on a CPU with less.

    Attributes:
        pairs, rows: of the kernels' checks: pairs, and positions of a packed row.
        width: of the vectors of pairs.
        runs: presets that are trained, each with its overrides.
        steps: that are timed, of training.
        preset: that decodes and embeds. tokens: decoded by each of `sequences`.
        files, notes: of the MIDI files that are embedded.
        batches: pairs of the contrastive loss. max_naive: of the naive one, whose memory is O(B²).
    """

    pairs: int = 2048
    rows: int = 2048
    width: int = 512
    runs: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("small", ("global_batch=32",)),
        ("medium", ("global_batch=2",)),
    )
    steps: int = 10
    preset: str = "small"
    tokens: int = 256
    sequences: int = 4
    files: int = 256
    notes: int = 900
    batches: tuple[int, ...] = (4096, 32_768)
    max_naive: int = 32_768


def seconds_of(call: Callable[[], Any], repeats: int = 3) -> float:
    """Of the fastest call, after one that may compile."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def kernels(sizes: Sizes, on_gpu: bool) -> dict[str, Any]:
    """Largest relative error (of norms) of each kernel's outputs and gradients, and whether it is
    small enough.
    """
    keys = jax.random.split(jax.random.key(0), 6)
    found: dict[str, Any] = {}

    def check(name: str, kernel: Callable, plain: Callable, arguments: tuple, most: float) -> None:
        def run(function: Callable, arguments: tuple) -> Any:
            def weighed(*operands: jax.Array) -> tuple[jax.Array, Any]:
                outputs = function(*operands)
                scalars = (jnp.vdot(jnp.cos(jnp.arange(o.size)), o.ravel()) for o in outputs)
                return sum(s.astype(jnp.float32) for s in scalars), outputs

            every = tuple(range(len(arguments)))
            return jax.jit(jax.grad(weighed, every, has_aux=True))(*arguments)

        wide = tuple(a.astype(jnp.float32) for a in arguments)
        with jax.default_matmul_precision("highest"):  # TF32 would be no reference
            expected = jax.tree.leaves(run(plain, wide))
        errors = [
            float(
                jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.maximum(jnp.linalg.norm(b), 1e-9)
            )
            for a, b in zip(jax.tree.leaves(run(kernel, arguments)), expected, strict=True)
        ]
        found[name] = {"error": max(errors), "tolerance": most, "ok": max(errors) <= most}

    def statistics(implementation: Implementation) -> Callable:
        ids = jnp.arange(sizes.pairs, dtype=jnp.int32) // 2

        def both(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            made = pair_statistics(x, y, ids, ids, scale, PairSharding(implementation))
            return made.row_lse, made.column_lse

        return both

    scale = jnp.float32(20.0)
    for dtype, most in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        views = (jax.random.normal(key, (sizes.pairs, sizes.width)) for key in keys[:2])
        x, y = ((z / jnp.linalg.norm(z, axis=1, keepdims=True)).astype(dtype) for z in views)
        kernel = statistics("gpu" if on_gpu else "gpu-interpret")
        check(f"contrastive {dtype.__name__}", kernel, statistics("blockwise"), (x, y), most)
    q, k, v = (jax.random.normal(key, (2, sizes.rows, 4, 64), jnp.bfloat16) for key in keys[3:])
    ids = (jnp.arange(sizes.rows) * 5 // sizes.rows + jnp.arange(2)[:, None]).astype(jnp.int32)
    for name, segments in (("triton", ids), ("cudnn", None)):
        if name == "cudnn" and not on_gpu:
            found["attention cudnn"] = {"skipped": "cuDNN runs on GPUs alone"}
            continue

        def attend(*qkv: jax.Array, how: str, segments: jax.Array | None = segments) -> tuple:
            return (attention(*qkv, segment_ids=segments, implementation=how),)  # type: ignore[arg-type]

        sides = (lambda *z, n=name: attend(*z, how=n)), (lambda *z: attend(*z, how="plain"))
        check(f"attention {name}", *sides, (q, k, v), 2e-2)
    return found


def pretrain(
    preset: str, settings: tuple[str, ...], steps: int, chip: Chip | None
) -> dict[str, Any]:
    """Seconds a step, tokens/s, MFU and memory of one run, and the estimate of the same program."""
    config = with_overrides(for_task(preset, "pretrain"), ["dtype=bfloat16", *settings])
    config = dataclasses.replace(config, mesh=MeshConfig(1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        network, state = random_state(config, mesh)
        loss = loss_function(config, mesh)
        step = make_train_step(config, network.build, loss, shardings_of(state))
        batch = jax.device_put(random_batch(config), batch_sharding(mesh))
        compiled = step.lower(state, batch, np.int32(0)).compile()
        state, metrics = compiled(state, batch, np.int32(0))
        jax.block_until_ready(metrics)
        began = time.perf_counter()
        for number in range(steps):
            state, metrics = compiled(state, batch, np.int32(number + 1))
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - began) / steps
    if not np.isfinite(float(metrics["loss"])):
        raise RuntimeError(f"the loss is {metrics['loss']}")
    memory, rate = compiled.memory_analysis(), tokens_per_step(config) / seconds
    estimate = estimated(compiled.as_text(), chip)
    return {
        "tokens_per_step": tokens_per_step(config),
        "seconds": seconds,
        "tokens_per_s": rate,
        "mfu": chip and rate * train_flops_per_token(config) / chip.flops,
        "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "estimated_seconds": estimate,
        "estimated_over_measured": estimate and estimate / seconds,
    }


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """Rows that no loader made: random ids, nothing masked, one piece a row."""
    rng, shapes = np.random.default_rng(0), batch_shapes(config)
    batch = {name: np.ones(s.shape, s.dtype) for name, s in shapes.items()}
    for name in ("inputs", "targets"):
        batch[name] = rng.integers(0, config.model.vocab_size, shapes[name].shape, np.int32)
    batch["positions"] = np.broadcast_to(
        np.arange(config.data.seq_len, dtype=np.int32), shapes["positions"].shape
    )
    return batch


def estimated(text: str, chip: Chip | None) -> float | None:
    """Seconds of a compiled program by the estimator; None where the GPU has no data sheet."""
    from aria_jax.aot import gpus
    from aria_jax.aot.gpu import Rates
    from aria_jax.aot.roofline import roofline

    family = next((name for name in gpus() if CHIPS[name] is chip), None)
    return None if family is None else roofline(text, Rates.of(f"{family}:1")).seconds


def decoding(sizes: Sizes) -> dict[str, float]:
    """Tokens/s, prompt included, of several sequences and of one."""
    tokenizer = Tokenizer.preset("aria")
    model = build_model(for_task(sizes.preset, "pretrain").model, ComputeConfig(), rngs=nnx.Rngs(0))
    weights = decoder_weights(model, "bfloat16")
    settings = Decoding(max_tokens=sizes.tokens, use_grammar=False)
    prompt, made = np.array([tokenizer.bos_id], np.int64), {}
    for n in sorted({1, sizes.sequences}):

        def run(n: int = n) -> np.ndarray:
            key = jax.random.key(0)
            *_, ids = decode(weights, tokenizer, prompt, n_sequences=n, key=key, settings=settings)
            return ids

        made[f"tokens_per_s_of_{n}"] = run().size / seconds_of(run, repeats=1)
    return made


def embed(sizes: Sizes) -> dict[str, float]:
    """Files/s from MIDI to Parquet, compiled before."""
    rng, tokenizer = np.random.default_rng(0), Tokenizer.preset("aria")
    config = for_task(sizes.preset, "contrastive").model
    model = build_model(config, ComputeConfig(dtype="bfloat16"), rngs=nnx.Rngs(0))
    encode = model_encoder(model, tokenizer.pad_id)
    with tempfile.TemporaryDirectory() as folder:
        midi = Path(folder) / "midi"
        midi.mkdir()
        for number in range(sizes.files):
            write_midi(random_performance(rng, sizes.notes), midi / f"{number}.mid")
        source = open_source(midi, Slicing(), spool=Path(folder) / "spool")
        for turn in range(2):  # the first compiles
            out = Path(folder) / f"{turn}.parquet"
            began = time.perf_counter()
            made = export(source, encode, out, settings={"fingerprint": ""})
            seconds = time.perf_counter() - began
    if made.n_rows != sizes.files:
        raise RuntimeError(f"{made.n_rows} of {sizes.files} files were embedded")
    return {"files": sizes.files, "seconds": seconds, "files_per_s": sizes.files / seconds}


def contrastive(sizes: Sizes) -> dict[str, Any]:
    """Seconds and bytes of loss and gradient, of the blockwise and the naive one, in float32."""
    found: dict[str, Any] = {}
    for n in sizes.batches:
        z1, z2 = jax.random.normal(jax.random.key(n), (2, n, sizes.width))
        losses = {
            "aria_jax": lambda z1, z2: contrastive_loss(z1, z2, temperature=0.1)[0],
            "naive": lambda z1, z2: naive_loss(z1, z2, 0.1),
        }
        for name, loss in losses.items():
            if name == "naive" and n > sizes.max_naive:
                continue
            compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(z1, z2).compile()
            memory = compiled.memory_analysis()
            found[f"{name} {n}"] = {
                "seconds": seconds_of(lambda c=compiled, z1=z1, z2=z2: c(z1, z2)),
                "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
                "loss": float(compiled(z1, z2)[0]),
            }
    return found


def sections(sizes: Sizes, chip: Chip | None, on_gpu: bool) -> dict[str, Callable[[], dict]]:
    """In the order of what must be known first."""
    runs = {
        f"pretrain {preset}": partial(pretrain, preset, settings, sizes.steps, chip)
        for preset, settings in sizes.runs
    }
    return {
        "kernels": lambda: kernels(sizes, on_gpu),
        **runs,
        "decode": lambda: decoding(sizes),
        "contrastive": lambda: contrastive(sizes),
        "embed": lambda: embed(sizes),
    }


def measure(
    todo: dict[str, Callable[[], dict]],
    budget: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    *,
    limit: float = LIMIT_SECONDS,
    too_slow: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """What the sections found; errors of those that failed, names of those left out.

    Args:
        too_slow: called from another thread after `limit` seconds, with what was found until then;
            a section that waits for a GPU or its compiler cannot be stopped from within.
    """
    began, running = clock(), ""
    found: dict[str, Any] = {"sections": {}, "failed": {}, "left_out": []}

    def late() -> None:
        failed = {**found["failed"], running: f"still running after {limit:.0f} s"}
        left_out = [name for name in todo if name not in {**found["sections"], **failed}]
        too_slow({**found, "failed": failed, "left_out": left_out, "seconds": limit})

    timer = threading.Timer(limit, late)
    timer.daemon = True
    timer.start()
    for running, section in todo.items():
        if clock() - began > budget:
            found["left_out"].append(running)
            print(f"{running}: left out, {budget:.0f} s are over", flush=True)
            continue
        start = clock()
        try:
            made = section()
        except Exception as error:  # the others are still worth knowing
            traceback.print_exc()
            found["failed"][running] = f"{type(error).__name__}: {error}"
            print(f"{running}: FAILED, {error}", flush=True)
            continue
        found["sections"][running] = made
        print(f"{running} ({clock() - start:.0f} s)", *_lines(made), sep="\n  ")
        sys.stdout.flush()
    timer.cancel()
    return {**found, "seconds": clock() - began}


def _lines(found: dict[str, Any]) -> list[str]:
    rows = found if all(isinstance(row, dict) for row in found.values()) else {"": found}
    return [
        f"{name}: ".lstrip(": ")
        + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        for name, row in rows.items()
    ]


def succeeded(found: dict[str, Any]) -> bool:
    """Whether no section failed and every kernel is right."""
    checks = found["sections"].get("kernels", {}).values()
    return not found["failed"] and all(check.get("ok", True) for check in checks)


def main(arguments: list[str] | None = None) -> int:
    """Runs everything, or says why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("smoke-gpu.json"), help="(smoke-gpu.json)")
    args = parser.parse_args(arguments)
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        print(f"skipped: no GPU that jax can use ({str(error).splitlines()[0]})")
        return 0
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)

    def report(found: dict[str, Any]) -> int:
        made = {"device": device.device_kind, "jax": jax.__version__, **found}
        args.out.write_text(json.dumps(made, indent=1) + "\n")
        said = "passed" if succeeded(found) else "FAILED"
        print(f"{args.out}: {found['seconds']:.0f} s, {said}", flush=True)
        return 0 if succeeded(found) else 1

    def give_up(found: dict[str, Any]) -> None:
        for name, reason in found["failed"].items():
            print(f"{name}: FAILED, {reason}", flush=True)
        os._exit(report(found))

    todo = sections(Sizes(), chip_of(device.device_kind), on_gpu=True)
    return report(measure(todo, too_slow=give_up))


if __name__ == "__main__":
    sys.exit(main())
