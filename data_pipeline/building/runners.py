"""Who does the work units: isolated processes of this machine, or the same on a Ray cluster."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_pipeline.building.journal import rejection
from data_pipeline.building.unit_worker import Job, Limits
from data_pipeline.errors import UserError

Store = Callable[[int, bytes], None]
"""Keeps the results of unit `number`."""
Tick = Callable[[int, int], None]
"""Hears that `n` files of unit `number` are begun."""

_DEATHS_TO_QUARANTINE = 2  # one may be an accident: the system's out-of-memory killer, an operator


class _WorkerDiedError(Exception):
    """Attributes: file (index in the unit), reason, value for rejected.jsonl."""

    def __init__(self, file: int, reason: str, value: Any):
        super().__init__(reason)
        self.file, self.reason, self.value = file, reason, value


class IsolatedWorker:
    """A process that does units; it is replaced when a file kills it, and that file set aside."""

    def __init__(self, settings: dict[str, Any], limits: Limits):
        self._settings = settings
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._stopped = False

    def run(self, job: Job, tick: Tick | None = None) -> bytes:
        """The results of a unit, whatever its files do to the process."""
        deaths: Counter[int] = Counter()
        quarantined: dict[int, dict[str, Any]] = {}
        while True:
            try:
                return self._attempt(job, quarantined, tick)
            except _WorkerDiedError as death:
                deaths[death.file] += 1
                if deaths[death.file] == _DEATHS_TO_QUARANTINE:
                    path = job.entries[death.file].path
                    quarantined[death.file] = rejection(path, "worker", death.reason, death.value)

    def stop(self) -> None:
        """Ends the process; a `run` under way in another thread fails with RuntimeError."""
        self._stopped = True
        self._end()

    def _attempt(
        self, job: Job, quarantined: dict[int, dict[str, Any]], tick: Tick | None
    ) -> bytes:
        connection = self._connection or self._start()
        file = 0
        try:
            connection.send((job, quarantined))
            while connection.poll(self._limits.wall_s):
                kind, value = connection.recv()
                if kind == "unit":
                    return value
                file = value
                if tick is not None:
                    tick(job.number, file)
        except (EOFError, ConnectionError):
            raise self._death(file) from None
        self._end()
        raise _WorkerDiedError(file, "time-limit", f"{self._limits.wall_s:g} s")

    def _death(self, file: int) -> Exception:
        status = self._process.wait() if self._process is not None else 0
        self._end()
        if self._stopped:
            return RuntimeError("the worker was stopped")
        if status == -signal.SIGPROF:
            return _WorkerDiedError(
                file, "time-limit", f"{self._limits.cpu_s:g} s of processor time"
            )
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return _WorkerDiedError(file, "worker-died", name)

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
            ),
            # Parallelism is one process per core; a thread pool in each would fight for them.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
        }
        with tempfile.TemporaryFile() as errors, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.building.unit_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                # Ctrl-C reaches the parent only: a worker that dies of it would accuse its file.
                start_new_session=True,
            )
            theirs.close()
            connection = Connection(ours.detach())
            try:
                connection.send((self._settings, self._limits))
                connection.recv()
            except (EOFError, ConnectionError):
                self._process.wait()
                connection.close()
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
                raise RuntimeError(f"a worker process did not start: {text[-1]}") from None
        self._connection = connection
        return connection

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def run_local(
    jobs: Iterator[Job],
    store: Store,
    tick: Tick,
    *,
    workers: int,
    settings: dict[str, Any],
    limits: Limits,
) -> None:
    """Does the jobs on `workers` processes of this machine; holds one unit per worker in memory."""
    lock = threading.Lock()
    crew = [IsolatedWorker(settings, limits) for _ in range(workers)]
    stopping = threading.Event()

    def serve(worker: IsolatedWorker) -> None:
        while not stopping.is_set():
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            store(job.number, worker.run(job, tick))

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(serve, worker) for worker in crew]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception()) is not None]
        finally:
            stopping.set()
            for worker in crew:
                worker.stop()
    if errors:
        raise errors[0]


def run_ray(
    jobs: Iterator[Job],
    store: Store,
    tick: Tick,
    *,
    workers: int,
    settings: dict[str, Any],
    limits: Limits,
) -> None:
    """Does the jobs as Ray tasks, on the cluster of RAY_ADDRESS or on this machine.

    Every node must see the source under the same path. Ray repeats the tasks of a node that dies;
    results come back through Ray, so only this machine needs to see the output folder.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--runner ray needs the package ray: pip install 'aria-jax[ray]'"
        ) from error
    started_here = not ray.is_initialized()
    if started_here:
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        ray.init(log_to_driver=False, logging_level="ERROR", **local)
    try:
        task = ray.remote(num_cpus=1, max_retries=-1)(_ray_task)
        _submit(jobs, partial(task.remote, ray.put((settings, limits))), store, tick)
    finally:
        if started_here:
            ray.shutdown()


def _submit(jobs: Iterator[Job], submit: Callable[[Job], Any], store: Store, tick: Tick) -> None:
    """Keeps two tasks per processor under way: no node waits, and results do not pile up."""
    import ray

    running: dict[Any, Job] = {}
    job = next(jobs, None)
    while job is not None or running:
        capacity = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while job is not None and len(running) < capacity:
            running[submit(job)] = job
            job = next(jobs, None)
        finished, _ = ray.wait(list(running), num_returns=1)
        for reference in finished:
            finished_job = running.pop(reference)
            try:
                results = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from error
                raise
            store(finished_job.number, results)
            tick(finished_job.number, len(finished_job.entries))


def _ray_task(shared: tuple[dict[str, Any], Limits], job: Job) -> bytes:
    settings, limits = shared
    if not job.root.exists():
        raise UserError(f"{job.root}: not found on a node of the cluster; use a shared file system")
    return _resident_worker(json.dumps(settings), limits).run(job)


@lru_cache(maxsize=1)
def _resident_worker(settings: str, limits: Limits) -> IsolatedWorker:
    """One isolated process per Ray worker, kept between its tasks."""
    return IsolatedWorker(json.loads(settings), limits)


RUNNERS = {"local": run_local, "ray": run_ray}
