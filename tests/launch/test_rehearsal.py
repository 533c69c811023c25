"""A pod in rehearsal: hosts with disks of their own, a bucket between them, and machines that are
taken away at random, also while they write a checkpoint. Restarts are on other numbers of hosts.
"""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest

from aria_jax.cli.main import main
from aria_jax.train.goodput import read_status, status_text
from data_pipeline import storage
from launch.local import environments, free_port
from tests.buckets import Fault

DEVICES = 4
STEPS, EVERY = 60, 5
SETTINGS = [
    "d_model=16", "n_heads=4", "n_layers=2", "seq_len=32", "global_batch=8", f"steps={STEPS}",
    f"checkpoint_every={EVERY}", "log_every=1", "eval_every=30", "eval_batches=1", "warmup_steps=5",
    "keep_checkpoints=3", "stall_minutes=1", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2",
]  # fmt: skip
PLAN = [
    (4, "one", "after"),
    (2, "all", "writing"),
    (4, "one", "writing"),
    (2, None, None),
]
"""Hosts of each start; which of them are killed; when: some time after a checkpoint, or in one."""


class Pod:
    """The processes of one start, each with an empty disk."""

    def __init__(self, n, command, folder):
        folder.mkdir()
        self.logs = [folder / f"host-{i}.log" for i in range(n)]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // n}"
        self.hosts = [
            subprocess.Popen(
                command,
                env={**os.environ, **extra, "XLA_FLAGS": flags,
                     "ARIA_JAX_CACHE": str(folder / f"disk-{i}")},
                stdout=subprocess.DEVNULL,
                stderr=log.open("w"),
            )
            for i, (extra, log) in enumerate(
                zip(environments(n, free_port()), self.logs, strict=True)
            )
        ]  # fmt: skip

    def told(self):
        return [log.read_text()[-3000:] for log in self.logs]

    def until(self, happened, seconds=300):
        """Waits for what happens while all hosts are at work."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert all(host.poll() is None for host in self.hosts), self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.02)

    def kill(self, hosts):
        for host in hosts:
            host.kill()

    def ended(self, seconds=180):
        """Exit statuses; nobody waits for ever for a host that is gone."""
        deadline = time.monotonic() + seconds
        try:
            return [host.wait(max(deadline - time.monotonic(), 1)) for host in self.hosts]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"stands still: {self.told()}") from None


def losses(log):
    lines = map(json.loads, log.read_text().splitlines())
    return {(line["split"], line["step"]): line["loss"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_pod_whose_machines_are_taken_away(bucket, corpus, tmp_path, capsys):
    where, rng = f"{bucket.url}/run", random.Random(16)
    run = storage.place(where)
    program = [sys.executable, "-m", "aria_jax.cli.main", "train", "pretrain"]
    alone = Pod(1, [*program, "--data", corpus, "--workdir", tmp_path / "alone", *SETTINGS],
                tmp_path / "undisturbed")  # fmt: skip
    assert alone.ended(300) == [0], alone.told()
    data = bucket.put("data", corpus)
    command = [*program, "--data", data, "--workdir", where, *SETTINGS]

    def steps(pattern):
        names = (re.fullmatch(pattern, name) for name in storage.listing(run))
        return {int(found[1]) for found in names if found}

    def committed():
        return steps(r"checkpoints/(\d+)/commit_success.*")

    resumed, expected, faults = [], [], bucket.network.faults
    for number, (n_hosts, which, when) in enumerate(PLAN):
        expected.append(max(committed(), default=0))
        pod = Pod(n_hosts, command, tmp_path / f"start-{number}")
        try:
            if which is None:
                assert pod.ended(300) == [0] * n_hosts, pod.told()
            else:
                pod.until(lambda: max(committed(), default=0) > expected[-1])
                if when == "after":
                    time.sleep(rng.uniform(0, 0.5))
                else:
                    faults.append(Fault("slow", "checkpoints", "POST", times=4, seconds=1.0))
                    pod.until(
                        lambda: (
                            faults[-1].times < 4 and steps(r"checkpoints/(\d+)/.*") - committed()
                        )
                    )
                victims = pod.hosts if which == "all" else [rng.choice(pod.hosts)]
                pod.kill(victims)
                statuses = pod.ended()
                assert all(statuses), "a run that lost a host does not say that all is well"
                if pod.hosts[0] not in victims:  # with it goes the store by which others are told
                    for host, log in zip(pod.hosts, pod.logs, strict=True):
                        said = log.read_text()
                        assert host in victims or host.returncode == 1, said[-3000:]
                        assert host in victims or "start all of them again" in said, said[-3000:]
                        assert "Traceback" not in said, said[-3000:]
        finally:
            pod.kill(pod.hosts)
            faults.clear()
        text = pod.logs[0].read_text()
        for log in pod.logs[1:]:
            assert log.read_text().count("; process 0 shows how far it is") == 1
        found = re.search(r"resuming .* at step (\d+)", text)
        resumed.append(int(found[1]) if found else 0)
        assert max(committed()) <= (STEPS if which is None else STEPS - 1), "killed too late"
    assert resumed == expected and resumed[0] == 0 and min(resumed[1:]) > 0

    local = storage.local(where)
    once, again = losses(tmp_path / "alone/metrics.jsonl"), losses(local / "metrics.jsonl")
    assert again == {at: pytest.approx(loss, rel=1e-5) for at, loss in once.items()}
    status = read_status(local)
    assert status.starts == len(PLAN) and status.step == STEPS
    # What is lost is what came after the last checkpoint that is whole: one that was being written
    # is none, and training goes on meanwhile, up to the next.
    for lost, (_, _, when) in zip(status.lost_steps, PLAN, strict=False):
        assert lost < (2 * EVERY if when == "writing" else EVERY)
    assert main(["train", "--status", where]) == 0
    assert f"started {len(PLAN)} times" in capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{status_text(where, status)}")
