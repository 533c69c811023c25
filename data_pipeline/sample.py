"""A small corpus of real, labelled, public-domain music, rendered from the scores music21 ships.

The only module that imports music21 (the `demo` extra), and only inside its worker function.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata as packages
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.artifact import write_atomically
from data_pipeline.errors import UserError
from data_pipeline.midi import NOTE, TEMPO, Performance, midi_bytes
from data_pipeline.workers import map_in_order

# Folder of the music21 corpus -> composer label. Folders with too few scores to learn from, and
# the collections of single-line folk tunes but one, are left out.
COMPOSERS = {
    "bach": "bach",
    "palestrina": "palestrina",
    "monteverdi": "monteverdi",
    "trecento": "trecento",
    "ryansMammoth": "fiddle tunes",
    "mozart": "mozart",
    "beethoven": "beethoven",
    "haydn": "haydn",
    "schumann_robert": "schumann",
    "josquin": "josquin",
    "joplin": "joplin",
    "chopin": "chopin",
}
# A late Beethoven quartet takes 20 s to parse, as long as 100 chorales. (.mxl is compressed.)
MAX_BYTES = {".mxl": 60_000, ".krn": 60_000, ".abc": 60_000, ".xml": 300_000, ".musicxml": 300_000}
TICKS_PER_BEAT = 480
VELOCITY = 72  # scores carry no touch; a constant invents none
GRACE_TICKS = 60
UNMARKED_ONSET_SECONDS = 0.3  # median time between onsets where a score has no tempo mark


@dataclass(frozen=True)
class SampleSummary:
    """What `sample` did.

    Attributes:
        n_pieces: pieces in the corpus now, those of earlier runs included.
        per_composer: pieces of each composer.
        failed: (score, reason) of scores that could not be rendered.
    """

    n_pieces: int
    per_composer: dict[str, int]
    failed: tuple[tuple[str, str], ...]


def sample(
    out_dir: str | Path,
    *,
    per_composer: int = 60,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> SampleSummary:
    """Renders up to `per_composer` scores of each composer to MIDI, with `metadata.json` beside.

    Pieces rendered by an earlier run are kept as they are, so an interrupted run goes on.

    Raises:
        UserError: music21 is not installed, or `out_dir` is a file.
    """
    if find_spec("music21") is None:
        raise UserError("the sample corpus comes from music21: pip install 'aria-jax[demo]'")
    out_dir = Path(out_dir)
    if out_dir.is_file():
        raise UserError(f"{out_dir} is a file; name a directory for the corpus")
    corpus = _corpus_dir()
    chosen = _choose(corpus, per_composer)
    rows = [_labels(score) for score in chosen]
    todo = [(s, out_dir / r["path"]) for s, r in zip(chosen, rows, strict=True)]
    todo = [(score, path) for score, path in todo if not path.exists()]
    # The longest first, or at the end one process works on it alone.
    todo.sort(key=lambda task: _length(corpus / task[0]), reverse=True)
    failed: list[tuple[str, str]] = []
    if progress and todo:
        progress(0, len(todo))
    reasons = map_in_order(_render, todo, workers=workers, ahead=len(todo), chunk=1)
    for done, ((score, _), reason) in enumerate(zip(todo, reasons, strict=True), start=1):
        if reason:
            failed.append((score, reason))
        if progress:
            progress(done, len(todo))
    rows = [row for row in rows if (out_dir / row["path"]).exists()]
    write_atomically(out_dir / "metadata.json", json.dumps(rows, indent=1).encode())
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["composer"]] += 1
    return SampleSummary(len(rows), dict(counts), tuple(sorted(failed)))


def _corpus_dir() -> Path:
    """The folder of scores, found without the second that importing music21 takes."""
    for file in packages.files("music21") or ():
        if file.match("music21/corpus/__init__.py"):
            return Path(str(file.locate())).parent
    raise UserError("this music21 has no corpus; reinstall it: pip install 'aria-jax[demo]'")


def _length(score: Path) -> float:
    """How long a score takes to render, as a share of what is allowed."""
    return score.stat().st_size / MAX_BYTES[score.suffix]


def _choose(corpus: Path, per_composer: int) -> list[str]:
    """Relative paths of the scores to render, the same on every machine."""
    chosen = []
    for folder in COMPOSERS:
        scores = [
            path.relative_to(corpus).as_posix()
            for path in (corpus / folder).rglob("*")
            if path.stat().st_size <= MAX_BYTES.get(path.suffix, 0)
        ]
        # A hash, not the alphabet: 60 neighbouring files would be three masses or one opus.
        scores.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        # Some movements come as .krn and .mxl: one of them is enough.
        one_per_piece = {Path(name).with_suffix(""): name for name in reversed(scores)}
        chosen += sorted(list(reversed(one_per_piece.values()))[:per_composer])
    return chosen


def _labels(score: str) -> dict[str, str]:
    """The metadata row of a score: path, title, composer, and the composition it is part of."""
    path = Path(score)
    folder, stem = path.parts[0], path.stem
    if folder == "palestrina":  # Gloria_54 is a movement of mass 54
        work = f"mass {(re.findall(r'[0-9]+', stem) or ['0'])[-1]}"
    elif folder == "bach":  # bwv248.35-3c is a number of BWV 248
        work = stem.split(".")[0]
    elif len(path.parts) > 2:  # mozart/k155/movement1
        work = path.parts[1]
    else:
        work = stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join([*path.parts[1:-1], stem]))
    return {
        "path": f"{folder}/{name}.mid",
        "title": " ".join([*path.parts[1:-1], stem]),
        "composer": COMPOSERS[folder],
        "composition": f"{COMPOSERS[folder]}: {work}",
    }


def _render(task: tuple[str, Path]) -> str | None:
    """Renders a score to a path; the reason where that is impossible."""
    import music21

    score, path = task
    try:
        parsed = music21.converter.parse(_corpus_dir() / score, forceSource=True)
        notes, beats_per_minute = _notes(parsed.stripTies()), _marked_tempo(parsed)
    except Exception as error:  # music21 raises anything at all on an odd score
        return f"{type(error).__name__}: {error}"
    if len(notes) < 16:
        return "fewer than 16 notes"
    path.parent.mkdir(parents=True, exist_ok=True)
    performance = _performance(notes, beats_per_minute or _fitting_tempo(notes))
    write_atomically(path, midi_bytes(performance))
    return None


def _notes(score: Any) -> np.ndarray:
    """Notes of all parts as rows (start, end, pitch), in ticks; unisons once, the longest."""
    rows: dict[tuple[int, int], int] = {}
    for element in score.flatten().notes:
        start = round(float(element.offset) * TICKS_PER_BEAT)
        length = round(float(element.quarterLength) * TICKS_PER_BEAT) or GRACE_TICKS
        for pitch in getattr(element, "pitches", ()):
            if 21 <= pitch.midi <= 108:
                key = (start, pitch.midi)
                rows[key] = max(rows.get(key, 0), start + length)
    return np.array([(start, end, pitch) for (start, pitch), end in sorted(rows.items())])


def _marked_tempo(score: Any) -> float | None:
    """The score's first metronome mark in quarters per minute, if it names a number."""
    for mark in score.flatten().getElementsByClass("MetronomeMark"):
        if mark.number:
            return float(mark.getQuarterBPM())
    return None


def _fitting_tempo(notes: np.ndarray) -> float:
    """A tempo at which half of the onsets follow each other within `UNMARKED_ONSET_SECONDS`.

    Old music is notated in long values: at 120 quarters a minute Palestrina would crawl.
    """
    beats = np.median(np.diff(np.unique(notes[:, 0]))) / TICKS_PER_BEAT
    return float(np.clip(beats / UNMARKED_ONSET_SECONDS * 60, 60, 400))


def _performance(notes: np.ndarray, quarters_per_minute: float) -> Performance:
    rows = np.zeros(len(notes), NOTE)
    rows["start"], rows["end"], rows["pitch"] = notes.T
    rows["velocity"] = VELOCITY
    tempi = np.array([(0, round(60e6 / quarters_per_minute))], TEMPO)
    return Performance(TICKS_PER_BEAT, rows, tempi=tempi)
