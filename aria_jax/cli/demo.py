"""`aria-jax demo`: the whole story on a small corpus, by running the commands a user would type;
and the page that ends it: what was trained, what the embeddings know, what was composed.
"""

import argparse
import io
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np

from aria_jax.cli import Verb, Writes, add_overwrite, input_digest
from aria_jax.cli.console import note, say, stage
from aria_jax.report import (
    Provenance,
    Section,
    code,
    confusion_matrix,
    embedding_map,
    link,
    loss_curves,
    paragraph,
    read_metrics,
    side_by_side,
    table,
    write_page,
)
from aria_jax.report.piano_roll import Part, figure_svg, piano_roll_svg
from data_pipeline.artifact import Identity, refuse_occupied, write_atomically
from data_pipeline.errors import UserError
from data_pipeline.midi import read_midi

DESCRIPTION = """\
Sample corpus of real scores, tokenised, pretrained on, contrastively finetuned, embedded, probed
for the composer against honest baselines, and continued; ends with OUT/report.html. Each step is
an `aria-jax` command, shown as it runs; interrupted and run again, the demo goes on where it
stopped.

example:
  aria-jax demo demo-out"""

# Small enough for two CPU cores and a few minutes.
PRETRAIN = "steps=200 warmup_steps=20 eval_every=50 checkpoint_every=50 seq_len=256 global_batch=8"
# Scores carry no touch: all notes are equally loud, and a change of velocity moves a slice further
# than another piece is away. Augmented, so short a run collapses to one point.
_SLICES = (
    "peak_lr=5e-4 global_batch=16 seq_len=256 min_slice_notes=60 max_slice_notes=85 augment=false"
)
CONTRASTIVE = f"steps=100 warmup_steps=10 eval_every=25 checkpoint_every=25 {_SLICES}"
UNTRAINED = f"steps=0 {_SLICES}"
GENERATE = "--seconds 15 --n 2 --max-tokens 384"
EMBED = "--slice-notes 85 --max-tokens 256"


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
        "pitch-class": ["--baseline", "pitch-class"],
    }
    for name, source in sources.items():
        table = str(out / f"embeddings-{name}.parquet")
        steps += [
            Step(f"embed-{name}", f"embed every piece: {name}",
                 ["embed", data, table, *source, *EMBED.split(), "--json"]),
            Step(f"probe-{name}", f"predict the composer: {name}", ["probe", table, *split]),
        ]  # fmt: skip
    return steps


def generation_step(out: Path, prompt: Path) -> Step:
    """Continues a piece no network has seen."""
    return Step(
        "generate",
        "continue a held-out piece",
        ["generate", "--checkpoint", str(out / "pretrain"), "--prompt", str(prompt),
         *GENERATE.split(), "--out", str(out / "continuation"), "--json"],
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs what is not done yet, then writes the report."""
    from aria_jax.embed.table import read_embeddings

    out = Path(args.out)
    refuse_occupied(out, "a demo")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    if args.midi is not None:
        _check_corpus(Path(args.midi))
    if args.overwrite:
        for made in ("steps", "data", "pretrain", "contrastive", "untrained", "continuation"):
            shutil.rmtree(out / made, ignore_errors=True)
        for table in out.glob("embeddings-*.parquet*"):
            shutil.rmtree(table) if table.is_dir() else table.unlink()
    began = time.perf_counter()
    corpus = input_digest(args.midi) if args.midi else None
    steps = steps_before_generation(out, args.midi, args.workers)
    total = len(steps) + 1
    results = {}
    for number, step in enumerate(steps, start=1):
        results[step.name] = _run_step(out, step, number, total, corpus)
    prompt = _held_out_piece(out / "data", Path(args.midi or out / "midi"))
    steps.append(generation_step(out, prompt))
    results["generate"] = _run_step(out, steps[-1], total, total, corpus)
    stage("writing the report")
    page = out / "report.html"
    embeddings = read_embeddings(out / "embeddings-contrastive.parquet")
    write_demo_report(
        page,
        DemoResults(
            out=out,
            prompt=prompt,
            results=results,
            commands=[(step.title, step.command) for step in steps],
            embedding=embeddings.embedding,
            composers=[name or "unknown" for name in embeddings.column("composer")],
            made_by=args.command_line,
        ),
    )
    say(f"done in {time.perf_counter() - began:.0f} s\nopen {page}")
    return 0


DEMO = Verb(
    DESCRIPTION,
    add_arguments,
    run,
    Writes(lambda args: [Path(args.out) / "report.html"], ("midi",), in_folder=True),
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


@dataclass(frozen=True)
class DemoResults:
    """What the demo's commands said.

    Attributes:
        out: the demo's folder.
        prompt: the MIDI file that was continued.
        results: JSON result of each step by its name.
        commands: (title, command line) of each step.
        embedding: float32 [N, E], contrastive embedding of each piece.
        composers: of each piece.
        made_by: the demo's own command line.
    """

    out: Path
    prompt: Path
    results: dict[str, dict[str, Any]]
    commands: Sequence[tuple[str, str]]
    embedding: np.ndarray
    composers: Sequence[str]
    made_by: str


FEATURES = {
    "contrastive": "contrastive embedding",
    "untrained": "the same network, untrained",
    "pitch-class": "pitch-class histogram (12 numbers)",
}


def write_demo_report(path: Path, demo: DemoResults) -> None:
    """Writes the page; every number on it comes from `demo.results` or the runs' metrics."""
    build = demo.results["build"]
    intro = paragraph(
        f"{build['n_accepted']:,} pieces, {build['hours']:.1f} hours, "
        f"{build['n_tokens']:,} tokens; {build['n_train']} to learn from, {build['n_val']} held "
        "out, no composition on both sides. Everything below was computed by the run that wrote "
        "this page."
    )
    sections = [
        _training(demo),
        _probe(demo),
        Section("A map of the embeddings", _map(demo)),
        _continuation(demo),
        _commands(demo),
    ]
    write_page(path, "aria_jax demo", intro, sections, Provenance(demo.made_by))


def _training(demo: DemoResults) -> Section:
    pictures = []
    for run, title in (("pretrain", "next token (nats)"), ("contrastive", "contrastive")):
        curves = read_metrics(demo.out / run / "metrics.jsonl", "loss")
        pictures.append(figure_svg(loss_curves(curves, title)))
    note = paragraph(
        "Pretraining predicts the next token; contrastive finetuning then pulls two slices of one "
        "performance together and pushes those of others away (SimCLR). The validation batches of "
        "the contrastive loss can be smaller than the training batches, and then so is their loss.",
        "note",
    )
    return Section("Training", side_by_side(*pictures) + note)


def _probe(demo: DemoResults) -> Section:
    probes = {name: demo.results[f"probe-{name}"] for name in FEATURES}
    tuned, untrained = probes["contrastive"], probes["untrained"]
    rows: list[list[str | float]] = [
        [
            FEATURES[name],
            result["accuracy"],
            f"{result['accuracy_ci'][0]:.3f} to {result['accuracy_ci'][1]:.3f}",
            result["macro_f1"],
        ]
        for name, result in probes.items()
    ]
    rows.append(["most frequent composer of training files", tuned["majority_accuracy"], "", ""])
    verdict = _verdict(tuned, untrained)
    best = max(probes, key=lambda name: probes[name]["accuracy"])
    if best == "pitch-class":
        verdict += " Counting pitch classes still does better than both."
    small = ", ".join(f"{name} ({n})" for name, n in tuned["left_out"].items())
    explanation = (
        f"A logistic regression learns the composer from the embeddings of {tuned['n_train']} "
        f"files and is scored on {tuned['n_test']} files that neither it nor the network has seen; "
        "95 % intervals bootstrapped over files."
    )
    if small:
        explanation += f" Composers with too few files are left out: {small}."
    matrix = confusion_matrix(tuned["confusion"], tuned["classes"], "contrastive embedding")
    header = ("features", "accuracy", "95 % interval", "macro-F1")
    return Section(
        "Who composed it?",
        paragraph(verdict, "best")
        + table(header, rows)
        + paragraph(explanation, "note")
        + figure_svg(matrix),
    )


def _verdict(tuned: dict[str, Any], untrained: dict[str, Any]) -> str:
    """Whether training helped, as far as this many files can tell."""
    if tuned["accuracy"] <= untrained["accuracy"]:
        return "The trained embedding does not beat the untrained network here: train longer."
    if tuned["accuracy_ci"][0] > untrained["accuracy_ci"][1]:
        return "The trained embedding beats the untrained network."
    return (
        "The trained embedding scores above the untrained network, but the intervals overlap: "
        f"{tuned['n_test']} files do not settle it."
    )


def _map(demo: DemoResults) -> str:
    return figure_svg(embedding_map(demo.embedding, demo.composers, "one dot a piece (t-SNE)"))


def _continuation(demo: DemoResults) -> Section:
    base = demo.out
    result = demo.results["generate"]
    body = paragraph(
        f"The first 15 seconds of {demo.prompt.stem}, which the network has never seen, and what "
        "it went on with. A network this small after a few minutes has learnt what notes look "
        "like, not yet how music goes."
    )
    original = read_midi(demo.prompt)
    body += "<h3>the piece itself</h3>" + piano_roll_svg([Part.of(original, "original")], (9, 2.4))
    body += f"<p>{link(relpath(demo.prompt, base), demo.prompt.name)}</p>"
    for number, files in enumerate(result["files"], start=1):
        whole, added = read_midi(files["midi"]), read_midi(files["continuation"])
        n_prompt = max(len(whole.notes) - len(added.notes), 0)
        parts = [
            Part.of(whole.slice_notes(0, n_prompt), "prompt"),
            Part.of(whole.slice_notes(n_prompt, len(whole.notes)), "continuation"),
        ]
        body += f"<h3>continuation {number}</h3>" + piano_roll_svg(parts, (9, 2.4))
        links = [
            link(relpath(files[kind], base), text)
            for kind, text in (
                ("midi", "MIDI, prompt and continuation"),
                ("continuation", "MIDI, continuation only"),
                ("page", "listen"),
            )
        ]
        body += f"<p>{' · '.join(links)}</p>"
    return Section("A continuation", body)


def _commands(demo: DemoResults) -> Section:
    lines = [f"# {title}\n{command}" for title, command in demo.commands]
    own = (
        "aria-jax data build YOUR_MIDI_FOLDER my_data\n"
        "aria-jax train pretrain --data my_data --workdir run1 --preset small steps=5000\n"
        "aria-jax train contrastive --data my_data --workdir run2 --preset small --init-from run1\n"
        "aria-jax embed YOUR_MIDI_FOLDER emb.parquet --checkpoint run2\n"
        "aria-jax generate --checkpoint run1 --prompt YOUR.mid --out continuations"
    )
    return Section(
        "Do it again",
        paragraph("The commands this page was made with:")
        + code("\n".join(lines))
        + paragraph("The same on your own files:")
        + code(own),
    )
