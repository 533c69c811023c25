"""Charts of runs and corpora: loss curves, a confusion matrix, a map of embeddings, lengths.

Each returns a figure, which `save_chart` writes.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aria_jax.report.page import program_version
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def check_picture(path: str | Path) -> None:
    """Raises `UserError` for a name that does not end like a picture's."""
    if Path(path).suffix.lower() not in PICTURES:
        raise UserError(f"{path}: this will be a picture; name it …{', …'.join(PICTURES)}")


def save_chart(figure: "Figure", path: str | Path, command: str) -> None:
    """Writes a picture of the kind its name says, and under it the command that made it."""
    made_by = textwrap.fill(f"{command} ({program_version()})", 120)
    figure.text(0.01, -0.02, made_by, fontsize=6, color="#777777", va="top")
    figure.savefig(path, dpi=130, bbox_inches="tight")


def read_metrics(path: str | Path, name: str) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of one metric per split, from a run's `metrics.jsonl`.

    A resumed run logs some steps twice; the later line counts.

    Raises:
        UserError: no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no metrics here; is this the --workdir of `aria-jax train`?")
    curves: dict[str, dict[int, float]] = {}
    with Path(path).open() as lines:
        for line in lines:
            row = json.loads(line)
            if row.get(name) is not None:
                curves.setdefault(row["split"], {})[row["step"]] = row[name]
    return {split: (sorted(c), [c[step] for step in sorted(c)]) for split, c in curves.items()}


def loss_curves(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str
) -> "Figure":
    """Loss over steps, one line per split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for split, colour in (("train", "#9db2d6"), ("val", "#d1622b")):
        if split in curves:
            steps, values = curves[split]
            axes.plot(
                steps, values, color=colour, marker="." if split == "val" else "", label=split
            )
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def confusion_matrix(counts_CxC: np.ndarray, classes: Sequence[str], title: str) -> "Figure":
    """True class by row, predicted class by column; colour is the share of the row."""
    from matplotlib.figure import Figure

    size = 2.2 + 0.42 * len(classes)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    counts_CxC = np.asarray(counts_CxC)
    share = counts_CxC / np.maximum(counts_CxC.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts_CxC):
        if count:
            colour = "white" if share[row, column] > 0.55 else "#333333"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def embedding_map(embedding_NxE: np.ndarray, labels: Sequence[str], title: str) -> "Figure":
    """Two dimensions of the embeddings (t-SNE on cosine distances), coloured by label."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    embedding_NxE = np.asarray(embedding_NxE, np.float32)
    neighbours = min(30, max(2, (len(embedding_NxE) - 1) // 3))
    method = TSNE(metric="cosine", init="random", perplexity=neighbours, random_state=0)
    x_Nx2 = method.fit_transform(embedding_NxE)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    names = sorted(set(labels), key=lambda name: (-list(labels).count(name), name))
    for i, name in enumerate(names):
        mine = np.array([label == name for label in labels])
        marker = "osD^vP*X"[i // 10 % 8]
        axes.scatter(
            x_Nx2[mine, 0],
            x_Nx2[mine, 1],
            s=16,
            marker=marker,
            color=f"C{i % 10}",
            label=name,
            alpha=0.85,
        )
    axes.set(xticks=[], yticks=[], title=title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def corpus(
    lengths: Mapping[str, np.ndarray], labels: Mapping[str, Mapping[str, int]], title: str
) -> "Figure":
    """How often each length occurs, and below it the pieces of each label's values.

    Args:
        lengths: of the pieces of each split.
        labels: per label, pieces of each of the values to show, most frequent first.
        title: what the lengths are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2 + 2.6 * len(labels)), layout="constrained")
    axes, *others = figure.subplots(1 + len(labels), squeeze=False)[:, 0]
    largest = max((int(v.max()) for v in lengths.values() if len(v)), default=1)
    edges = np.geomspace(1, max(largest, 2), 40).tolist()
    axes.hist(list(lengths.values()), bins=edges, stacked=True, label=list(lengths))
    axes.set(xscale="log", xlabel=title, ylabel="pieces")
    axes.legend()
    for below, (label, counts) in zip(others, labels.items(), strict=True):
        below.barh(list(counts), list(counts.values()), color="#9db2d6")
        below.invert_yaxis()
        below.set(xlabel="pieces", title=label)
    for each in (axes, *others):
        each.spines[["top", "right"]].set_visible(False)
    return figure
