"""Loaders on a corpus in a bucket beside the same corpus on the disk.

    python -m benchmarks.bench_storage [--pieces 400] [--steps 200]

Servers of both kinds on loopback (moto, gcp-storage-emulator). Prints what it takes until the first
batch, tokens/s of an epoch that begins with nothing here, tokens/s once all is here, in turn with
the disk so that a busy machine slows both alike, and requests per million tokens.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.loaders import BatchStream
from data_pipeline.loaders.windows import lm_windows
from data_pipeline.shards import TokenShards
from data_pipeline.storage import buckets
from data_pipeline.tokenizers import Tokenizer
from tests.buckets import Network, _gcs_env, _gcs_server, _s3_env, _s3_server
from tests.corpora import random_performance, write_corpus

BATCH, LENGTH, ROUNDS = 16, 2048, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pieces", type=int, default=400)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        rng, tokenizer = np.random.default_rng(0), Tokenizer.preset("aria")
        pieces = [(tokenizer.encode(random_performance(rng, 2000)), {}) for _ in range(args.pieces)]
        write_corpus(corpus, "train", pieces, n_shards=8)
        size = sum(file.stat().st_size for file in corpus.iterdir())
        print(f"{args.pieces} pieces, {size / 1e6:.0f} MB in 8 shards; {args.steps} batches of "
              f"{BATCH} × {LENGTH} tokens")  # fmt: skip
        for scheme in ("gs", "s3"):
            measure(scheme, corpus, Path(scratch), args.steps)


def measure(scheme: str, corpus: Path, scratch: Path, steps: int) -> None:
    server, address = _gcs_server() if scheme == "gs" else _s3_server()
    network = Network(address)
    network.up()
    os.environ |= _gcs_env(network) if scheme == "gs" else _s3_env(network)
    os.environ["ARIA_JAX_CACHE"] = str(scratch / "mirror")
    where = f"{scheme}://bench-storage"
    buckets._client(where).mkdir("bench-storage")
    for file in corpus.iterdir():
        buckets.put(file, f"{where}/corpus/{file.name}")
    network.requests.clear()
    began = time.perf_counter()
    remote = stream(f"{where}/corpus")
    remote[0]
    first = time.perf_counter() - began
    tokens = steps * BATCH * LENGTH
    cold = tokens / (seconds(remote, steps) + first)
    n_requests = network.requests.total()
    disk = stream(corpus)
    seconds(disk, steps)  # both have the pieces in memory, as far as they fit
    rounds = [(seconds(disk, steps), seconds(remote, steps)) for _ in range(ROUNDS)]
    there, here = (tokens / min(side) for side in zip(*rounds, strict=True))
    millions = TokenShards(corpus, "train").lengths.sum() / 1e6
    print(
        f"{scheme}: first batch after {first:.2f} s, {cold:,.0f} tokens/s from the bucket, then "
        f"{here:,.0f} beside {there:,.0f} from the disk ({here / there:.1%}); {n_requests} requests"
        f", {n_requests / millions:.1f} per million tokens of the corpus, "
        f"{network.requests.total() - n_requests} more once it is here"
    )
    network.down()
    server.stop()


def stream(corpus: str | Path) -> BatchStream:
    return lm_windows(corpus, split="train", seq_len=LENGTH, global_batch=BATCH, seed=0)


def seconds(batches: BatchStream, steps: int) -> float:
    began = time.perf_counter()
    for step in range(steps):
        batches[step]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
