"""Exports know what they are made of, and any number of processes may make one together."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from aria_jax.embed.export import export
from aria_jax.embed.pieces import Slicing, open_source
from aria_jax.embed.table import read_embeddings
from data_pipeline.errors import UserError
from data_pipeline.midi import write_midi
from tests.corpora import random_performance

SETTINGS = {"fingerprint": "f"}


class Counting:
    """A network's stand-in that counts what it is asked."""

    def __init__(self):
        self.n_slices = 0

    def __call__(self, slices):
        self.n_slices += len(slices)
        return np.stack([[len(s), s.sum(dtype=np.int64)] for s in slices]).astype(np.float32)


@pytest.fixture
def midis(tmp_path):
    """Six short MIDI files of one slice each."""
    folder, rng = tmp_path / "midis", np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        write_midi(random_performance(rng, 20), folder / f"{i}.mid")
    (folder / "metadata.json").write_text('[{"path": "0.mid", "composer": "bach"}]')
    return folder


def run(midis, out, encode, **options):
    source = open_source(midis, Slicing("aria", 30, 200), spool=out.with_suffix(".spool"))
    options = {"settings": SETTINGS, "files_per_part": 2, **options}
    return export(source, encode, out, **options)


def fresh(midis, tmp_path):
    run(midis, tmp_path / "fresh.parquet", Counting())
    return pq.read_table(tmp_path / "fresh.parquet")


def relabel(midis):
    (midis / "metadata.json").write_text('[{"path": "0.mid", "composer": "liszt"}]')


def change(midis):
    """Other content, of the same size and time."""
    path = midis / "1.mid"
    data, times = bytearray(path.read_bytes()), path.stat()
    at = data.index(0x90)  # the first note: another pitch
    data[at + 1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def add(midis):
    write_midi(random_performance(np.random.default_rng(9), 20), midis / "00.mid")


def remove(midis):
    (midis / "0.mid").unlink()


def rename(midis):
    (midis / "5.mid").rename(midis / "a.mid")


@pytest.mark.parametrize(
    "edit, n_embedded", [(relabel, 0), (change, 1), (add, 1), (remove, 0), (rename, 0)]
)
@pytest.mark.parametrize("per_slice", [False, True])
def test_what_changed_is_embedded_again_and_nothing_else(
    midis, tmp_path, edit, n_embedded, per_slice
):
    out = tmp_path / "e.parquet"
    run(midis, out, Counting(), per_slice=per_slice)
    edit(midis)
    encode = Counting()
    summary = run(midis, out, encode, per_slice=per_slice)
    assert (summary.n_embedded, encode.n_slices) == (n_embedded, n_embedded)
    assert summary.n_kept + n_embedded == summary.n_files and not summary.done_before
    run(midis, tmp_path / "fresh.parquet", Counting(), per_slice=per_slice)
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "fresh.parquet"))
    assert run(midis, out, encode, per_slice=per_slice).done_before
    if edit is relabel:
        assert read_embeddings(out).column("composer")[0] == "liszt"


@pytest.mark.parametrize(
    "other, said",
    [
        ({"settings": {"fingerprint": "g"}}, "model: f → g"),
        ({"settings": {**SETTINGS, "max_tokens": 7}}, "max_tokens: not said → 7"),
        ({"per_slice": True}, "per_slice: false → true"),
    ],
)
def test_embeddings_made_otherwise_are_replaced_only_when_asked(midis, tmp_path, other, said):
    out = tmp_path / "e.parquet"
    run(midis, out, Counting())
    before = out.read_bytes()
    with pytest.raises(UserError, match=f"{said}.*choose another output, or --overwrite"):
        run(midis, out, Counting(), **other)
    assert out.read_bytes() == before and not (tmp_path / "e.parquet.parts").exists()
    encode = Counting()
    run(midis, out, encode, **other, overwrite=True)
    assert encode.n_slices == 6 and out.read_bytes() != before
    assert run(midis, out, encode, **other).done_before


def test_a_file_that_does_not_say_what_it_is_is_not_replaced(midis, tmp_path):
    out = tmp_path / "e.parquet"
    out.write_text("mine")
    with pytest.raises(UserError, match="does not say what it was made of"):
        run(midis, out, Counting())
    assert out.read_text() == "mine"
    run(midis, out, Counting(), overwrite=True)
    assert pq.read_table(out).equals(fresh(midis, tmp_path))


def test_what_a_kill_left_of_the_parts_is_tidied_up(midis, tmp_path):
    """The folder's identity goes first or last when it is removed, as the disk has it."""
    out = tmp_path / "e.parquet"
    run(midis, out, Counting())
    left = tmp_path / "e.parquet.parts"
    left.mkdir()
    (left / "part-00000.parquet").write_text("")
    run(midis, out, Counting())
    assert not left.exists()


TOGETHER = """
import multiprocessing, os, random, signal, sys, time
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
from aria_jax.embed.export import export
from aria_jax.embed.pieces import Slicing, open_source

def encode(slices):
    time.sleep(0.001)
    return np.stack([[len(s), s.sum(dtype=np.int64)] for s in slices]).astype(np.float32)

class Gate:  # opens for all at one moment; no process that is killed can keep it shut
    def __init__(self):
        (self.ready, self.arrive), (self.opened, self.shut) = os.pipe(), os.pipe()

    def wait(self):
        os.close(self.shut)
        os.write(self.arrive, b".")
        os.read(self.opened, 1)  # until the last process that could write closes its end

    def open(self, n):
        while n:
            n -= len(os.read(self.ready, n))
        for end in (self.ready, self.arrive, self.opened, self.shut):
            os.close(end)

def host(index, count, out, gate):
    if gate is not None:
        gate.wait()
    export(source, encode, out, settings={"fingerprint": "f"}, files_per_part=1,
           host_index=index, host_count=count)

if __name__ == "__main__":
    folder, work, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    source = open_source(folder, Slicing("aria", 30, 200), spool=work / "spool")
    export(source, encode, work / "alone", settings={"fingerprint": "f"}, files_per_part=1)
    expected, rng = pq.read_table(work / "alone"), random.Random(0)
    fork, crashed, killed = multiprocessing.get_context("fork"), 0, 0
    for number in range(rounds):
        out, knowing, kill = work / f"{number}.parquet", number % 2, number % 3 == 0
        hosts = [(i, 4) if knowing else (0, 1) for i in range(4)]
        gate = Gate()
        processes = [fork.Process(target=host, args=(*h, out, gate)) for h in hosts]
        for process in processes:
            process.start()
        gate.open(4)
        if kill:
            time.sleep(rng.uniform(0, 0.1))
            processes[0].kill()
        for process in processes:
            process.join()
        killed += processes[0].exitcode == -signal.SIGKILL
        crashed += sum(p.exitcode not in (0, -signal.SIGKILL if kill else 0) for p in processes)
        if kill:  # started again, as a launcher does; it may have died with work begun
            again = fork.Process(target=host, args=(*hosts[0], out, None))
            again.start(); again.join()
            crashed += again.exitcode != 0
        assert pq.read_table(out).equals(expected), number
        left = [p.name for p in work.glob(f"{number}.parquet*")]
        assert left == [out.name], left
    print(crashed, killed)
"""


@pytest.mark.slow
def test_four_exporters_started_at_once_fifty_times(midis, tmp_path):
    """Half of the times no process knows of the others, a third of the times one is killed."""
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", TOGETHER, midis, work, "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    crashed, killed = map(int, done.stdout.split())
    assert crashed == 0, done.stderr[-2000:]
    assert killed > 3, "kills came too late to test anything"


@pytest.mark.slow
def test_four_commands_at_once_make_one_file(midis, tmp_path):
    """By --host-index, by what a launcher says, and by nothing at all."""
    command = [sys.executable, "-m", "aria_jax.cli.main", "embed", midis]
    for name, said in (("flags", [["--host-index", str(i), "--host-count", "4"] for i in range(4)]),
                       ("launched", [[]] * 4), ("unaware", [[]] * 4)):  # fmt: skip
        out = tmp_path / f"{name}.parquet"
        processes = [
            subprocess.Popen(
                [*command, out, "--baseline", "pitch-class", "--json", *extra],
                env={**os.environ, "XLA_FLAGS": ""}
                | ({"ARIA_JAX_PROCESS_INDEX": str(i), "ARIA_JAX_PROCESS_COUNT": "4"}
                   if name == "launched" else {}),
                stdout=subprocess.PIPE,
            )
            for i, extra in enumerate(said)
        ]  # fmt: skip
        results = [json.loads(process.communicate()[0]) for process in processes]
        assert [process.returncode for process in processes] == [0] * 4
        assert any(result["complete"] for result in results)
        assert len(read_embeddings(out).path) == 6
        assert not Path(f"{out}.parts").exists()


def test_no_folder_is_left_where_nothing_could_be_made(midis, tmp_path):
    shutil.rmtree(midis)
    midis.mkdir()
    with pytest.raises(UserError):
        run(midis, tmp_path / "new" / "e.parquet", Counting())
    assert not (tmp_path / "new").exists()
