"""The page that ends the demo: what was trained, what embeddings know, what was composed."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np

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
from data_pipeline.midi import read_midi


@dataclass(frozen=True)
class DemoResults:
    """What the demo's commands said.

    Attributes:
        out: the demo's folder.
        prompt: the MIDI file that was continued.
        results: JSON result of each step by its name.
        commands: (title, command line) of each step.
        features: what each embedding is by its name; "contrastive" and "untrained" are of one
            network, "pitch-class" counts.
        networks: what each composer is by the name of its step.
        maps: of each embedding by its name: float32 [N, E], and the composer of each piece.
        made_by: the demo's own command line.
    """

    out: Path
    prompt: Path
    results: dict[str, dict[str, Any]]
    commands: Sequence[tuple[str, str]]
    features: dict[str, str]
    networks: dict[str, str]
    maps: dict[str, tuple[np.ndarray, Sequence[str]]]
    made_by: str


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
        Section("Maps of the embeddings", _maps(demo)),
        _continuations(demo),
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
    probes = {name: demo.results[f"probe-{name}"] for name in demo.features}
    tuned, untrained = probes["contrastive"], probes["untrained"]
    rows: list[list[str | float]] = [
        [
            demo.features[name],
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


def _maps(demo: DemoResults) -> str:
    pictures = [
        figure_svg(embedding_map(embedding, composers, demo.features[name]))
        for name, (embedding, composers) in demo.maps.items()
    ]
    return side_by_side(*pictures) + paragraph("One dot a piece (t-SNE).", "note")


def _continuations(demo: DemoResults) -> Section:
    body = paragraph(
        f"The first 15 seconds of {demo.prompt.stem}, which neither network has seen, and what "
        "they went on with."
    )
    original = read_midi(demo.prompt)
    body += "<h3>the piece itself</h3>" + piano_roll_svg([Part.of(original, "original")], (9, 2.4))
    body += f"<p>{link(relpath(demo.prompt, demo.out), demo.prompt.name)}</p>"
    for step, network in demo.networks.items():
        body += paragraph(network)
        for number, files in enumerate(demo.results[step]["files"], start=1):
            body += f"<h3>continuation {number}</h3>" + _continuation(files, demo.out)
    return Section("Continuations", body)


def _continuation(files: dict[str, str], base: Path) -> str:
    """Its piano roll, and links to its files."""
    whole, added = read_midi(files["midi"]), read_midi(files["continuation"])
    n_prompt = max(len(whole.notes) - len(added.notes), 0)
    parts = [
        Part.of(whole.slice_notes(0, n_prompt), "prompt"),
        Part.of(whole.slice_notes(n_prompt, len(whole.notes)), "continuation"),
    ]
    links = [
        link(relpath(files[kind], base), text)
        for kind, text in (
            ("midi", "MIDI, prompt and continuation"),
            ("continuation", "MIDI, continuation only"),
            ("page", "listen"),
        )
    ]
    return piano_roll_svg(parts, (9, 2.4)) + f"<p>{' · '.join(links)}</p>"


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
