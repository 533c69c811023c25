"""A full disk stops the build with one clear line, and the next run goes on to the same bytes."""

import errno
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.build import build, journal
from data_pipeline.errors import UserError
from data_pipeline.midi import midi_bytes
from tests.corpora import random_performance

FULL = "the disk is full; free some space and run the same command again"
SETTINGS = {"workers": 1, "filters": "none", "val_fraction": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, rng = tmp_path_factory.mktemp("midi"), np.random.default_rng(0)
    for i in range(60):
        (made / f"{i}.mid").write_bytes(midi_bytes(random_performance(rng, 100)))
    return made


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_disk_may_be_full_at_any_write(folder, tmp_path, monkeypatch):
    """Every fsync of a build fails once, and each time the build goes on where it was."""
    monkeypatch.setattr(journal, "UNIT_FILES", 30)
    build(folder, tmp_path / "whole", **SETTINGS)
    real_fsync, failures = os.fsync, 0

    def failing_at(n):
        calls = itertools.count(1)

        def fsync(handle):
            if next(calls) == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real_fsync(handle)

        return fsync

    for n in range(1, 40):
        monkeypatch.setattr(os, "fsync", failing_at(n))
        try:
            build(folder, tmp_path / "data", **SETTINGS)
            break
        except UserError as error:
            assert FULL in str(error) and "\n" not in str(error)
            failures += 1
    # Listing, settings, two units, each of the shards and indexes, the rejections, the manifest.
    assert failures >= 10
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
import data_pipeline.build.journal as journal
from data_pipeline.build import build
from data_pipeline.errors import UserError
journal.UNIT_FILES = 16

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

if __name__ == "__main__":
    midi, disk, *sizes = sys.argv[1:]
    settings = {"workers": 1, "filters": "none", "val_fraction": 0.3}
    for size in sizes:
        mount(f"size={size}")
        try:
            build(midi, f"{disk}/data", **settings)
        except UserError as error:
            assert "the disk is full" in str(error), error
        else:
            raise SystemExit(f"{size} was enough")
        mount("remount,size=50m")
        build(midi, f"{disk}/data", **settings)
        made = {path.name: path.read_bytes() for path in Path(f"{disk}/data").iterdir()}
        assert size == sizes[0] or made == before, size
        before = made
        subprocess.run(["umount", disk], check=True)
    print("all", len(sizes))
"""


@pytest.mark.slow
def test_on_a_disk_that_is_really_full(folder, tmp_path):
    """Small file systems in memory: full while listing, in a unit, and while writing shards."""
    alone = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "x", tmp_path], check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("needs the right to mount a file system in a namespace of one's own")
    command = [*alone, sys.executable, "-c", ON_A_SMALL_DISK, folder, tmp_path]
    done = subprocess.run([*command, "8k", "60k", "130k"], capture_output=True, text=True)
    assert done.stdout.strip() == "all 3", done.stderr
