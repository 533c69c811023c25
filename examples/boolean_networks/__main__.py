"""`python -m examples.boolean_networks OUT`: does an embedding of trajectories tell what made them?

Published Boolean networks are simulated, undisturbed and with every gene knocked out or
over-expressed; so are random networks of canalising and of other rules. The trajectories become
event series and go through the commands of music: data build, train contrastive, embed, probe,
retrieve. OUT/report.html holds what came out, beside baselines that need no network.

No initial state, and no random network, is on both sides.
"""

import argparse
import io
import json
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aria_jax.cli.console import note, stage
from aria_jax.cli.main import run_verb
from aria_jax.embed.table import Embeddings, read_embeddings, write_embeddings
from examples.boolean_networks.trajectories import FEATURES, TASKS, corpus, descents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLICE = "data.min_slice_notes=12 data.max_slice_notes=28 data.seq_len=60"
MODEL = "d_model=64 n_heads=4 n_layers=2 emb_size=64"
MOVES = "augmentation.tempo=0.2 augmentation.jitter=0.3 augmentation.channel_dropout=0.1"


# --- the commands --------------------------------------------------------------------------------


class Commands:
    """Runs `aria-jax …` and keeps what was run."""

    def __init__(self) -> None:
        self.run: list[str] = []

    def __call__(self, line: str) -> dict[str, Any]:
        """The JSON result of a command; UserError where it fails."""
        self.run.append(f"aria-jax {line}")
        note(f"$ aria-jax {line}")
        verb, *arguments = line.split()
        with redirect_stdout(io.StringIO()) as printed:
            run_verb(verb, [*arguments, "--json"])
        return json.loads(printed.getvalue().splitlines()[-1])


def study(out: Path, steps: int, scale: float, seed: int) -> dict[str, Any]:
    """Everything but the page; what was measured."""
    aria_jax = Commands()
    began = time.perf_counter()
    stage("simulating")
    runs, falls = corpus(scale, seed), descents(max(20, round(150 * scale)), seed)
    series, paths = runs.write(out / "series", "runs"), falls.write(out / "paths", "descents")
    for kind in ("state", "activity", "flips"):
        write_embeddings(runs.baseline(kind), out / f"{kind}.parquet")
    simulated_s = time.perf_counter() - began
    built = aria_jax(f"data build {series} {out}/corpus --tokenizer events --dedup none")
    common = f"train contrastive --data {out}/corpus --preset tiny {MODEL} {SLICE} {MOVES}"
    common += f" data.global_batch=64 optimizer.peak_lr=1e-3 train.seed={seed}"
    aria_jax(f"{common} --workdir {out}/trained steps={steps} eval_every={max(steps // 4, 1)}")
    aria_jax(f"{common} --workdir {out}/untrained steps=0")
    for name in ("trained", "untrained"):
        aria_jax(f"embed {out}/corpus {out}/{name}.parquet --checkpoint {out}/{name} --workers 0")
    aria_jax(f"embed {paths} {out}/descents.parquet --checkpoint {out}/trained --workers 0")
    probes: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    for task in TASKS:
        wanted = _only(out, task)
        for name in FEATURES:
            probes[task][name] = aria_jax(
                f"probe {wanted[name]} --label label --split-column split --min-per-class 4"
            )
    near = {
        name: aria_jax(f"retrieve {out}/attractor/{name}.parquet --by label") for name in FEATURES
    }
    return {
        "series": built["n_accepted"],
        "events": built["n_notes"],
        "tokens": built["n_tokens"],
        "simulated_s": simulated_s,
        "seconds": time.perf_counter() - began,
        "probes": probes,
        "retrieval": near,
        "commands": aria_jax.run,
    }


def _only(out: Path, task: str) -> dict[str, Path]:
    """The embeddings of the runs of one task, whose class is then called "label"; the test split is
    the same for all.
    """
    found = {}
    for name in FEATURES:
        table = read_embeddings(out / f"{name}.parquet")
        rows = [i for i, labels in enumerate(table.labels) if task in labels]
        labels = [
            {
                "label": table.labels[i][task],
                "composition": table.labels[i]["composition"],
                "split": "test" if table.labels[i]["split"] == "test" else "train",
            }
            for i in rows
        ]
        at = np.array(rows)
        part = Embeddings(
            [table.path[i] for i in rows], [table.sha256[i] for i in rows], table.embedding[at],
            table.n_slices[at], table.n_notes[at], table.duration_ms[at], labels, table.fingerprint,
        )  # fmt: skip
        found[name] = out / task.replace(" ", "-") / f"{name}.parquet"
        write_embeddings(part, found[name])
    return found


# --- the page ------------------------------------------------------------------------------------


def landscape(out: Path) -> "Figure":
    """Waddington's picture: where runs from the progenitor are in the embedding, two principal
    components of it; the deeper, the more runs end there.
    """
    from matplotlib.figure import Figure
    from scipy.stats import gaussian_kde
    from sklearn.decomposition import PCA

    table = read_embeddings(out / "descents.parquet")
    place = PCA(2, random_state=0).fit_transform(table.embedding)
    names = np.array([labels["attractor"] for labels in table.labels])
    step = np.array([int(labels["step"]) for labels in table.labels])
    # Names count up run by run: a run begins where the step is 0 again.
    run = np.cumsum(step == 0)
    last = np.append(run[1:] != run[:-1], True)
    rng = np.random.default_rng(0)
    ends = place[last] + rng.normal(scale=0.02 * np.ptp(place), size=(int(last.sum()), 2))
    low, high = place.min(axis=0), place.max(axis=0)
    margin = 0.12 * (high - low)
    grids = [np.linspace(a - m, b + m, 90) for a, b, m in zip(low, high, margin, strict=True)]
    x, y = np.meshgrid(*grids)
    density = gaussian_kde(ends.T, 0.35)(np.stack([x.ravel(), y.ravel()])).reshape(x.shape)
    height = -np.log(density / density.max() + 0.03)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    flat = figure.add_subplot(1, 2, 1)
    flat.contourf(x, y, height, levels=14, cmap="Greys_r", alpha=0.6)
    solid = figure.add_subplot(1, 2, 2, projection="3d")
    solid.plot_surface(x, y, height, cmap="viridis", linewidth=0, rstride=1, cstride=1)
    solid.set_box_aspect((1.3, 1.3, 0.5), zoom=1.25)
    solid.view_init(55, 70)
    solid.set_axis_off()
    for number, name in enumerate(sorted(set(names))):
        colour, own = f"C{number}", np.unique(run[names == name])
        for one in own[:25]:
            points = place[run == one]
            flat.plot(*points.T, color=colour, alpha=0.3, linewidth=0.8)
        finals = place[last & (names == name)]
        flat.scatter(*finals.T, s=12, color=colour, label=f"{name} ({len(own)})", zorder=3)
    flat.scatter(*place[step == 0][:1].T, marker="*", s=140, color="black", label="progenitor")
    flat.legend(fontsize=8, frameon=False)
    flat.set_xlabel("first principal component of the embedding")
    flat.set_ylabel("second")
    return figure


def table_of(found: dict[str, Any]) -> list[list[str | float]]:
    """A row a task: classes, runs, the most frequent class, then the score of each feature."""
    rows: list[list[str | float]] = []
    for task, text in TASKS.items():
        one = found["probes"][task]["trained"]
        scores = [found["probes"][task][name]["accuracy"] for name in FEATURES]
        n_classes = len(one["classes"])
        rows.append([text, n_classes, one["n_test"], one["majority_accuracy"], *scores])
    return rows


def write_report(out: Path, found: dict[str, Any], made_by: str) -> Path:
    """OUT/report.html and OUT/landscape.png."""
    from aria_jax.report import (
        Provenance,
        Section,
        code,
        loss_curves,
        paragraph,
        read_metrics,
        save_chart,
        table,
        write_page,
    )
    from aria_jax.report.piano_roll import figure_svg

    picture = landscape(out)
    save_chart(picture, out / "landscape.png", made_by)
    header = ["", "classes", "test runs", "most frequent", *FEATURES.values()]
    near = [[FEATURES[name], one["mrr"]] for name, one in found["retrieval"].items()]
    curves = read_metrics(out / "trained" / "metrics.jsonl", "loss")
    sections = [
        Section(
            "What is told from a run",
            table(header, table_of(found))
            + paragraph(
                "Accuracy of a logistic regression on runs from initial states, and of random "
                "networks, that neither it nor the network has seen.", "note",
            ),
        ),
        Section(
            "Near in the embedding",
            table(("attractor of the nearest runs", "mean reciprocal rank"), near),
        ),
        Section(
            "Waddington's landscape",
            figure_svg(picture)
            + paragraph(
                "Runs of the myeloid network from the progenitor, embedded after every flip: the "
                "embedding's two principal components. Height is minus the logarithm of the "
                "density of where runs end.", "note",
            ),
        ),
        Section("Training", figure_svg(loss_curves(curves, "contrastive"))),
        Section("Commands", code("\n".join(found["commands"]))),
    ]  # fmt: skip
    intro = paragraph(
        f"{found['series']:,} trajectories of Boolean networks, {found['events']:,} events, "
        f"simulated in {found['simulated_s']:.0f} s; everything in {found['seconds']:.0f} s."
    )
    page = out / "report.html"
    write_page(page, "Boolean networks as event series", intro, sections, Provenance(made_by))
    return page


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the study and writes its page; what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.boolean_networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder for everything that is made")
    parser.add_argument("--steps", type=int, default=400, help="of training (400)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of runs (1)")
    parser.add_argument("--seed", type=int, default=0, help="of simulation and training (0)")
    args = parser.parse_args(argv)
    found = study(args.out, args.steps, args.scale, args.seed)
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    command = f"python -m examples.boolean_networks {args.out} --steps {args.steps}"
    page = write_report(args.out, found, f"{command} --scale {args.scale} --seed {args.seed}")
    for task, row in zip(TASKS, table_of(found), strict=True):
        scores = zip(FEATURES, row[4:], strict=True)
        print(f"{task:<12}" + "  ".join(f"{name} {score:.3f}" for name, score in scores))
    print(f"{found['seconds']:.0f} s; open {page}")
    return found


if __name__ == "__main__":
    main()
