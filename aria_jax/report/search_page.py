"""The page of a search: the query and what was found, to listen to and to compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path

import numpy as np

from aria_jax.report.page import Provenance, Section, link, paragraph, table, write_page
from aria_jax.report.piano_roll import PLAYER_SCRIPT, Part, player
from data_pipeline.midi import Performance

SECONDS = 60
"""Of each piece that its player holds."""


@dataclass(frozen=True)
class Found:
    """A performance near the query.

    Attributes:
        score: cosine similarity.
        quantile: share of random pairs of embeddings that are less similar; None if unknown.
        file: its MIDI file; None where that is not at hand.
        performance: what the row stands for, the file or a slice of it; None as `file`.
        same_file: whether it is the query itself.
    """

    score: float
    quantile: float | None
    path: str
    labels: dict[str, str]
    file: Path | None
    performance: Performance | None
    same_file: bool


def write_search_page(
    path: str | Path,
    query_file: Path,
    query: Performance,
    found: Sequence[Found],
    *,
    missing: str,
    made_by: Provenance,
) -> None:
    """Writes a self-contained page: query, table of scores, a player for each performance found.

    Args:
        missing: said in place of a player where a MIDI file is not at hand.
    """
    folder = Path(path).resolve().parent
    names = sorted({name for hit in found for name in hit.labels} - {"split", "title"})
    rows: list[list[str | float]] = [
        [
            str(rank),
            hit.score,
            "" if hit.quantile is None else f"{100 * hit.quantile:.1f} %",
            _name(hit),
            *(hit.labels.get(name, "") for name in names),
        ]
        for rank, hit in enumerate(found, start=1)
    ]
    header = ("", "cosine", "of random pairs are further apart", "file", *names)
    sections = [
        Section("The query", _listen(query, query_file, folder)),
        Section("Nearest performances", table(header, rows)),
    ]
    for rank, hit in enumerate(found, start=1):
        body = paragraph(missing, "note")
        if hit.performance is not None and hit.file is not None:
            body = _listen(hit.performance, hit.file, folder)
        sections.append(Section(f"{rank}. {_name(hit)} ({hit.score:.3f})", body))
    intro = PLAYER_SCRIPT + paragraph(
        "Cosine similarity of embeddings: 1 is the same direction. How much a number means depends "
        "on the model, so each stands beside the share of random pairs of these embeddings that "
        f"are further apart. Players hold the first {SECONDS} seconds.",
        "note",
    )
    write_page(path, f"Nearest to {query_file.name}", intro, sections, made_by)


def _listen(performance: Performance, file: Path, folder: Path) -> str:
    """A player of the first `SECONDS` from the first note on, and a link to the file."""
    part = Part.of(performance, "")
    begin = part.start_ms.min() if len(part.start_ms) else 0
    early = part.start_ms < begin + SECONDS * 1000
    shown = Part(
        label="",
        pitch=part.pitch[early],
        velocity=part.velocity[early],
        start_ms=part.start_ms[early] - begin,
        end_ms=np.minimum(part.end_ms[early] - begin, SECONDS * 1000),
    )
    target = relpath(file.resolve(), folder)
    return f"{player([shown])}<p>{link(target, file.name)}</p>"


def _name(hit: Found) -> str:
    return f"{hit.path} (the query itself)" if hit.same_file else hit.path
