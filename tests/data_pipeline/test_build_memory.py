"""Memory of a build: that of its units, not that of its files."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from data_pipeline.build import sources
from tests.smf import midi_file, track

PEAK = """
import json, resource, sys
from data_pipeline.build import build

if __name__ == "__main__":
    summary = build(sys.argv[1], sys.argv[2], workers=1, filters="none", dedup="exact")
    peak = [resource.getrusage(who).ru_maxrss for who in
            (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([summary.n_accepted, *peak]))
"""


def write_archive(path, n_files, n_notes=100):
    """Different pieces in no order, as names of a tar archive."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in rng.permutation(n_files):
            keys = rng.integers(30, 100, (n_notes, 2)).tolist()
            events = [
                event
                for pitch, velocity in keys
                for event in (b"\x00" + bytes([0x90, pitch, velocity]), b"\x60" + bytes([pitch, 0]))
            ]
            data = midi_file(track(*events))
            info = tarfile.TarInfo(f"corpus/data/{i % 50:02d}/{i:06d}_0.mid")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def peak_mb(folder, n_files):
    """Peak of the main process and of the worker."""
    archive = folder / f"{n_files}.tar"
    write_archive(archive, n_files)
    command = [sys.executable, "-c", PEAK, archive, folder / f"out-{n_files}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    n_accepted, *peaks = json.loads(done.stdout)
    assert n_accepted == n_files
    return np.array(peaks) / 1024


def test_eight_times_the_files_need_no_more_memory(tmp_path):
    few, many = peak_mb(tmp_path, 300), peak_mb(tmp_path, 2400)
    # Their ids and summaries alone are over 5 MB.
    assert (many - few < 3).all(), f"{few} MB, then {many} MB"


@pytest.mark.slow
def test_a_hundred_times_the_files_need_a_third_of_a_kilobyte_each(tmp_path):
    few, many = peak_mb(tmp_path, 1_000), peak_mb(tmp_path, 100_000)
    # 20 MB are the shard writer's buffer, full after 20 MB of tokens; the rest is its own index of
    # records and the arrays that the plan and the corpus index are made of.
    assert many[0] - few[0] < 20 + 35 and many[1] - few[1] < 3, f"{few} MB, then {many} MB"


def test_an_archive_of_any_order_is_listed_in_order(tmp_path):
    names = [f"d{i % 3}/{(i * 37) % 50:02d}.mid" for i in range(60)]  # ten of them twice
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = i
            archive.addfile(info, io.BytesIO(bytes(i)))
    spool = tmp_path / "work" / "spool"
    spool.parent.mkdir()
    found = list(sources.list_source(tmp_path / "a.tar", spool, tmp_path / "work" / "tables"))
    last = {name: i for i, name in enumerate(names)}  # unpacking leaves the last of one name
    assert [(entry.path, entry.size) for entry in found] == sorted(last.items())
    assert not list(spool.parent.iterdir())
