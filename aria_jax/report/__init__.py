"""Reports: one self-contained HTML page from titled sections; nothing is fetched when it is opened;
and charts of runs and corpora as figures, which `save_chart` writes.
"""

import html
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from data_pipeline.artifact import write_atomically
from data_pipeline.errors import UserError, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")

# Pictures are drawn for white paper: a dark page turns them over and keeps their hues.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #222; --soft: #555; --line: #ddd;
        --code: #f5f5f2 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1a1a1a; --text: #ddd; --soft: #aaa; --line: #444; --code: #262624 }
  svg, canvas, .legend i { filter: invert(.9) hue-rotate(180deg) }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--paper);
       max-width: 960px; margin: 2.5rem auto; padding: 0 1.2rem; overflow-wrap: anywhere }
h1 { font-size: 1.9rem; margin-bottom: .2rem } h2 { margin-top: 2.6rem; font-size: 1.3rem }
svg { max-width: 100%; height: auto } .row { display: flex; flex-wrap: wrap; gap: 1rem }
.row > * { flex: 1 1 380px; min-width: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; overflow-wrap: normal }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem }
td:last-child { overflow-wrap: anywhere; min-width: 6em }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: var(--code); padding: .8rem 1rem; overflow-x: auto; border-radius: 4px;
      font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere }
pre span { white-space: nowrap }
.note { color: var(--soft) } .best { font-weight: 600 }
"""


def program_version() -> str:
    """For reports, e.g. "aria_jax 0.1.0"."""
    return f"aria_jax {version('aria-jax')}"


@dataclass(frozen=True)
class Provenance:
    """What made a report.

    Attributes:
        command: the command line.
        facts: model, seed and the like, in the order in which they are shown.
    """

    command: str
    facts: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """The end of a page: facts as a table, and the command."""
        rows = [
            [name, value] for name, value in (*self.facts.items(), ("made by", program_version()))
        ]
        return f"<h2>How this was made</h2>\n{table((), rows)}{code(self.command)}"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, as HTML."""

    title: str
    body: str


def paragraph(text: str, css_class: str = "") -> str:
    """Text as a paragraph, escaped."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """A table; numbers are aligned right and shown with three decimals."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    head = f"<tr>{cells}</tr>" if header else ""
    return f'<div class="wide"><table>{head}{"".join(map(_row, rows))}</table></div>'


def _row(cells: Sequence[str | float]) -> str:
    shown = []
    for cell in cells:
        if isinstance(cell, str):
            shown.append(f"<td>{html.escape(cell)}</td>")
        else:
            number = f"{cell:,d}" if isinstance(cell, int) else f"{cell:.3f}"
            shown.append(f'<td class="number">{number}</td>')
    return f"<tr>{''.join(shown)}</tr>"


def side_by_side(*parts: str) -> str:
    """Pictures next to each other where the window is wide enough."""
    return f'<div class="row">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def code(text: str) -> str:
    """Commands to copy; no line of them ends within an option, as it would at each hyphen."""
    return "<pre>" + re.sub(r"(?<=\s)(-[-\w]+)", r"<span>\1</span>", html.escape(text)) + "</pre>"


def link(target: str, text: str) -> str:
    """A link to a file beside the page."""
    return f'<a href="{quote(os.fsencode(target))}">{html.escape(text)}</a>'


def write_page(
    path: str | Path,
    title: str,
    intro: str,
    sections: Sequence[Section],
    made_by: Provenance | None = None,
) -> None:
    """Writes the page (UTF-8); only a page that must not tell has no provenance."""
    body = "".join(f"<h2>{html.escape(s.title)}</h2>\n{s.body}\n" for s in sections)
    body += made_by.html() if made_by is not None else ""
    write_atomically(
        path,
        printable(
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
            f"<h1>{html.escape(title)}</h1>\n{intro}\n{body}</html>\n"
        ),
    )


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


def corpus_chart(
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
