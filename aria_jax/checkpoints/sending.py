"""What a run sends to a bucket in the background: its checkpoints, and what lies beside them."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from data_pipeline import storage
from data_pipeline.errors import UserError


class Outbox:
    """Checkpoints that Orbax writes to this disk, sent to their bucket once they are whole.

    A mark is sent last, as Orbax does where nothing can be renamed. What is whole here and was not
    sent when the process ended is no checkpoint: the run begins again from the last one that is.
    """

    def __init__(self, folder: Path, read_only: bool):
        if jax.process_count() > 1 and not read_only:
            raise UserError(
                f"{folder}: several processes cannot write one checkpoint to s3://; name a "
                "--workdir in gs://, or on a disk that they share"
            )
        self._folder, self._pool = folder, ThreadPoolExecutor(1, "outbox")
        self._sending: Future | None = None
        for step in self._here() - set(self.steps()):
            if not read_only:
                shutil.rmtree(folder / str(step))

    def _here(self) -> set[int]:
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return {int(name) for name in names if name.isdecimal()}

    def steps(self) -> list[int]:
        """Steps that are in the bucket."""
        return sorted(s for s in self._here() if not storage.is_changed(self._mark(s)))

    def _mark(self, step: int) -> Path:
        return self._folder / str(step) / storage.COMMITTED

    def send_after(self, wait: Callable[[], None]) -> None:
        """Sends what is whole, and removes what is no more, once `wait` returns; in a thread."""

        def send() -> None:
            wait()
            for step in self._here() - set(self.steps()):
                self._mark(step).touch()
                storage.upload(self._folder / str(step), last=storage.COMMITTED)
            there = {name.split("/")[0] for name in storage.listing(self._folder)}
            for name in there:
                if name.isdecimal() and int(name) not in self._here():
                    storage.remove(self._mark(int(name)))
                    storage.remove(self._folder / name)

        self._sending = self._pool.submit(send)

    def wait(self) -> None:
        """Returns when all is sent; raises what went wrong."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()


class Sender:
    """Sends what changes below a place of the mirror, again and again until it is stopped.

    Args:
        only: which names.
        every_s: seconds between two looks.
    """

    def __init__(self, path: Path, only: Callable[[str], bool], every_s: float = 30.0):
        self._path, self._only, self._every_s = path, only, every_s
        self._ended = threading.Event()
        self._failure: UserError | OSError | None = None
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def send_now(self) -> None:
        """Sends what has changed, and returns when it is there; raises what went wrong before."""
        if self._failure is not None:
            raise self._failure
        storage.upload(self._path, only=self._only)

    def stop(self) -> None:
        """Sends nothing more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                storage.upload(self._path, only=self._only)
            except (UserError, OSError) as error:
                self._failure = error
                return
