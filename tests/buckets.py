"""Buckets to test with: servers of S3 and of Google's storage on loopback, behind a bad network.

The servers are moto's and gcp-storage-emulator; a proxy before each counts requests, and on request
answers with errors, late, cut short, or not at all.
"""

import logging
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "trailer"}


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path matches.

    Attributes:
        kind: an HTTP status; "slow" (answers after `seconds`), "cut" (half of the body), or "drop".
    """

    kind: int | str
    path: str = ""
    method: str = ""
    times: int = 1
    seconds: float = 0.0
    body: bytes = b""


@dataclass
class Network:
    """The way to a server."""

    upstream: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    requests: Counter = field(default_factory=Counter)
    n_faults: int = 0
    is_down: bool = True
    _server: ThreadingHTTPServer | None = None
    _port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def up(self) -> None:
        """Opens the way, at the address it had before."""
        self.is_down = False
        handler = type("Handler", (_Handler,), {"network": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Nobody answers at the address any more, nor on what was opened before."""
        self.is_down = True
        self._server.shutdown()
        self._server.server_close()

    def die(self, seconds: float) -> None:
        """Is down for so long."""
        self.down()
        time.sleep(seconds)
        self.up()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def take(self, method: str, path: str) -> Fault | None:
        """Counts a request; what is to happen to it."""
        with self._lock:
            self.requests[method] += 1
            for fault in self.faults:
                if fault.times and fault.method in ("", method) and re.search(fault.path, path):
                    fault.times -= 1
                    self.n_faults += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    network: Network

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.network.take(self.command, self.path)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        if self.network.is_down or (fault is not None and fault.kind == "drop"):
            self.close_connection = True
            return
        if fault is not None and isinstance(fault.kind, int):
            self._answer(fault.kind, [], fault.body)
            return
        upstream = HTTPConnection(*self.network.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        cut = fault is not None and fault.kind == "cut"
        self._answer(answer.status, answer.getheaders(), content, cut)

    def _answer(self, status: int, headers: list, content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        length = str(len(content))
        for name, value in headers:
            if self.command == "HEAD" and name.lower() == "content-length":
                length = value
            if name.lower() not in _HOP and name.lower() not in ("date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    def log_message(self, *_: object) -> None:
        """Silence."""


@dataclass
class Bucket:
    """An empty bucket, and the way to it.

    Attributes:
        url: "gs://…" or "s3://…".
        env: what programs need in their environment to find it.
    """

    url: str
    network: Network
    env: dict[str, str]

    def names(self) -> set[str]:
        """Of all objects."""
        from data_pipeline import storage

        return set(storage.listing(storage.place(self.url)))

    def put(self, name: str, file: Path) -> str:
        """Puts a file, or all below a folder, into it; its URL."""
        from data_pipeline.storage import buckets

        for one in [file] if file.is_file() else (p for p in file.rglob("*") if p.is_file()):
            below = "" if one == file else "/" + one.relative_to(file).as_posix()
            buckets.put(one, f"{self.url}/{name}{below}")
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        from data_pipeline.storage import buckets

        return buckets._client(self.url).cat_file(f"{self.url}/{name}")


@pytest.fixture(scope="session")
def _networks():
    """The servers, started when a test first wants one."""
    made: dict[str, Network] = {}
    servers = []

    def network(scheme: str) -> Network:
        if scheme not in made:
            server, address = _gcs_server() if scheme == "gs" else _s3_server()
            servers.append(server)
            made[scheme] = Network(address)
            made[scheme].up()
        return made[scheme]

    yield network
    for one in made.values():
        one.down()
    for server in servers:
        server.stop()


def _gcs_server() -> tuple[Any, tuple[str, int]]:
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    return server, server._api._httpd.server_address[:2]


def _s3_server() -> tuple[Any, tuple[str, int]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server, server.get_host_and_port()


@pytest.fixture(params=["gs", "s3"])
def bucket(request, _networks, monkeypatch, tmp_path):
    """An empty bucket of either kind; mirror, addresses and credentials are in the environment."""
    scheme = request.param
    network = _networks(scheme)
    network.faults.clear()
    network.requests.clear()
    network.n_faults = 0
    env = {
        "ARIA_JAX_CACHE": str(tmp_path / "mirror"),
        "ARIA_JAX_STORAGE_PATIENCE_S": "60",
        **(_gcs_env(network) if scheme == "gs" else _s3_env(network)),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    name = re.sub("[^a-z0-9]+", "-", f"{request.node.name.lower()}"[:40]).strip("-")
    name += f"-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    from data_pipeline.storage import buckets

    buckets._client(f"{scheme}://{name}").mkdir(name)
    yield Bucket(f"{scheme}://{name}", network, env)
    network.faults.clear()


def _gcs_env(network: Network) -> dict[str, str]:
    return {
        "STORAGE_EMULATOR_HOST": network.address,
        "TENSORSTORE_GCS_HTTP_URL": network.address,
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",
    }


def _s3_env(network: Network) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": network.address,
        "AWS_ACCESS_KEY_ID": "AKIATEST",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
