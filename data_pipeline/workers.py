"""Work done by other processes: items in order, and the work units of a build by isolated
processes of this machine or the same on a Ray cluster.

Ctrl-C is the parent's business alone. Processes of `map_in_order` import the module of the function
they are given, so that must not import jax.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.build import unit_worker
from data_pipeline.build.journal import pack_unit, rejection
from data_pipeline.build.unit_worker import GarbledError, Job, Limits, receive_frame, send_frame
from data_pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

Store = Callable[[int, bytes], None]
"""Keeps the results of unit `number`."""
Progress = Callable[[int, int], None]
"""Hears that `n` files of unit `number` are done."""

_WORKER = "data_pipeline.build.unit_worker"

_DEATHS_TO_QUARANTINE = 2  # one may be an accident: the system's out-of-memory killer, an operator
_MAX_IDLE_DEATHS = 3
"""Deaths with no file in hand in one unit: what kills an idle process kills the next one too."""
MAX_RAY_RETRIES = 20
"""Nodes that may die under one piece of work."""
_START_S = 600.0
"""Until a new worker has compiled what it needs; seconds, on a machine that is busy."""


class _WorkerDiedError(Exception):
    """Attributes: in_hand (whether it had a file in hand), reason, value for rejected.jsonl."""

    def __init__(self, in_hand: bool, reason: str, value: Any):
        super().__init__(f"{reason}: {value}")
        self.in_hand, self.reason, self.value = in_hand, reason, value


class IsolatedWorker:
    """A process that does units; it is replaced when a file kills it, and that file set aside."""

    def __init__(self, settings: dict[str, Any], limits: Limits):
        self._settings, self._limits = settings, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._stopped = False

    def run(self, job: Job, progress: Progress | None = None) -> bytes:
        """The results of a unit, whatever its files do to the process.

        Raises:
            UserError: processes die that have no file in hand, or do not start.
        """
        results: list[tuple[dict[str, Any], bytes]] = []
        deaths, idle_deaths = Counter[int](), 0
        while len(results) < len(job.entries):
            try:
                self._attempt(job, results, progress)
            except _WorkerDiedError as death:
                file = len(results)
                deaths[file] += death.in_hand
                idle_deaths += not death.in_hand
                if idle_deaths == _MAX_IDLE_DEATHS:
                    raise UserError(
                        f"a worker process died {idle_deaths} times with no file in hand "
                        f"({death}); free some memory or use fewer --workers, then run the same "
                        "command again"
                    ) from None
                if deaths[file] == _DEATHS_TO_QUARANTINE:
                    path = job.entries[file].path
                    results.append((rejection(path, "worker", death.reason, death.value), b""))
        return pack_unit(*map(list, zip(*results, strict=True)))

    def stop(self) -> None:
        """Ends the process; a `run` under way in another thread fails with RuntimeError."""
        self._stopped = True
        self._end()

    def _attempt(
        self,
        job: Job,
        results: list[tuple[dict[str, Any], bytes]],
        progress: Progress | None,
    ) -> None:
        """Appends the results that are missing, as far as the process gets."""
        connection = self._connection or self._start()
        limits, in_hand = self._limits, False
        try:
            connection.settimeout(limits.wall_s)
            send_frame(connection, job.packed(len(results)))
            receive_frame(connection, max_bytes=0, wall_s=limits.wall_s)
            in_hand = True
            while len(results) < len(job.entries):
                frame = receive_frame(
                    connection, max_bytes=limits.result_bytes, wall_s=limits.wall_s
                )
                results.append(unit_worker.unpack_result(frame, job.entries[len(results)].path))
                if progress is not None:
                    progress(job.number, len(results))
        except TimeoutError:
            self._end()
            raise _WorkerDiedError(in_hand, "time-limit", f"{limits.wall_s:g} s") from None
        except GarbledError as error:
            self._end()
            raise _WorkerDiedError(in_hand, "worker-garbled", str(error)) from None
        except (EOFError, OSError):
            raise self._death(in_hand) from None

    def _death(self, in_hand: bool) -> Exception:
        status = self._process.wait() if self._process is not None else 0
        self._end()
        if self._stopped:
            return RuntimeError("the worker was stopped")
        if status == -signal.SIGPROF:
            value = f"{self._limits.cpu_s:g} s of processor time"
            return _WorkerDiedError(in_hand, "time-limit", value)
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return _WorkerDiedError(in_hand, "worker-died", name)

    def _start(self) -> socket.socket:
        connection, worker_end = socket.socketpair()
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
        with tempfile.TemporaryFile() as errors, worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(worker_end.fileno())],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                # Ctrl-C reaches the parent only: a worker that dies of it would accuse its file.
                start_new_session=True,
            )
            worker_end.close()
            self._connection = connection
            try:
                send_frame(connection, unit_worker.pack([self._settings, astuple(self._limits)]))
                receive_frame(connection, max_bytes=0, wall_s=_START_S)
            except (EOFError, OSError, GarbledError) as error:
                self._end()
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip().splitlines()
                reason = text[-1] if text else type(error).__name__
                raise UserError(f"a worker process did not start: {reason}") from None
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
    progress: Progress,
    *,
    workers: int,
    settings: dict[str, Any],
    limits: Limits,
) -> None:
    """Does the jobs on `workers` processes of this machine; holds one unit per worker in memory."""
    lock = threading.Lock()
    isolated = [IsolatedWorker(settings, limits) for _ in range(workers)]
    stopping = threading.Event()

    def serve(worker: IsolatedWorker) -> None:
        while not stopping.is_set():
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            store(job.number, worker.run(job, progress))

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(serve, worker) for worker in isolated]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception()) is not None]
        finally:
            stopping.set()
            for worker in isolated:
                worker.stop()
    if errors:
        raise errors[0]


def run_ray(
    jobs: Iterator[Job],
    store: Store,
    progress: Progress,
    *,
    workers: int,
    settings: dict[str, Any],
    limits: Limits,
) -> None:
    """Does the jobs as Ray tasks, on the cluster of RAY_ADDRESS or on this machine.

    Every node must see the source under the same path. Ray repeats the tasks of a node that dies;
    results come back through Ray, so only this machine needs to see the output folder.
    """
    with ray_cluster(workers) as ray:
        task = ray.remote(num_cpus=1, max_retries=MAX_RAY_RETRIES)(_ray_task)
        _submit(jobs, partial(task.remote, ray.put((settings, limits))), store, progress)


@contextmanager
def ray_cluster(n_cpus: int) -> Iterator[Any]:
    """Yields `ray`, connected to the cluster of RAY_ADDRESS, or to one made of this machine.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--runner ray needs ray: pip install 'aria-jax[ray]'") from error
    if started_here := not ray.is_initialized():
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_cpus}
        ray.init(log_to_driver=False, logging_level="ERROR", **local)
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


def _submit(
    jobs: Iterator[Job], submit: Callable[[Job], Any], store: Store, progress: Progress
) -> None:
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
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"Ray gave up the files from {finished_job.entries[0].path} on after "
                    f"{MAX_RAY_RETRIES} tries ({type(error).__name__}); look at the cluster, then "
                    "run the same command again"
                ) from error
            store(finished_job.number, results)
            progress(finished_job.number, len(finished_job.entries))


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


_function: Callable[[Any], Any] | None = None
"""What this process was started to do."""


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    ahead: int,
    chunk: int = 8,
) -> Iterator[Result]:
    """Yields `function(item)` of each of `items`, in order.

    Args:
        function: picklable; sent once to each process, with all that it is bound to.
        items: taken up as they are wanted.
        workers: processes; 0 works in this one.
        ahead: items that may be waiting for the consumer; bounds the memory.
        chunk: items of one task: enough to make the hand-over cheap.

    Raises:
        UserError: a worker process was killed.
    """
    if not workers:
        yield from map(function, items)
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process that runs jax can hang
    pool = ProcessPoolExecutor(workers, context, _remember, (function,))
    waiting: deque[Future[list[Result]]] = deque()
    try:
        todo = iter(items)
        while some := list(islice(todo, chunk)):
            with _deaf_to_interrupts():
                waiting.append(pool.submit(_do_chunk, some))
            if len(waiting) * chunk >= ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?); run the same command again to go "
            "on, with fewer --workers"
        ) from None
    finally:
        # What has started is not waited for: whoever stops early, stops now.
        own = set(multiprocessing.active_children()) - before if waiting else set()
        for process in own:  # first: one that still starts would complain of a pool that is gone
            process.kill()
        pool.shutdown(wait=not waiting, cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes and threads started inside never see SIGINT, which a terminal sends to all.

    The main thread, for which any other may take it, hears of it when it leaves: an exception in
    the middle of starting a process would lose that process, which waits for work for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *told: heard.append(told)) or signal.SIG_DFL
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if heard and callable(handler):
            handler(*heard[-1])


def _remember(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    if (parent := multiprocessing.parent_process()) is not None:  # killed, it says no goodbye
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _do_chunk(items: Sequence[Any]) -> list[Any]:
    if _function is None:
        raise RuntimeError("the worker was not initialised")
    return [_function(item) for item in items]
