"""A few steps of `small` on one GPU, with MFU: `python -m benchmarks.smoke_gpu`.

Pretraining, a contrastive step and decoding, in bfloat16. Without a GPU it says so and exits 0.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig, MeshConfig, with_overrides
from aria_jax.generate.decoding import Decoding, decode
from aria_jax.generate.weights import decoder_weights
from aria_jax.models.heads import build_model
from aria_jax.presets import chip_of, for_task
from aria_jax.train.loop import run
from aria_jax.train.plan import train_flops_per_token
from benchmarks.bench_train import corpus
from data_pipeline.tokenizer import Tokenizer

SETTINGS = [
    "steps=20",
    "log_every=10",
    "eval_every=1000",
    "dtype=bfloat16",
    "checkpoint_every=1000",
]


def train(task: str, data: Path, *settings: str) -> None:
    """Prints loss, tokens/s and MFU of the last steps."""
    config = with_overrides(for_task("small", task), [*SETTINGS, *settings])
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 1))
    with tempfile.TemporaryDirectory() as workdir:
        metrics = run(config, data, workdir).metrics
    rate = metrics["train/tokens_per_s"]
    chip = chip_of(jax.devices()[0].device_kind)
    mfu = (
        "unknown chip"
        if chip is None
        else f"{rate * train_flops_per_token(config) / chip.flops:.1%}"
    )
    print(f"{task}: loss {metrics['train/loss']:.3f}, {rate:,.0f} tokens/s, MFU {mfu}", flush=True)


def generate() -> None:
    """Prints tokens/s of decoding four sequences."""
    tokenizer = Tokenizer.preset("aria")
    config = for_task("small", "pretrain").model
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=0))
    weights = decoder_weights(model, "bfloat16")
    prompt = np.array([tokenizer.bos_id], np.int64)
    settings = Decoding(max_tokens=256, use_grammar=False)
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        *_, ids = decode(
            weights, tokenizer, prompt, n_sequences=4, key=jax.random.key(0), settings=settings
        )
        seconds = time.perf_counter() - began
    print(f"decode: {ids.size / seconds:,.0f} tokens/s in 4 sequences", flush=True)


def main() -> int:
    """Runs everything, or says why not."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        print(f"skipped: no GPU that jax can use ({str(error).splitlines()[0]})")
        return 0
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    assert jnp.ones(3).sum() == 3
    with tempfile.TemporaryDirectory() as folder:
        data = corpus(Path(folder))
        train("pretrain", data, "global_batch=32")
        train("contrastive", data, "global_batch=32", "seq_len=1024")
    generate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
