"""`aria-jax demo`: the whole story on a small corpus, by running the commands a user would type."""

import argparse
import io
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from aria_jax.checkpoints import RELEASED_ENCODER, RELEASED_LM
from aria_jax.cli import Verb, Writes, add_overwrite, input_digest
from aria_jax.cli.console import note, say, stage
from data_pipeline.artifact import Identity, refuse_occupied, write_atomically
from data_pipeline.errors import UserError

DESCRIPTION = """\
Sample corpus of real scores, tokenised, pretrained on, contrastively finetuned, embedded, probed
for the composer against honest baselines, and continued; beside it what the two models that come
with the package make of the same; ends with OUT/report.html. Each step is an `aria-jax` command,
shown as it runs; interrupted and run again, the demo goes on where it stopped.

example:
  aria-jax demo demo-out"""

# Small enough for two CPU cores and a few minutes; two thirds of a step would be logits of ids that
# no score has.
PRETRAIN = (
    "steps=200 warmup_steps=20 eval_every=50 checkpoint_every=50 seq_len=256 global_batch=8 "
    "vocabulary=corpus"
)
# Scores carry no touch: all notes are equally loud, and a change of velocity moves a slice further
# than another piece is away. Augmented, so short a run collapses to one point.
_SLICES = (
    "peak_lr=5e-4 global_batch=16 seq_len=256 min_slice_notes=60 max_slice_notes=85 augment=false "
    "vocabulary=corpus"
)
CONTRASTIVE = f"steps=100 warmup_steps=10 eval_every=25 checkpoint_every=25 {_SLICES}"
UNTRAINED = f"steps=0 {_SLICES}"
FEATURES = {
    "contrastive": "contrastive embedding",
    "untrained": "the same network, untrained",
    RELEASED_ENCODER: f"{RELEASED_ENCODER}, which comes with the package",
    "pitch-class": "pitch-class histogram (12 numbers)",
}
"""What the report says of each embedding, in its order."""
NETWORKS = {
    "generate": "The network of this demo: after a few minutes it has learnt what notes look like, "
    "not yet how music goes.",
    f"generate-{RELEASED_LM}": f"{RELEASED_LM}, which comes with the package, trained for hours on "
    "recorded music.",
}
"""What the report says of each step that continues a piece."""
GENERATE = "--seconds 15 --n 2 --max-tokens 384"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `aria-jax demo`."""
    parser.add_argument("out", help="folder for everything the demo makes")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--midi",
        help="labelled MIDI files to use instead of the sample corpus (with metadata.json)",
    )
    add_overwrite(parser)


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        name: of the file that keeps its result.
        title: what it does, in a few words.
        arguments: after `aria-jax`.
    """

    name: str
    title: str
    arguments: Sequence[str]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["aria-jax", *self.arguments])


def steps_before_generation(out: Path, midi: str | None, workers: int) -> list[Step]:
    """Everything that can be planned before the corpus exists."""
    corpus, data = midi or str(out / "midi"), str(out / "data")
    split = ["--split-column", "split", "--label", "composer", "--json"]
    steps = []
    if midi is None:
        sample = ["data", "sample", corpus, "--workers", str(workers), "--json"]
        steps.append(Step("sample", "render real scores to MIDI", sample))
    steps += [
        Step("build", "tokenise into shards",
             ["data", "build", corpus, data, "--filters", "none", "--val-fraction", "0.25",
              "--workers", str(workers), "--json"]),
        Step("pretrain", "learn to predict the next token",
             ["train", "pretrain", "--data", data, "--workdir", str(out / "pretrain"),
              "--preset", "tiny", "--json", *PRETRAIN.split()]),
        Step("contrastive", "learn which slices belong together",
             ["train", "contrastive", "--data", data, "--workdir", str(out / "contrastive"),
              "--preset", "tiny", "--init-from", str(out / "pretrain"), "--json",
              *CONTRASTIVE.split()]),
        Step("untrained", "the same network, untrained",
             ["train", "contrastive", "--data", data, "--workdir", str(out / "untrained"),
              "--preset", "tiny", "--json", *UNTRAINED.split()]),
    ]  # fmt: skip
    sources = {
        "contrastive": ["--checkpoint", str(out / "contrastive")],
        "untrained": ["--checkpoint", str(out / "untrained")],
        RELEASED_ENCODER: ["--checkpoint", RELEASED_ENCODER],
        "pitch-class": ["--baseline", "pitch-class"],
    }
    for name, source in sources.items():
        table = str(out / f"embeddings-{name}.parquet")
        steps += [
            Step(f"embed-{name}", f"embed every piece: {name}",
                 ["embed", data, table, *source, "--json"]),
            Step(f"probe-{name}", f"predict the composer: {name}", ["probe", table, *split]),
        ]  # fmt: skip
    return steps


def generation_steps(out: Path, prompt: Path) -> list[Step]:
    """Continue a piece that neither network has seen: the demo's own, then the released one."""
    return [
        Step(
            name,
            f"continue a held-out piece: {whose}",
            ["generate", "--checkpoint", checkpoint, "--prompt", str(prompt),
             *GENERATE.split(), "--out", str(out / folder), "--json"],
        )
        for name, whose, checkpoint, folder in (
            ("generate", "the network just trained", str(out / "pretrain"), "continuation"),
            (f"generate-{RELEASED_LM}", f"the released {RELEASED_LM}", RELEASED_LM,
             "continuation-released"),
        )
    ]  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs what is not done yet, then writes the report."""
    from aria_jax.embed.table import read_embeddings
    from aria_jax.report.demo import DemoResults, write_demo_report

    out = Path(args.out)
    refuse_occupied(out, "a demo")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    if args.midi is not None:
        _check_corpus(Path(args.midi))
    if args.overwrite:
        for made in ("steps", "data", "pretrain", "contrastive", "untrained"):
            shutil.rmtree(out / made, ignore_errors=True)
        for folder in out.glob("continuation*"):
            shutil.rmtree(folder)
        for table in out.glob("embeddings-*.parquet*"):
            shutil.rmtree(table) if table.is_dir() else table.unlink()
    began = time.perf_counter()
    corpus = input_digest(args.midi) if args.midi else None
    steps = steps_before_generation(out, args.midi, args.workers)
    total = len(steps) + len(generation_steps(out, out))
    results = {}
    for number, step in enumerate(steps, start=1):
        results[step.name] = _run_step(out, step, number, total, corpus)
    prompt = _held_out_piece(out / "data", Path(args.midi or out / "midi"))
    for step in generation_steps(out, prompt):
        steps.append(step)
        results[step.name] = _run_step(out, step, len(steps), total, corpus)
    stage("writing the report")
    page = out / "report.html"
    tables = {
        name: read_embeddings(out / f"embeddings-{name}.parquet")
        for name in ("contrastive", RELEASED_ENCODER)
    }
    write_demo_report(
        page,
        DemoResults(
            out=out,
            prompt=prompt,
            results=results,
            commands=[(step.title, step.command) for step in steps],
            features=FEATURES,
            networks=NETWORKS,
            maps={
                name: (table.embedding, [c or "unknown" for c in table.column("composer")])
                for name, table in tables.items()
            },
            made_by=args.command_line,
        ),
    )
    say(f"done in {time.perf_counter() - began:.0f} s\nopen {page}")
    return 0


DEMO = Verb(
    DESCRIPTION,
    add_arguments,
    run,
    Writes(lambda args: [Path(args.out) / "report.html"], ("midi",), in_folder=True, source="midi"),
)


def _check_corpus(folder: Path) -> None:
    """Raises `UserError` where there is nothing to learn from, before the first step."""
    from data_pipeline.build.sources import is_midi_name, no_midi_files

    if not folder.is_dir():
        raise UserError(f"--midi {folder}: no such folder")
    if not any(is_midi_name(path.name) for path in folder.rglob("*")):
        raise no_midi_files(folder)


def _run_step(out: Path, step: Step, number: int, total: int, corpus: str | None) -> dict:
    """The step's JSON result; from its file where the same command has finished before."""
    from aria_jax.cli.main import run_verb

    kept = out / "steps" / f"{step.name}.json"
    identity = Identity("a step of the demo", 1, {"midi": corpus}, {"command": step.command})
    if kept.is_file():
        before = json.loads(kept.read_text())
        if Identity.from_json(before.get("identity")) == identity:
            note(f"[{number}/{total}] {step.title}: done before")
            return before["result"]
    note(f"[{number}/{total}] {step.title}\n  $ {step.command}")
    began = time.perf_counter()
    try:
        with redirect_stdout(io.StringIO()) as printed:
            status = run_verb(step.arguments[0], step.arguments[1:])
    except UserError as error:
        raise UserError(f"step {number} ({step.title}): {error}") from error
    if status == 130:  # a training that was interrupted has saved what it learnt
        raise KeyboardInterrupt
    result = json.loads(printed.getvalue().splitlines()[-1])
    result["wall_s"] = round(time.perf_counter() - began, 1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps({"identity": identity.to_json(), "result": result}))
    return result


def _held_out_piece(data: Path, corpus: Path) -> Path:
    """The MIDI file of the held-out piece nearest to 300 notes: long enough, and quick to show."""
    from data_pipeline.shards import TokenShards

    shards = TokenShards(data, "val")
    return corpus / shards[int(abs(shards.n_notes - 300).argmin())].meta["path"]
