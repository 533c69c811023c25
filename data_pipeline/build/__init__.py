"""A folder or archive of MIDI files to token shards: parallel, and safe to kill at any moment.

The source is listed once and split into work units; each unit's results are kept on disk as soon
as they are complete; a merge that depends on nothing but those results writes the shards. Run
again after a kill, it goes on with the units that are missing and ends with the same bytes.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import filters as filter_presets
from data_pipeline import storage
from data_pipeline.artifact import (
    MAX_DIFFERENCES,
    Identity,
    There,
    atomic,
    listing_difference,
    look,
    new_folder,
    refuse_inside,
    refuse_occupied,
    rows_digest,
    write_atomically,
)
from data_pipeline.build.journal import Journal, Listing, disk_errors_explained
from data_pipeline.build.merge import DEDUP, Excluded, MergeSettings, merge_units, send_corpus
from data_pipeline.build.series import settle
from data_pipeline.build.sources import has_inner_tables, readable_root
from data_pipeline.build.unit_worker import Job, Limits
from data_pipeline.cleaning import Cleaning
from data_pipeline.errors import UserError
from data_pipeline.metadata import LabelTable, find_tables, read_labels
from data_pipeline.midi import reading_name
from data_pipeline.inspection import relabelled
from data_pipeline.shards import FILES, FORMAT_VERSION, MANIFEST, REJECTED, load_manifest
from data_pipeline.tokenizers import Tokenizer

IDENTITY_VERSION = 1
"""Of what a build makes of its inputs; one more when the same inputs give another corpus."""


@dataclass(frozen=True)
class BuildSummary:
    """What a build made.

    Attributes:
        n_test: pieces that the metadata's split keeps for testing; their shards are apart.
        n_repaired: accepted files that are truncated and were read up to the break.
        rejected: number of files by "stage/reason".
        warnings: what was not done, and had better be known.
        hours: of music in the accepted pieces.
        round_trip: of event series, what their tokens lose; see `series.learn`.
        done_before: it was there already, made of the same files with the same settings.
    """

    out_dir: str
    n_files: int
    n_accepted: int
    n_rejected: int
    n_repaired: int
    n_train: int
    n_val: int
    n_tokens: int
    n_notes: int
    hours: float
    rejected: dict[str, int]
    n_test: int
    warnings: list[str]
    round_trip: dict[str, float | str] | None = None
    done_before: bool = field(default=False, compare=False)


def build(
    midi_dir: str | Path,
    out_dir: str | Path,
    *,
    workers: int | None = None,
    filters: str | Path = "light",
    metadata: str | Path | None = None,
    split_column: str | None = None,
    val_fraction: float = 0.1,
    tokenizer_preset: str = "aria",
    compat: str | None = None,
    repair: bool = False,
    cleaning: Cleaning | None = None,
    dedup: str = "exact",
    exclude: Sequence[str | Path] = (),
    max_per_composition: int | None = None,
    shards: int | None = None,
    runner: str = "local",
    limits: Limits | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BuildSummary:
    """Builds, or goes on building, the corpus in `out_dir`; does nothing where it is finished.

    What it is made of is decided by content: every file of the source is read and hashed first.

    Args:
        midi_dir: folder (searched recursively), archive, Parquet or MIDI file, or Parquet of event
            series; see `sources`.
        workers: processes; None for one per core.
        filters: "light", "heavy", "none" or a file of thresholds.
        metadata: JSON or CSV of labels; None to look for tables beside the files.
        split_column: label whose train/val/test is followed; None: "split", if every piece has it
            (a test piece is never trained on); "none": no published split is followed.
        compat: None to read files by the standard; "aria-utils" to read them as it does.
        repair: of files that are truncated in a track, take what is whole before the break.
        cleaning: what to take out of every performance first; None for nothing.
        dedup: "exact", "near" or "none"; see `MergeSettings`.
        exclude: further sources, such as evaluation sets: what is a duplicate of one of their
            files, as `dedup` finds them, is left out. Their own files are not taken.
        val_fraction: share of the compositions kept for validation, in [0, 1).
        progress: called with (files done, files in all).

    Raises:
        UserError: unusable arguments, no MIDI files or none that became a piece, full disk;
            `out_dir` lies in the source or holds a corpus of other files, labels or settings, and
            `overwrite` was not said.
    """
    from data_pipeline.workers import RUNNERS  # which imports parts of this package

    _check_arguments(val_fraction, dedup, max_per_composition, shards, runner, workers)
    if exclude and dedup == "none":
        raise UserError("cannot build: exclude compares as dedup says, which is none")
    others = [storage.local(other) for other in exclude]
    source, out = storage.local(midi_dir), storage.local(out_dir)
    refuse_inside(out, source, "the folder of your MIDI files")
    refuse_occupied(out, "a corpus")
    cleaning = cleaning or Cleaning()
    asked_of_music = {"cleaning": cleaning != Cleaning(), "dedup near": dedup == "near",
                      "compat": compat is not None}  # fmt: skip
    tokenizer_preset, filters, round_trip = settle(
        tokenizer_preset, source, filters=filters, others=asked_of_music
    )
    unit_settings = {
        "tokenizer_preset": tokenizer_preset,
        "reading": reading_name(compat),
        "repair": repair,
        "filters": filter_presets.load(filters),
        "cleaning": asdict(cleaning),
        "fingerprints": dedup == "near",
    }
    how = MergeSettings(val_fraction, dedup, max_per_composition, shards, split_column)
    tokenizer_hash = Tokenizer.preset(tokenizer_preset).hash
    settings = {**unit_settings, **asdict(how), "tokenizer_hash": tokenizer_hash}
    settings |= {} if round_trip is None else {"round_trip": round_trip}
    column = None if split_column == "none" else split_column
    inner = metadata is None and has_inner_tables(source)
    if not inner:
        labels = read_labels(source, find_tables(source, metadata), column)
    journal = Journal(out)
    with new_folder(out), disk_errors_explained(out), journal.locked():
        listing, excluded = journal.list_asked(
            source, lambda n: progress(0, n) if progress else None, others
        )
        if inner:
            labels = read_labels(source, find_tables(listing.tables), column)
        inputs = {
            "files": rows_digest(listing.digests()),
            "labels": _labels_digest(listing, labels),
        }
        if excluded:
            inputs["exclude"] = rows_digest(sha for one in excluded for _, sha in one.digests())
        asked = Identity("a corpus", IDENTITY_VERSION, inputs, settings)
        unfinished = _prepare(journal, listing, labels, out, asked, overwrite)
        if unfinished:
            work = _Work(journal, progress)
            run = partial(
                RUNNERS[runner], workers=workers or os.cpu_count() or 1, limits=limits or Limits()
            )
            if others:
                # Whatever the filters think of an evaluation set's file, it is one.
                run(
                    work.missing_excluded(others),
                    work.store_excluded,
                    work.progress_excluded,
                    settings={**unit_settings, "filters": {}},
                )
            root = readable_root(source, journal.listing.spool)
            run(work.missing_jobs(root, labels), work.store, work.progress, settings=unit_settings)
            warnings = labels.warnings(entry.path for entry in journal.listing.entries())
            _finish(journal, out, how, asked, warnings, others)
        send_corpus(out)
    return _summary(out, load_manifest(out), not unfinished)


def _labels_digest(listing: Listing, labels: LabelTable) -> str:
    """sha256 of what is known of the listed files, whatever else their tables say and how."""
    return rows_digest([entry.path, labels.labels_for(entry.path)] for entry in listing.entries())


def _prepare(
    journal: Journal, listing: Listing, labels: LabelTable, out: Path, asked: Identity, overwrite: bool
) -> bool:
    """Leaves a journal that this run can go on with; False where the corpus is finished."""
    manifest = out / MANIFEST
    finished = None
    if manifest.is_file() and not overwrite:
        finished = Identity.from_json(load_manifest(out).get("identity"))
        if finished is None:
            raise UserError(
                f"{out}: holds a corpus of an earlier version, which does not say what it was made "
                "of; choose another output, or --overwrite to replace it"
            )

    def details(other: Identity) -> dict[str, str]:
        before = journal.digests() if finished is None else _files_of(out)
        files = listing_difference(before, listing.digests())
        new = relabelled(out, labels.labels_for, MAX_DIFFERENCES) if finished is not None else ""
        if other.inputs["files"] == asked.inputs["files"]:
            new = "other labels of the same files" + f" ({new})" * bool(new)
        filters = filter_presets.change(other.settings["filters"], asked.settings["filters"])
        return {"files": files, "labels": new, "exclude": "other files", "filters": filters}

    there = look(
        out, asked, finished=finished, unfinished=journal.identity(), overwrite=overwrite,
        details=details,
    )  # fmt: skip
    if there is There.DONE:
        journal.remove()
        return False
    if manifest.is_file():
        storage.remove(manifest)
    if there is There.RESUME:
        journal.accept()
    else:
        journal.begin(asked)
    return True


def _files_of(out: Path) -> Iterator[tuple[str, str | None]]:
    """What a finished corpus was made of: (path, sha256) of each file."""
    if (out / FILES).is_file():
        with (out / FILES).open() as file:
            for line in file:
                path, sha256 = json.loads(line)
                yield path, sha256


def _finish(
    journal: Journal,
    out: Path,
    how: MergeSettings,
    identity: Identity,
    warnings: list[str],
    others: Sequence[Path],
) -> None:
    """Makes the corpus of the finished units; its manifest, written last, says that it is whole."""
    units = [journal.unit_path(number) for number, _ in journal.units()]
    excluded = None
    if others:
        numbers = [(number, source) for number, source, _ in journal.excluded_units()]
        excluded = Excluded(
            [journal.unit_path(number, "exclude") for number, _ in numbers],
            [others[source].name for _, source in numbers],
        )
    counts = merge_units(units, journal.final, out, how, excluded)
    if not counts["n_accepted"]:
        _refuse_empty(journal, out, counts)
    with atomic(out / FILES, beside=journal.folder) as partial, partial.open("w") as file:
        for row in journal.digests():
            file.write(json.dumps(row) + "\n")
    settings = dict(identity.settings)
    tokenizer = {"preset": settings["tokenizer_preset"], "hash": settings["tokenizer_hash"]}
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer,
        "reading": settings["reading"],
        "settings": settings,
        "source": {"n_files": sum(1 for _ in journal.listing.entries())},
        "identity": identity.to_json(),
        **counts,
        "warnings": [*warnings, *counts["warnings"]],
    }
    write_atomically(out / MANIFEST, json.dumps(manifest, indent=1) + "\n", beside=journal.folder)
    journal.remove()


def _refuse_empty(journal: Journal, out: Path, counts: dict[str, Any]) -> None:
    """Nothing that could be trained on is left, only rejected.jsonl."""
    for path in (*out.glob("*.arrayrecord"), *out.glob("*-index.npz")):
        path.unlink()
    journal.remove()
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts["rejected"].items())
    raise UserError(
        f"{out}: no corpus, as none of {counts['n_rejected']:,} files became a piece ({reasons}); "
        f"{out / REJECTED} says why of each"
        + ("; --filters none keeps all that can be read" if "filter/" in reasons else "")
    )


class _Work:
    """The units of one run: which are missing, where results go, how far all is."""

    def __init__(self, journal: Journal, progress: Callable[[int, int], None] | None):
        self._journal, self._tell = journal, progress
        self._sizes = [len(entries) for _, entries in journal.units()]
        self._n_files = sum(self._sizes)
        # What an earlier run made.
        self._done = {
            number: size
            for number, size in enumerate(self._sizes)
            if journal.unit_path(number).is_file()
        }
        self._n_files += sum(len(entries) for *_, entries in journal.excluded_units())
        for number, _, entries in journal.excluded_units():
            if journal.unit_path(number, "exclude").is_file():
                self._done[-1 - number] = len(entries)
        self._total = sum(self._done.values())
        self._lock = threading.Lock()
        if progress is not None:
            progress(self._total, self._n_files)

    def missing_jobs(self, root: Path, labels: LabelTable) -> Iterator[Job]:
        for number, entries in self._journal.units():
            if number not in self._done:
                yield Job(number, root, entries, [labels.labels_for(e.path) for e in entries])

    def missing_excluded(self, sources: Sequence[Path]) -> Iterator[Job]:
        """Of the files that are only compared with."""
        listings = self._journal.excluded
        for number, source, entries in self._journal.excluded_units():
            if -1 - number not in self._done:
                root = readable_root(sources[source], listings[source].spool)
                yield Job(number, root, entries, [{}] * len(entries))

    def store_excluded(self, number: int, results: bytes) -> None:
        """As `store`; the ids are not needed again."""
        write_atomically(self._journal.unit_path(number, "exclude"), results)

    def progress_excluded(self, number: int, n_done: int) -> None:
        """As `progress`: these units are numbered from -1 down."""
        self.progress(-1 - number, n_done)

    def store(self, number: int, results: bytes) -> None:
        write_atomically(self._journal.unit_path(number), results)
        self.progress(number, self._sizes[number])

    def progress(self, number: int, n_done: int) -> None:
        """A unit that starts over after a worker's death counts no file twice."""
        with self._lock:
            before = self._done.get(number, 0)
            if n_done > before:
                self._done[number] = n_done
                self._total += n_done - before
                if self._tell is not None:
                    self._tell(self._total, self._n_files)


def _check_arguments(
    val_fraction: float,
    dedup: str,
    max_per_composition: int | None,
    shards: int | None,
    runner: str,
    workers: int | None,
) -> None:
    from data_pipeline.workers import RUNNERS

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


def _summary(out: Path, manifest: dict[str, Any], done_before: bool) -> BuildSummary:
    names = ("n_accepted", "n_rejected", "n_tokens", "n_notes", "hours", "rejected")
    return BuildSummary(
        out_dir=str(out),
        n_files=manifest["source"]["n_files"],
        n_train=manifest["splits"]["train"]["n_pieces"],
        n_val=manifest["splits"]["val"]["n_pieces"],
        n_test=manifest["splits"].get("test", {}).get("n_pieces", 0),
        n_repaired=manifest.get("n_repaired", 0),
        warnings=manifest.get("warnings", []),
        round_trip=manifest.get("settings", {}).get("round_trip"),
        **{name: manifest[name] for name in names},
        done_before=done_before,
    )
