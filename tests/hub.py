"""A hub on loopback, for huggingface_hub's own client: repositories of files, and a bad network."""

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

LARGE = ".safetensors"
"""Of these the hub keeps the sha256; of others git's sha1."""


@dataclass
class Hub:
    """What the hub has, and what it was asked.

    Attributes:
        repos: "owner/name" -> branch, tag or commit -> (commit, file name -> bytes).
        broken: how many more downloads end half-way; lies: files given with other bytes; gated:
            repositories that only some may see.
        asked: methods and paths, counted.
    """

    repos: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    broken: int = 0
    lies: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: Counter = field(default_factory=Counter)
    address: str = ""
    _server: ThreadingHTTPServer | None = None

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes a commit, and lets the branch stand for it."""
        told = repr((repo, branch, sorted(files.items())))
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.repos.setdefault(repo, {}).update({branch: (commit, files), commit: (commit, files)})
        return commit

    def up(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Nobody answers any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if self.hub._server is None:  # on a connection that was opened before
            self.close_connection = True
            return
        self.hub.asked[f"{self.command} {path}"] += 1
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None or found[1] not in self.hub.repos:
            self._send(401, b"", [("X-Error-Code", "RepoNotFound")])
            return
        if found[1] in self.hub.gated:
            self._send(403, b"", [("X-Error-Code", "GatedRepo")])
            return
        at = self.hub.repos[found[1]].get(found[2] or "main")
        if at is None:
            self._send(404, b"", [("X-Error-Code", "RevisionNotFound")])
        elif api:
            names = [{"rfilename": name} for name in at[1]]
            said = {"id": found[1], "sha": at[0], "siblings": names}
            self._send(200, json.dumps(said).encode(), [("Content-Type", "application/json")])
        elif found[3] not in at[1]:
            self._send(404, b"", [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", at[0])])
        else:
            self._file(found[3], at[0], at[1][found[3]])

    def _file(self, name: str, commit: str, content: bytes) -> None:
        if name.endswith(LARGE):
            etag = hashlib.sha256(content).hexdigest()
        else:
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        headers = [("X-Repo-Commit", commit), ("ETag", f'"{etag}"'), ("Accept-Ranges", "bytes")]
        content = self.hub.lies.get(name, content)
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        if begin:
            headers.append(("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}"))
        cut = self.command == "GET" and name.endswith(LARGE) and self.hub.broken > 0
        self.hub.broken -= cut
        self._send(206 if begin else 200, content[begin:], headers, cut)

    def _send(self, status: int, body: bytes, headers: list, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = _answer

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def model_hub(tmp_path, monkeypatch) -> Hub:
    """An empty hub and an empty cache, which the client of this process asks."""
    constants = pytest.importorskip("huggingface_hub.constants")
    from aria_jax.checkpoints import hub as names

    made = Hub()
    made.up()
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    template = f"{made.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(names, "_found", {})
    yield made
    made.down()
