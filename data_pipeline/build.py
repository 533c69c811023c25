"""A folder or archive of MIDI files to token shards: parallel, and safe to kill at any moment.

The source is listed once and cut into work units; each unit's results are kept on disk as soon
as they are complete; a merge that depends on nothing but those results writes the shards. Run
again after a kill, it goes on with the units that are missing and ends with the same bytes.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import filters as filter_presets
from data_pipeline import metadata as label_sources
from data_pipeline.building.journal import Journal, digest, disk_errors_explained, write_atomically
from data_pipeline.building.merge import MergeSettings, merge
from data_pipeline.building.runners import RUNNERS
from data_pipeline.building.sources import readable_root
from data_pipeline.building.unit_worker import Job, Limits
from data_pipeline.errors import UserError
from data_pipeline.shards import FORMAT_VERSION, MANIFEST, load_manifest
from data_pipeline.tokenizer import Tokenizer

DEDUP = ("exact", "none")


@dataclass(frozen=True)
class BuildSummary:
    """What a build made.

    Attributes:
        rejected: number of files by "stage/reason".
        hours: of music in the accepted pieces.
    """

    out_dir: str
    n_files: int
    n_accepted: int
    n_rejected: int
    n_train: int
    n_val: int
    n_tokens: int
    n_notes: int
    hours: float
    rejected: dict[str, int]


def build(
    midi_dir: str | Path,
    out_dir: str | Path,
    *,
    workers: int | None = None,
    filters: str | Path = "light",
    metadata: str | Path | None = None,
    val_fraction: float = 0.1,
    tokenizer_preset: str = "aria",
    solo_piano: bool = False,
    dedup: str = "exact",
    max_per_composition: int | None = None,
    shards: int | None = None,
    runner: str = "local",
    limits: Limits | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BuildSummary:
    """Builds, or goes on building, the corpus in `out_dir`; does nothing where it is finished.

    Args:
        midi_dir: folder (searched recursively) or tar archive.
        workers: processes; None for one per core.
        filters: "light", "heavy", "none" or a file of thresholds.
        metadata: JSON or CSV of labels; None to look for one beside the files.
        val_fraction: share of the compositions kept for validation, in [0, 1).
        progress: called with (files done, files in all).

    Raises:
        UserError: unusable arguments, no MIDI files, `out_dir` holds another corpus, full disk.
    """
    _check_arguments(val_fraction, dedup, max_per_composition, shards, runner, workers)
    source, out = Path(midi_dir), Path(out_dir)
    tokenizer = Tokenizer.preset(tokenizer_preset)
    unit_settings = {
        "tokenizer_preset": tokenizer_preset,
        "filters": filter_presets.load(filters),
        "solo_piano": solo_piano,
    }
    how = MergeSettings(val_fraction, dedup, max_per_composition, shards)
    settings = {
        **unit_settings,
        **asdict(how),
        "metadata": _file_digest(metadata),
        "tokenizer_hash": tokenizer.hash,
    }
    journal = Journal(out)
    with disk_errors_explained(out), journal.locked():
        if not _prepare(journal, source, out, settings, overwrite):
            return _summary(out, load_manifest(out))
        units = list(journal.units())
        n_files = sum(len(entries) for _, entries in units)
        labels = label_sources.load_labels(source, metadata)
        work = _Work(journal, n_files, progress)
        jobs = work.missing_jobs(units, readable_root(source, journal.spool), labels)
        RUNNERS[runner](
            jobs,
            work.store,
            work.tick,
            workers=workers or os.cpu_count() or 1,
            settings=unit_settings,
            limits=limits or Limits(),
        )
        counts = merge([journal.unit_path(number) for number, _ in units], journal.final, out, how)
        manifest = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {"preset": tokenizer_preset, "hash": tokenizer.hash},
            "settings": settings,
            "source": {"n_files": n_files, "listing": journal.listing_digest()},
            **counts,
        }
        write_atomically(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        journal.remove()
    return _summary(out, manifest)


class _Work:
    """The units of one run: which are missing, where results go, how far all is."""

    def __init__(self, journal: Journal, n_files: int, progress: Callable[[int, int], None] | None):
        self._journal, self._n_files, self._progress = journal, n_files, progress
        self._done: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def missing_jobs(self, units: list, root: Path, labels: Any) -> Iterator[Job]:
        for number, entries in units:
            self._sizes[number] = len(entries)
            if self._journal.unit_path(number).is_file():
                self.tick(number, len(entries))
            else:
                yield Job(number, root, entries, [labels.labels_for(e.path) for e in entries])

    def store(self, number: int, results: bytes) -> None:
        write_atomically(self._journal.unit_path(number), results)
        self.tick(number, self._sizes[number])

    def tick(self, number: int, n_begun: int) -> None:
        """A unit that starts over after a worker's death counts no file twice."""
        with self._lock:
            before = self._done.get(number, 0)
            if n_begun > before:
                self._done[number] = n_begun
                self._total += n_begun - before
                if self._progress is not None:
                    self._progress(self._total, self._n_files)


def _check_arguments(
    val_fraction: float,
    dedup: str,
    max_per_composition: int | None,
    shards: int | None,
    runner: str,
    workers: int | None,
) -> None:
    problems = []
    if not 0 <= val_fraction < 1:
        problems.append(f"val_fraction is {val_fraction}, must be at least 0 and below 1")
    if dedup not in DEDUP:
        problems.append(f"dedup is {dedup!r}, must be one of {', '.join(DEDUP)}")
    if runner not in RUNNERS:
        problems.append(f"runner is {runner!r}, must be one of {', '.join(RUNNERS)}")
    counts = {"max_per_composition": max_per_composition, "shards": shards, "workers": workers}
    problems += [
        f"{name} is {value}, must be at least 1"
        for name, value in counts.items()
        if value is not None and value < 1
    ]
    if problems:
        raise UserError("cannot build: " + "; ".join(problems))


def _prepare(
    journal: Journal, source: Path, out: Path, settings: dict[str, Any], overwrite: bool
) -> bool:
    """Leaves a journal that this run can go on with; False where the corpus is finished."""
    asked = {**settings, "source": str(source.resolve())}
    if overwrite:
        (out / MANIFEST).unlink(missing_ok=True)
    if (out / MANIFEST).is_file():
        _refuse_difference(out, load_manifest(out)["settings"], settings)
        journal.remove()
        return False
    begun = journal.settings()
    if begun is not None and not overwrite:
        _refuse_difference(out, begun, asked)
        return True
    journal.clear()
    journal.begin(asked, source)
    if next(journal.entries(), None) is None:
        journal.remove()
        raise UserError(f"{source}: no MIDI files (.mid, .midi, .kar) here or in its folders")
    return True


def _refuse_difference(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in sorted(now) if digest(before.get(name)) != digest(now[name])]
    if changed:
        raise UserError(
            f"{out}: holds a corpus built with other settings ({', '.join(changed)}); "
            "choose another folder, or --overwrite to build it anew"
        )


def _file_digest(path: str | Path | None) -> str | None:
    import hashlib

    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"{path}: no such metadata file")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _summary(out: Path, manifest: dict[str, Any]) -> BuildSummary:
    names = ("n_accepted", "n_rejected", "n_tokens", "n_notes", "hours", "rejected")
    return BuildSummary(
        out_dir=str(out),
        n_files=manifest["source"]["n_files"],
        n_train=manifest["splits"]["train"]["n_pieces"],
        n_val=manifest["splits"]["val"]["n_pieces"],
        **{name: manifest[name] for name in names},
    )
