"""Files embedded a second: one slice at a time against `aria-jax embed`'s way, in one run.

    python -m benchmarks.bench_embed MIDI_DIR [--files 40] [--preset tiny] [--rounds 3]

One at a time, as aria/embedding.py does it: read, tokenise, and run the whole network on each slice
by itself, padded to 2,048 tokens as its evaluation pads. A second, kinder version pads a slice to
the next multiple of 64 only. Reading and tokenising are the same on both sides; compilation is not
timed, starting a worker process is.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig
from aria_jax.embed.encode import CPU_BATCH_TOKENS, length_bucketed_batches, model_encoder
from aria_jax.embed.export import export
from aria_jax.embed.pieces import Piece, Rejection, Slicing, open_source
from aria_jax.models.heads import Model, build_model
from aria_jax.presets import for_task
from data_pipeline.tokenizers import Tokenizer

PAD = Tokenizer.preset("aria").pad_id


class Subset:
    """Some files of a source."""

    def __init__(self, source, files):
        self._source, self._files = source, list(files)
        self.paths = [source.paths[i] for i in self._files]

    def piece(self, i: int) -> Piece | Rejection:
        return self._source.piece(self._files[i])


def one_at_a_time(source, model: Model, multiple: int):
    """Seconds to embed every file slice by slice, after compiling; and the embeddings."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens: jax.Array, eos: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens)[:, eos[0]]  # every position, as the reference does

    def embed(ids: np.ndarray) -> np.ndarray:
        tokens = np.full((1, -(-len(ids) // multiple) * multiple), PAD, np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(run(state, tokens, np.array([len(ids) - 1]))[0])

    lengths = {len(ids) for i in range(len(source.paths)) for ids in source.piece(i).slices}
    for length in {-(-n // multiple) * multiple for n in lengths}:
        embed(np.full(length, PAD))
    began = time.perf_counter()
    rows = [
        np.mean([embed(ids) for ids in source.piece(i).slices], axis=0)
        for i in range(len(source.paths))
    ]
    return time.perf_counter() - began, np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("midi_dir", type=Path)
    parser.add_argument("--files", type=int, default=40, help="evenly spread over the folder (40)")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="best of (3)")
    args = parser.parse_args()
    config = for_task(args.preset, "contrastive").model
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(params=0))
    with tempfile.TemporaryDirectory() as folder:
        everything = open_source(args.midi_dir, Slicing(), spool=Path(folder) / "spool")
        chosen = np.linspace(0, len(everything.paths) - 1, args.files).astype(int)
        source = Subset(everything, [i for i in chosen if isinstance(everything.piece(i), Piece)])
        n, encode = len(source.paths), model_encoder(model, PAD)
        slices = [ids for i in range(n) for ids in source.piece(i).slices]
        batches = length_bucketed_batches(slices, PAD, batch_tokens=CPU_BATCH_TOKENS)
        computed = sum(tokens.size for _, tokens, _ in batches)
        used = sum(map(len, slices))
        print(
            f"{n} files, {len(slices)} slices, {used:,} tokens; padding {1 - used / computed:.1%}"
        )
        encode(slices)  # compiles
        best = {"2,048": np.inf, "64": np.inf, "aria-jax": np.inf}
        for turn in range(args.rounds):
            for name, multiple in (("2,048", 2048), ("64", 64)):
                seconds, rows = one_at_a_time(source, model, multiple)
                best[name] = min(best[name], seconds)
            out = Path(folder) / f"{turn}.parquet"
            began = time.perf_counter()
            export(source, encode, out, settings={"fingerprint": ""}, workers=args.workers)
            best["aria-jax"] = min(best["aria-jax"], time.perf_counter() - began)
        check(out, rows)
    print(f"one at a time, padded to 2,048          {n / best['2,048']:7.2f} files/s")
    print(f"one at a time, padded to a multiple of 64 {n / best['64']:5.2f} files/s")
    print(
        f"aria-jax embed                          {n / best['aria-jax']:7.2f} files/s"
        f"   x{best['2,048'] / best['aria-jax']:.1f}, x{best['64'] / best['aria-jax']:.1f}"
    )


def check(out: Path, expected: np.ndarray) -> None:
    """A fast wrong answer is no speed."""
    from aria_jax.embed.table import read_embeddings

    np.testing.assert_allclose(read_embeddings(out).embedding, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
