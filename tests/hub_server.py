"""A server on loopback that answers as the Hugging Face hub does, and misbehaves on request.

What it models, from the hub's documentation and the answers that public code has written down: the API of a dataset
(`/api/datasets/ID[/revision/REV]`, `/tree/REV` in pages with a `Link`, `/paths-info/REV`), `resolve` with a 302 to a
second origin for files in LFS and a 307 to `/api/resolve-cache` for the others, ETags, `X-Repo-Commit`,
`X-Linked-Size`, `X-Linked-Etag`, Range, 404 with `X-Error-Code`, 401 without a code for a dataset that is not there.
Xet is not offered.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit


class Request(NamedTuple):
    """One request that the server has seen."""

    method: str
    path: str
    """Without its query, unquoted."""
    headers: dict[str, str]
    """By their names in lower case."""
    origin: str
    """`hub` or `cdn`."""


@dataclass
class Fault:
    """What goes wrong with a file, for so many requests of its body or, with a status, of its address."""

    times: float = 1
    status: int | None = None
    """Answered instead of the redirect to the body."""
    headers: dict[str, str] = field(default_factory=dict)
    """With that status."""
    cut_after: int | None = None
    """Bytes of this body that are sent before the connection is closed, the whole length having been announced."""
    reset: bool = False
    """Cut by a reset rather than a close."""
    hold: threading.Event | None = None
    """Wait for it before cutting, or before going on."""
    hold_after: int | None = None
    """Bytes that are sent before waiting for `hold` and going on."""
    short: int | None = None
    """Announce and send only so many bytes."""
    flip: int | None = None
    """The place of a byte that is sent altered."""
    longer: int = 0
    """Bytes added at the end."""
    ignore_range: bool = False
    cdn_status: int | None = None
    """Answered by the second origin."""
    before: Callable[[], None] | None = None
    """Called before the body is sent."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Datasets by name; `requests` is what was asked, `faults` what goes wrong with which path."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.api_faults: list[Fault] = []
        self.gated: set[str] = set()
        self.token: str | None = None
        """Without it nothing is answered, where it is set."""
        self.page_size = 1000
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._hub = _start(self, "hub")
        self._cdn = _start(self, "cdn")
        self.url = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_address[1]}"

    def add(self, repository: str, files: dict[str, bytes], *, commit: str, branch: str = "main") -> None:
        """Make `files` a commit of `repository`, and `branch` point at it."""
        self.commits.setdefault(repository, {})[commit] = files
        self.branches[repository, branch] = commit

    def fault(self, path: str, **what: object) -> Fault:
        """Let something go wrong with the file `path`."""
        fault = Fault(**what)  # type: ignore[arg-type]
        self.faults[path].append(fault)
        return fault

    def close(self) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()
        # Those that a client keeps for later would be answered still.
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def asked(self, ending: str, method: str = "GET", origin: str | None = None) -> list[Request]:
        """Return the requests whose path ends so."""
        return [
            request
            for request in self.requests
            if request.path.endswith(ending) and request.method == method and origin in (None, request.origin)
        ]

    def take(self, faults: list[Fault], *, with_status: bool) -> Fault:
        """Return the fault of the next request, a harmless one where there is none left."""
        with self._lock:
            for fault in faults:
                if fault.times > 0 and (fault.status is not None) == with_status:
                    fault.times -= 1
                    return fault
        return Fault()


def is_lfs(path: str) -> bool:
    return not path.endswith((".md", ".jsonl", ".gitattributes"))


def _etag(path: str, content: bytes) -> str:
    return sha256(content) if is_lfs(path) else blob_sha1(content)


def _start(hub: HubServer, origin: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "origin": origin})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    origin: str
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, path, headers, self.origin))
        query = parse_qs(url.query)
        try:
            if self.origin == "cdn":
                self._send_content(query["path"][0], path.rsplit("/", 1)[1])
            elif self.hub.token and headers.get("authorization") != f"Bearer {self.hub.token}":
                self._refuse(401, "", "Invalid username or password.")
            elif path.startswith("/api/datasets/"):
                self._api(url.path.removeprefix("/api/datasets/"), query)
            elif path.startswith("/api/resolve-cache/datasets/"):
                owner, name, commit, file = path.removeprefix("/api/resolve-cache/datasets/").split("/", 3)
                self._send_content(file, _etag(file, self.hub.commits[f"{owner}/{name}"][commit][file]))
            elif path.startswith("/datasets/") and "/resolve/" in path:
                self._resolve(url.path.removeprefix("/datasets/"))
            else:
                self._refuse(404, "", "Not found")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _api(self, rest: str, query: dict[str, list[str]]) -> None:
        fault = self.hub.take(self.hub.api_faults, with_status=True)
        if fault.status is not None:
            return self._refuse(fault.status, "", "as ordered", fault.headers)
        parts = rest.split("/")
        repository, kind = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        found = self._commit(repository, unquote(parts[3]) if kind else "main")
        if found is None:
            return None
        commit, files = found
        if kind in ("", "revision"):
            return self._json(
                {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            )
        entries = [_entry(name, content) for name, content in sorted(files.items())]
        if kind == "paths-info":
            wanted = parse_qs(self.body.decode())["paths"]
            return self._json([entry for entry in entries if entry["path"] in wanted])
        folders = sorted({name.rsplit("/", 1)[0] for name in files if "/" in name})
        entries = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders
        ] + entries
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        link = {}
        if end < len(entries):
            # The hub names itself there, whatever mirror was asked.
            address = (
                f"https://huggingface.co/api/datasets/{repository}/tree/{commit}?recursive=true&cursor={end}"
            )
            link = {"Link": f'<{address}>; rel="next"'}
        return self._json(entries[start:end], link)

    def _commit(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files, or refuse the request."""
        commits = self.hub.commits.get(repository)
        if commits is None:
            self._refuse(401, "", "Invalid username or password.")
            return None
        commit = self.hub.branches.get((repository, revision), revision)
        if commit not in commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, commits[commit]

    def _resolve(self, rest: str) -> None:
        repository, _, rest = rest.partition("/resolve/")
        revision, _, path = rest.partition("/")
        path = unquote(path)
        if repository in self.hub.gated:
            return self._refuse(401, "GatedRepo", f"Access to dataset {repository} is restricted.")
        found = self._commit(repository, unquote(revision))
        if found is None:
            return None
        commit, files = found
        about = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", about)
        fault = self.hub.take(self.hub.faults[path], with_status=True)
        if fault.status is not None:
            return self._refuse(fault.status, "", "as ordered", fault.headers)
        etag = _etag(path, files[path])
        about["ETag"] = f'"{etag}"'
        if is_lfs(path):
            about["X-Linked-Size"] = str(len(files[path]))
            about["X-Linked-Etag"] = f'"{etag}"'
            target = f"{self.hub.cdn_url}/xet-bridge-us/{etag}?path={quote(path, safe='')}&Signature=abc"
            return self._head(302, {**about, "Location": target, "Content-Length": "0"})
        target = f"/api/resolve-cache/datasets/{repository}/{commit}/{quote(path)}"
        return self._head(307, {**about, "Location": target, "Content-Length": "0"})

    def _send_content(self, path: str, etag: str) -> None:
        content, commit = next(
            (files[path], commit)
            for commits in self.hub.commits.values()
            for commit, files in commits.items()
            if path in files and _etag(path, files[path]) == etag
        )
        faults = self.hub.faults[path] if self.command == "GET" else []
        fault = self.hub.take(faults, with_status=False)
        if fault.before is not None:
            fault.before()
        if fault.cdn_status is not None:
            return self._refuse(fault.cdn_status, "", "SignatureError")
        content += bytes(fault.longer)
        if fault.flip is not None:
            content = content[: fault.flip] + bytes([content[fault.flip] ^ 0x01]) + content[fault.flip + 1 :]
        # The second origin's own ETag is no hash of the content.
        about = {
            "ETag": f'"{etag if self.origin == "hub" else sha256(etag.encode())}"',
            "Accept-Ranges": "bytes",
        }
        if self.origin == "hub":
            about["X-Repo-Commit"] = commit
        status, start = 200, 0
        wanted = self.headers.get("Range")
        if wanted is not None and not fault.ignore_range:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content):
                return self._refuse(416, "", "", {"Content-Range": f"bytes */{len(content)}"})
            status = 206
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault.short is not None:
            body = body[: fault.short]
        self._head(
            status, {**about, "Content-Length": str(len(body)), "Content-Type": "application/octet-stream"}
        )
        if self.command == "HEAD":
            return None
        if fault.hold is not None and fault.hold_after is not None:
            self.wfile.write(body[: fault.hold_after])
            fault.hold.wait(30)
            body = body[fault.hold_after :]
        if fault.cut_after is None:
            self.wfile.write(body)
            return None
        self.wfile.write(body[: fault.cut_after])
        self.wfile.flush()
        if fault.hold is not None:
            fault.hold.wait(30)
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        return None

    def _json(self, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        about = {
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }
        self._head(200, about)
        self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        about = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
        if code:
            about["X-Error-Code"] = code
        self._head(status, {**about, **(headers or {}), "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
    if not is_lfs(path):
        return {**entry, "oid": blob_sha1(content)}
    version = "version https://git-lfs.github.com/spec/v1"
    pointer = f"{version}\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {**entry, "oid": blob_sha1(pointer), "lfs": lfs, "xetHash": sha256(b"xet" + content)}
