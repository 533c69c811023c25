"""The build as Ray tasks on a real cluster of three nodes, one of which is killed under way."""

import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest

from data_pipeline import workers
from data_pipeline.build import build, journal
from data_pipeline.errors import UserError
from data_pipeline.midi import midi_bytes
from tests.corpora import random_performance

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the ray extra")
SETTINGS = {"filters": "none", "val_fraction": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 pieces and two files that cannot be used."""
    made, rng = tmp_path_factory.mktemp("midi"), np.random.default_rng(0)
    for i in range(120):
        (made / f"{i}.mid").write_bytes(midi_bytes(random_performance(rng, 40)))
    (made / "text.mid").write_text("this is no MIDI")
    (made / "cut.mid").write_bytes((made / "3.mid").read_bytes()[:60])
    return made


@pytest.fixture(scope="module")
def cluster():
    """Head and two more nodes of one processor each; the driver is connected to the head."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(**node)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_changes_nothing(cluster, folder, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(journal, "UNIT_FILES", 8)
    build(folder, tmp_path / "local", workers=1, **SETTINGS)
    victim, log, task = next(iter(cluster.worker_nodes)), tmp_path / "log", workers._ray_task
    victim_id = victim.node_id
    log.mkdir()

    def logged_task(shared, job):  # a closure: Ray's workers cannot import this file
        node = ray.get_runtime_context().get_node_id()
        (log / f"{node}-{job.number}").touch()
        results = task(shared, job)
        if node == victim_id:
            time.sleep(120)  # killed in here
        while not list(log.glob(f"{victim_id}-*")):
            time.sleep(0.05)  # the others leave it some work
        return results

    def kill():
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and not list(log.glob(f"{victim_id}-*")):
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)

    monkeypatch.setattr(workers, "_ray_task", logged_task)
    killer = threading.Thread(target=kill)
    killer.start()
    seen = []
    build(folder, tmp_path / "ray", runner="ray", progress=lambda *n: seen.append(n), **SETTINGS)
    killer.join()
    deadline = time.monotonic() + 60
    while all(node["Alive"] for node in ray.nodes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # the news of a death takes a second
    assert sorted(node["Alive"] for node in ray.nodes()) == [False, True, True]
    lost = [path.name.rpartition("-")[2] for path in log.glob(f"{victim_id}-*")]
    assert lost
    for unit in lost:
        assert len(list(log.glob(f"*-{unit}"))) > 1, "begun again on another node"
    made = {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert seen[-1] == (122, 122) and seen == sorted(seen)


@needs_ray
@pytest.mark.slow
def test_a_source_that_the_nodes_cannot_see_is_one_line(cluster, folder, tmp_path, monkeypatch):
    from data_pipeline import build as build_module

    monkeypatch.setattr(build_module, "readable_root", lambda *_: tmp_path / "not-mounted")
    with pytest.raises(UserError, match="not-mounted: not found on a node of the cluster") as error:
        build(folder, tmp_path / "ray", runner="ray", **SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("ray") is not None, reason="the ray extra is installed")
def test_without_ray_the_extra_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"pip install 'aria-jax\[ray\]'"):
        build(folder, tmp_path / "data", runner="ray", **SETTINGS)
