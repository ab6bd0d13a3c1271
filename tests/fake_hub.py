"""A stand-in for the Hub on this machine: data sets as the real one serves them, with its faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789" * 4
RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/datasets/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")


class FakeHub(ThreadingHTTPServer):
    """`repositories`: {owner/name: {path: bytes}}. `gated` are refused; `revisions` name the one commit there is.

    Every `drop_every`-th answer with a body ends after a half of it, every `busy_every`-th request is told to wait
    (429), and those for a path in `missing` are not found, as where a file was removed.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]], drop_every: int = 0, busy_every: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.drop_every, self.busy_every = repositories, drop_every, busy_every
        self.gated: set[str] = set()
        self.revisions = {"main", SHA}
        self.requests, self.counts, self.sent = list[str](), Counter[str](), 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def due(self, what: str, every: int) -> bool:
        with self.lock:
            self.counts[what] += 1
            if every and self.counts[what] % every == 0:
                self.counts[f"{what}, done"] += 1
                return True
            return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("content-length") or 0)))

    def answer(self, body: bytes = b"") -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.due("busy", hub.busy_every):
            self.send(429, b"", {"Retry-After": "0"})
        elif match := RESOLVE.fullmatch(path):
            self.with_files(match[1], match[2], lambda files: self.file(files, match[3]))
        elif match := API.fullmatch(path):
            repo, what, revision, rest = match.groups()
            self.with_files(repo, revision or "main", lambda files: self.listed(repo, files, what, rest, body))
        else:
            self.send(404)

    def with_files(self, repo: str, revision: str, then) -> None:
        hub = self.server
        if repo not in hub.repositories:
            self.send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo in hub.gated:
            self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"})
        elif revision not in hub.revisions:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            then(hub.repositories[repo])

    def listed(self, repo: str, files: dict[str, bytes], what: str | None, rest: str, body: bytes) -> None:
        if what in (None, "revision"):
            facts = {
                "_id": "0",
                "id": repo,
                "sha": SHA,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
            }
            self.send_json(facts | {"siblings": [{"rfilename": path} for path in files], "downloads": 0, "likes": 0})
        elif what == "tree":
            inside = {path: data for path, data in files.items() if not rest or path.startswith(f"{rest}/")}
            self.send_json([entry(path, data) for path, data in inside.items()] + folders(inside))
        else:
            asked = json.loads(body)["paths"]
            asked = [asked] if isinstance(asked, str) else asked
            every = {e["path"]: e for e in [*(entry(p, d) for p, d in files.items()), *folders(files)]}
            self.send_json([every[path] for path in asked if path in every])

    def file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        data, status, headers = files[path], 200, {"X-Repo-Commit": SHA, "ETag": f'"{oid(files[path])}"'}
        headers["Accept-Ranges"] = "bytes"
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self.send(status, data, headers, droppable=True)

    def send_json(self, value) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes = b"", headers: dict | None = None, droppable: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.server
        if droppable and hub.due("dropped", hub.drop_every):
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        hub.sent += len(data)
        self.wfile.write(data)


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": oid(data)}


def folders(files: dict[str, bytes]) -> list[dict]:
    found = {path.rsplit("/", n)[0] for path in files for n in range(1, path.count("/") + 1)}
    return [{"type": "directory", "path": path, "oid": oid(path.encode()), "size": 0} for path in sorted(found)]
