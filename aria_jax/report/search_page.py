"""The page of a search: the query and what was found, with piano rolls to compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aria_jax.report.page import Section, paragraph, table, write_page
from aria_jax.report.piano_roll import Part, piano_roll_svg
from data_pipeline.midi import Performance

SECONDS = 30
"""Of each piece that its picture shows."""


@dataclass(frozen=True)
class Found:
    """A performance near the query.

    Attributes:
        performance: None where its MIDI file is not at hand.
        same_file: whether it is the query itself.
    """

    score: float
    path: str
    labels: dict[str, str]
    performance: Performance | None
    same_file: bool


def write_search_page(
    path: str | Path, query_name: str, query: Performance, found: Sequence[Found]
) -> None:
    """Writes a self-contained page: query, table of scores, a picture of each performance found."""
    names = sorted({name for hit in found for name in hit.labels} - {"split", "title"})
    rows: list[list[str | float]] = [
        [str(rank), hit.score, _name(hit), *(hit.labels.get(name, "") for name in names)]
        for rank, hit in enumerate(found, start=1)
    ]
    sections = [
        Section("The query", thumbnail(query)),
        Section("Nearest performances", table(("", "cosine", "file", *names), rows)),
    ]
    for rank, hit in enumerate(found, start=1):
        picture = paragraph("its MIDI file is not at hand", "note")
        if hit.performance is not None:
            picture = thumbnail(hit.performance)
        sections.append(Section(f"{rank}. {_name(hit)} ({hit.score:.3f})", picture))
    intro = paragraph(
        "Cosine similarity of embeddings: 1 is the same direction, 0 no relation. Pictures show "
        f"the first {SECONDS} seconds.",
        "note",
    )
    write_page(path, f"Nearest to {query_name}", intro, sections)


def thumbnail(performance: Performance) -> str:
    """Piano roll of the first `SECONDS` from the first note on, as SVG."""
    part = Part.of(performance, "")
    begin = part.start_ms.min() if len(part.start_ms) else 0
    early = part.start_ms < begin + SECONDS * 1000
    shown = Part(
        label="",
        pitch=part.pitch[early],
        velocity=part.velocity[early],
        start_ms=part.start_ms[early] - begin,
        end_ms=part.end_ms[early] - begin,
    )
    return piano_roll_svg([shown], (8, 1.8))


def _name(hit: Found) -> str:
    return f"{hit.path} (the query itself)" if hit.same_file else hit.path
