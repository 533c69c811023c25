"""An export of a million files, stage by stage, and a search among a million rows.

    python -m benchmarks.bench_export [MIDI_DIR] [--files 1000000] [--read 4000] [--embedded 1000]
    python -m benchmarks.bench_export --search [--rows 1000000]

Files are few and repeated: so many links to those of MIDI_DIR, or to 64 made up here. Every stage
is measured by itself, one process, and says with how many files; hours for a million are those in
proportion. What is done for every file whatever the model (claims, writing parts, joining them,
bringing them up to date) is measured with a network's stand-in that costs nothing; the tiny model
is one of 16 numbers in one layer, so that its stage shows what surrounds a network.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from flax import nnx

from aria_jax.config import ComputeConfig, ModelConfig
from aria_jax.embed.encode import model_encoder
from aria_jax.embed.export import export
from aria_jax.embed.index import recall
from aria_jax.embed.pieces import Piece, Slicing, open_source
from aria_jax.embed.search import Searcher, search
from aria_jax.embed.table import Embeddings, Rows, write_embeddings
from aria_jax.models.heads import build_model
from data_pipeline.artifact import hashed, rows_digest
from data_pipeline.build.sources import entry_digest, walk_folder
from data_pipeline.midi import midi_bytes
from data_pipeline.tokenizers import Tokenizer
from tests.corpora import random_performance

MILLION = 1_000_000
WIDTH = 512
FOLDER_FILES = 1000
MADE_UP, NOTES = 64, 2800


class Repeated:
    """A source of so many files, which costs nothing to read: a few pieces, again and again.

    Args:
        changed: every n-th file is another one than without.
    """

    warnings = ()
    reading = "standard"

    def __init__(self, pieces: list[Piece], n: int, changed: int = 0):
        self._pieces, self._changed = pieces, changed
        self.paths = range(n)

    def piece(self, i: int) -> Piece:
        """One of the pieces under a name and a digest of its own."""
        edition = bool(self._changed) and i % self._changed == 0
        found = self._pieces[i % len(self._pieces)]
        return replace(found, path=f"{i // 1000:04d}/{i:07d}.mid", sha256=f"{i:062x}{edition:02x}")

    def digests(self) -> dict[str, str | None]:
        """Of what it holds."""
        return {"files": rows_digest([len(self.paths), self._changed]), "labels": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("midi_dir", nargs="?", type=Path)
    parser.add_argument("--files", type=int, default=MILLION, help="listed, claimed, written")
    parser.add_argument("--hashed", type=int, default=200_000, help="of which so many are hashed")
    parser.add_argument("--read", type=int, default=4000, help="files read and tokenised")
    parser.add_argument("--embedded", type=int, default=1000, help="files through the tiny model")
    parser.add_argument("--search", action="store_true", help="search instead")
    parser.add_argument("--rows", type=int, default=MILLION)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-export-") as scratch:
        if args.search:
            measure_search(Path(scratch), args.rows)
        else:
            measure_export(Path(scratch), args)


def stage(name: str, n: int, do: Callable[[], object]) -> object:
    """Prints files per second of what `do` does for n files, and hours for a million."""
    began, worked = time.perf_counter(), time.process_time()
    result = do()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    print(
        f"| {name} | {n:,} | {seconds:.1f} | {worked:.1f} | {n / seconds:,.0f} | "
        f"{MILLION / n * seconds / 3600:.2f} |",
        flush=True,
    )
    return result


def measure_export(scratch: Path, args: argparse.Namespace) -> None:
    few = made_up(scratch / "few") if args.midi_dir is None else copied(args.midi_dir, scratch)
    many = scratch / "many"
    for i in range(args.files):
        if i % FOLDER_FILES == 0:
            (folder := many / f"{i // FOLDER_FILES:04d}").mkdir(parents=True)
        os.link(few[i % len(few)], folder / f"{i:07d}.mid")
    size = sum(path.stat().st_size for path in few) / len(few)
    print(f"{len(few)} files of {size / 1e3:.0f} kB on average, repeated\n")
    print("| stage | files measured | s | CPU s | files/s | h for 1,000,000 |")
    print("|---|---|---|---|---|---|")
    entries = stage("list the folders", args.files, lambda: list(walk_folder(many)))
    part = entries[: args.hashed]
    stage(
        "hash every file",
        len(part),
        lambda: rows_digest((e.path, d) for e, d in hashed(part, lambda e: entry_digest(many, e))),
    )
    source = open_source(few, Slicing(), spool=scratch / "spool")
    n = args.read
    source.piece(0)  # compiles
    pieces = stage(
        "read, tokenise, slice", n, lambda: [source.piece(i % len(few)) for i in range(n)]
    )
    pieces = [piece for piece in pieces if isinstance(piece, Piece)]
    slices = sum(len(piece.slices) for piece in pieces) / len(pieces)
    tokens = sum(len(ids) for piece in pieces for ids in piece.slices) / len(pieces)
    config = ModelConfig(16, 2, 1, head="embedding", emb_size=WIDTH)
    model = build_model(config, ComputeConfig(), rngs=nnx.Rngs(0))
    encode = model_encoder(model, Tokenizer.preset("aria").pad_id)
    chosen = [ids for piece in pieces[: args.embedded] for ids in piece.slices]
    encode(chosen[:256])  # compiles
    stage("a network of 16 numbers in one layer", args.embedded, lambda: encode(chosen))
    kept = [replace(piece, slices=piece.slices[:1]) for piece in pieces[: len(few)]]
    rng = np.random.default_rng(0)

    def no_network(slices: list) -> np.ndarray:
        return rng.standard_normal((len(slices), WIDTH), np.float32)

    def make(**how: int) -> object:
        return export(
            Repeated(kept, args.files, **how),
            no_network,
            scratch / "e.parquet",
            settings={"fingerprint": "none"},
        )

    stage("claim, write and join parts", args.files, make)
    summary = stage("bring up to date, 1 % changed", args.files, lambda: make(changed=100))
    print(f"\n{slices:.1f} slices and {tokens:,.0f} tokens per file; the update: {summary.changes}")


def made_up(folder: Path) -> list[Path]:
    """Performances as long as those of ASAP are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(MADE_UP):
        (folder / f"{i}.mid").write_bytes(midi_bytes(random_performance(rng, NOTES)))
    return sorted(folder.iterdir())


def copied(midi_dir: Path, scratch: Path) -> list[Path]:
    """Copies of `MADE_UP` files, evenly spread over a folder: links do not cross disks."""
    every = sorted(midi_dir.rglob("*.mid"))
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, MADE_UP).astype(int)]
    return [Path(shutil.copy(file, scratch / f"{i}.mid")) for i, file in enumerate(chosen)]


# --- search --------------------------------------------------------------------------------------


def measure_search(scratch: Path, n_rows: int, n_queries: int = 100) -> None:
    """Of rows around as many centres as a hundredth of them, as near to each other as music is."""
    path, rng = scratch / "e.parquet", np.random.default_rng(0)
    centres = rng.standard_normal((max(n_rows // 100, 1), WIDTH), np.float32)

    def rows(n: int) -> np.ndarray:
        own = centres[rng.integers(0, len(centres), n)]
        return own + rng.standard_normal((n, WIDTH), np.float32)

    write_rows(path, n_rows, rows)
    queries = rows(n_queries)
    began = time.perf_counter()
    plain = [search(query, path, 10) for query in queries[:5]]
    print(f"{n_rows:,} rows of {WIDTH}; cosines of neighbours "
          f"{plain[0][0].score:.2f} … {plain[0][-1].score:.2f}")  # fmt: skip
    print(f"whole file: {(time.perf_counter() - began) / 5:.2f} s a query")
    right = None
    for kind in ("exact", "ivf"):
        began = time.perf_counter()
        searcher = Searcher(path, kind)
        built = time.perf_counter() - began
        folder = path.with_name("e.parquet.index")
        searcher(queries[0])
        times, found, worked = [], [], time.process_time()
        for query in queries:
            began = time.perf_counter()
            found.append([hit.path for hit in searcher(query, 10)])
            times.append(time.perf_counter() - began)
        cpu = (time.process_time() - worked) / n_queries
        ms = 1e3 * np.percentile(times, [0, 50, 90, 100])
        right = right or found
        share = recall(np.array(found), np.array(right))
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        print(
            f"{searcher.about_index}\n  made in {built:.1f} s, {size:.2f} GB in EMB.index; a query "
            f"{ms[0]:.1f} ms (best), {ms[1]:.1f} (median), {ms[2]:.1f} (90 %), {ms[3]:.1f} (all), "
            f"{1e3 * cpu:.1f} ms of CPU; recall@10 of {n_queries} other queries {share:.3f}",
            flush=True,
        )
    for query, expected in zip(queries, plain, strict=False):
        assert [h.path for h in Searcher(path, "exact")(query)] == [h.path for h in expected]


def write_rows(path: Path, n_rows: int, rows: Callable[[int], np.ndarray]) -> None:
    """An embeddings file of row groups as an export has them."""
    import pyarrow.parquet as pq

    one, writer = path.with_name("one.parquet"), None
    for start in range(0, n_rows, 256):
        n = min(256, n_rows - start)
        names = [f"{start + i:08d}.mid" for i in range(n)]
        zeros = np.zeros(n, np.int64)
        write_embeddings(
            Embeddings(names, names, rows(n), zeros, zeros, zeros, [{}] * n, "none"), one
        )
        group = Rows(one).group(0)
        writer = writer or pq.ParquetWriter(path, group.schema)
        writer.write_table(group)
    writer.close()


if __name__ == "__main__":
    main()
