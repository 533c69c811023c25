"""One self-contained HTML page from titled sections; nothing is fetched when it is opened."""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from data_pipeline.artifact import write_atomically
from data_pipeline.errors import printable

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2.5rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem } h2 { margin-top: 2.6rem; font-size: 1.3rem }
svg { max-width: 100%; height: auto } .row { display: flex; flex-wrap: wrap; gap: 1rem }
.row > * { flex: 1 1 380px }
table { border-collapse: collapse } td, th { padding: .3rem .9rem .3rem 0; text-align: left;
       border-bottom: 1px solid #ddd }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f5f2; padding: .8rem 1rem; overflow-x: auto; border-radius: 4px;
      font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere }
.note { color: #555 } .best { font-weight: 600 }
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
    return f"<table>{head}{''.join(map(_row, rows))}</table>"


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
    """Commands to copy."""
    return f"<pre>{html.escape(text)}</pre>"


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
