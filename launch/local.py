"""Starts one `aria-jax` command as several processes of this machine.

    python -m launch.local -n 2 -- train pretrain --data my_data --workdir run1

Process 0 shows its output, another its last lines where it fails. When a process dies the others
are ended, so that a run never hangs. Ctrl-C or SIGTERM asks all of them to save and leave.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aria_jax.train.processes import COORDINATOR, COUNT, INDEX

GRACE_S = 20.0  # for the others to find out and leave by themselves
KILL_AFTER_S = 10.0  # for those that were asked to leave


def environments(n: int, port: int) -> list[dict[str, str]]:
    """What each process finds in its environment, besides everything this one has."""
    return [
        {COORDINATOR: f"localhost:{port}", COUNT: str(n), INDEX: str(index)} for index in range(n)
    ]


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(n: int, arguments: Sequence[str]) -> int:
    """Runs the processes to their end; the exit status of the first that failed, or 0."""
    command = [sys.executable, "-m", "aria_jax.cli.main", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"process-{index}.log" for index in range(n)]
        processes = []
        for index, extra in enumerate(environments(n, free_port())):
            output = None if index == 0 else logs[index].open("wb")
            # In a session of its own: Ctrl-C reaches this launcher only, which passes it on once.
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **extra},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
        with _stop_passed_on(processes):
            failed = _wait(processes)
        if failed is None:
            return 0
        print(f"process {failed} of {n} ended with status {processes[failed].returncode}; "
              "run the same command again to go on", file=sys.stderr)  # fmt: skip
        if failed:
            print(logs[failed].read_text(errors="replace")[-2000:], file=sys.stderr)
        return abs(processes[failed].returncode) or 1


@contextmanager
def _stop_passed_on(processes: list[subprocess.Popen]) -> Iterator[None]:
    """SIGINT and SIGTERM of the launcher become SIGTERM of every process, which then saves."""

    def pass_on(*_: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Index of the first process that failed, once all are gone; None where none did."""
    failed = None
    while failed is None and any(process.poll() is None for process in processes):
        time.sleep(0.1)
        failed = next((i for i, p in enumerate(processes) if p.returncode not in (None, 0)), None)
    _until_gone(processes, GRACE_S)
    for ask, seconds in ((subprocess.Popen.terminate, KILL_AFTER_S), (subprocess.Popen.kill, 5.0)):
        for process in processes:
            if process.poll() is None:
                ask(process)
        _until_gone(processes, seconds)
    if failed is None:
        failed = next((i for i, p in enumerate(processes) if p.returncode), None)
    return failed


def _until_gone(processes: list[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.1)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments and starts the processes."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.local", description=__doc__.splitlines()[0]
    )
    parser.add_argument("-n", type=int, default=2, help="processes (2)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("arguments", nargs="+", help="after `--`: what follows `aria-jax`")
    args = parser.parse_args(argv)
    if args.dry_run:
        for extra in environments(args.n, free_port()):
            settings = " ".join(f"{name}={value}" for name, value in extra.items())
            print(f"{settings} aria-jax {shlex.join(args.arguments)}")
        return 0
    return start(args.n, args.arguments)


if __name__ == "__main__":
    sys.exit(main())
