"""A small server that speaks the part of the hub's API that downloads need, and counts who asks for what."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secret"


class Hub:
    """Repositories by `models/org/name` or `datasets/org/name`; each has one commit, also called `main`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.failing = False
        self.asked: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(request.path.split("?")[0]).strip("/")
        self.asked[f"{request.command} {path}"] += 1
        parts = path.split("/")
        if self.failing:
            self._send(request, 503, b"out of order", {}, body)
        elif parts[0] == "api":
            kind = parts[4] if len(parts) > 4 else "revision"
            self._info(request, "/".join(parts[1:4]), parts[5] if len(parts) > 5 else "main", kind, body)
        else:
            parts = parts if parts[0] == "datasets" else ["models", *parts]
            self._file(request, "/".join(parts[:3]), parts[4], "/".join(parts[5:]), body)

    def _denied(self, request: BaseHTTPRequestHandler, name: str, revision: str, body: bool) -> bool:
        if name not in self.repositories:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif name in self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(request, 401, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif revision not in ("main", COMMIT):
            self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        else:
            return False
        return True

    def _info(self, request: BaseHTTPRequestHandler, name: str, revision: str, kind: str, body: bool) -> None:
        if self._denied(request, name, revision, body):
            return
        folder = self.repositories[name]
        files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        info: Any = {"id": "/".join(name.split("/")[1:]), "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        if kind == "tree":
            info = [{"type": "file", "path": f, "oid": "0", "size": (folder / f).stat().st_size} for f in files]
        self._send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, request: BaseHTTPRequestHandler, name: str, revision: str, path: str, body: bool) -> None:
        if self._denied(request, name, revision, body):
            return
        file = self.repositories[name] / path
        if not file.is_file():
            self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        self._send(request, 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

    def _send(
        self, request: BaseHTTPRequestHandler, code: int, data: bytes, headers: dict[str, str], body: bool
    ) -> None:
        request.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)
