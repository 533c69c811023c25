"""Trains tiny models on several meshes in turn; test_meshes.py runs it as several processes.

    python -m tests.launch.meshes CORPUS FOLDER CASES_JSON

Process 0 writes what each case logged to FOLDER/NAME.json.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from aria_jax.config import RunConfig, with_overrides
from aria_jax.presets import for_task
from tests.tiny_models import SOLO_PIANO

SETTINGS = [
    "seq_len=32",
    "global_batch=8",
    "steps=3",
    "log_every=1",
    "eval_every=9",
    "eval_batches=2",
    "warmup_steps=2",
    "min_slice_notes=4",
    "max_slice_notes=8",
    "peak_lr=1e-3",
    "keep_checkpoints=1",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: its task, its mesh (data, fsdp, tensor, sequence), and what else it is told."""

    task: str
    mesh: tuple[int, int, int, int]
    settings: tuple[str, ...] = ()
    init_from: str | None = None
    embed: bool = False
    beside: str | None = None
    """A second corpus, of which 3 rows of 10 are."""

    @property
    def name(self) -> str:
        return "-".join([self.task, *map(str, self.mesh), *self.settings])

    @property
    def config(self) -> RunConfig:
        made = for_task("tiny", self.task)  # type: ignore[arg-type]
        emb_size = 16 if self.task == "contrastive" else None
        model = dataclasses.replace(
            made.model,
            d_model=16,
            n_heads=4,
            n_layers=1,
            max_seq_len=64,
            emb_size=emb_size,
            vocabulary=SOLO_PIANO,
        )
        label = ["label=composer"] if self.task == "classify" else []
        axes = ("data", "fsdp", "tensor", "sequence")
        mesh = [f"mesh.{axis}={size}" for axis, size in zip(axes, self.mesh, strict=True)]
        made = dataclasses.replace(made, model=model)
        return with_overrides(made, [*SETTINGS, *label, *mesh, *self.settings])


class Recorder:
    """A sink that remembers losses and numbers of tokens."""

    def __init__(self):
        self.rows = []

    def write(self, step, metrics, split):
        self.rows.append([step, split, metrics["loss"], metrics.get("n_tokens")])
        for name in sorted(name for name in metrics if name.startswith("loss/")):
            n_tokens = metrics.get(name.replace("loss", "n_tokens"))
            self.rows.append([step, f"{split} {name}", metrics[name], n_tokens])

    def close(self):
        pass


def train(case: Case, corpus: str, folder: Path) -> list:
    """[step, split, loss, n_tokens] of everything that `case` logs."""
    from aria_jax.train.loop import run

    sink = Recorder()
    data = [f"{corpus}:0.7", f"{case.beside}:0.3"] if case.beside else corpus
    run(case.config, data, folder / case.name, init_from=case.init_from, sinks=[sink])
    if case.embed:
        z = embeddings(case, folder / case.name)
        sink.rows += [
            [row, "embed", float(np.abs(z_E).sum()), len(z_E)] for row, z_E in enumerate(z)
        ]
    return sink.rows


def embeddings(case: Case, workdir: Path) -> np.ndarray:
    """Five slices in two batches, embedded over the mesh of the run, float32 [5, E]."""
    from aria_jax.checkpoints.models import load_model
    from aria_jax.embed import encode
    from aria_jax.sharding import make_mesh

    encode.BATCH_TOKENS = 3 * encode.BUCKET
    mesh = make_mesh(case.config.mesh)
    model = load_model(workdir, mesh=mesh).model
    slices = [np.arange(2, 2 + length) for length in (3, 40, 9, 22, 60)]
    return encode.model_encoder(model, pad_id=0, mesh=mesh)(slices)


def main(corpus: str, folder: str, cases: str) -> None:
    from aria_jax.train.processes import join_processes

    first = join_processes() == 0
    for fields in json.loads(cases):
        case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        rows = train(case, corpus, Path(folder))
        if first:
            (Path(folder) / f"{case.name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
