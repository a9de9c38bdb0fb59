"""A small OCI registry in this process, for faults that a real one does not show on demand.

It keeps what it has got of a chunk that was cut, unlike docker-registry, and can cut, fail, lie and ask for tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Registry:
    """What a registry holds, how it misbehaves, and what it was asked.

    Attributes:
        host: of the server.
        cut_chunks: for the next uploads of chunks: how many bytes of each are read before the connection is closed.
        forgets_cut: whether an upload whose chunk was cut is given up, as docker-registry does.
        largest_chunk: bytes; larger ones are refused, as ghcr.io does.
        old_ranges: whether it tells only of the first chunk that it has, as Amazon's does.
        cut_downloads: for the next downloads of blobs: how many bytes of each are sent.
        failures: statuses of the next requests that match `METHOD path`, by pattern.
        tokens: whether tokens are wanted; each serves so many requests.
        password: what basic authentication or the token service wants; None if nobody is asked.
        lists_referrers: whether there is a list of them (OCI 1.1).
        redirects: where blobs are, if not in the registry itself.
        realm: of the token service, if it is not the registry itself.
        loses_answers: how many uploads are finished without an answer.
        ignores_ranges: whether downloads always begin at the start.
        only_accepted: whether a document is there only for who names its media type.
    """

    host: str = ""
    cut_chunks: list[int] = field(default_factory=list)
    forgets_cut: bool = False
    largest_chunk: int = 1 << 30
    old_ranges: bool = False
    cut_downloads: list[int] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    tokens: int = 0
    password: str | None = None
    lists_referrers: bool = False
    redirects: str = ""
    realm: str = ""
    loses_answers: int = 0
    ignores_ranges: bool = False
    only_accepted: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    upload_headers: dict[str, str] = field(default_factory=dict)

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    first_ends: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def failure(self, request: str) -> int | None:
        """The status that a request is to fail with."""
        for pattern, statuses in self.failures.items():
            if statuses and re.search(pattern, request):
                return statuses.pop(0)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    registry: Registry

    def handle(self) -> None:
        """Hangs up on TLS, whose first byte is 22, as servers without it do."""
        if self.connection.recv(1, socket.MSG_PEEK) != b"\x16":
            super().handle()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._any
        raise AttributeError(name)

    def _any(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        request = f"{self.command} {parts.path}"
        self.registry.asked.append(request)
        if parts.path == "/token":
            return self._token()
        if not self._may_pass():
            return self._challenge()
        status = self.registry.failure(request)
        if status is not None:
            self._read_body()
            return self._answer(status, headers={"Retry-After": "0"} if status == 429 else {})
        path = parts.path.removeprefix("/v2/")
        for pattern, method in (
            (r"$", self._version),
            (r".+/blobs/uploads/(?P<upload>\w*)$", self._upload),
            (r".+/blobs/(?P<digest>[\w:]+)$", self._blob),
            (r".+/manifests/(?P<reference>[\w.:-]+)$", self._manifest),
            (r".+/referrers/(?P<digest>[\w:]+)$", self._referrers),
            (r".+/tags/list$", self._tags),
        ):
            if match := re.match(pattern, path):
                return method(**match.groupdict())
        return self._answer(404)

    def _version(self) -> None:
        self._answer(200, b"{}")

    def _may_pass(self) -> bool:
        registry, given = self.registry, self.headers.get("Authorization", "")
        if registry.tokens:
            token = given.removeprefix("Bearer ")
            registry.left[token] -= 1
            return registry.left[token] >= 0
        return registry.password is None or given == self._basic()

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"user:{self.registry.password}".encode()).decode()

    def _challenge(self) -> None:
        self._read_body()
        realm = self.registry.realm or f"http://{self.registry.host}/token"
        bearer = f'Bearer realm="{realm}",service="test",scope="repository:x:pull,push"'
        self._answer(401, headers={"WWW-Authenticate": bearer if self.registry.tokens else 'Basic realm="a realm"'})

    def _token(self) -> None:
        if self.registry.password is not None and self.headers.get("Authorization") != self._basic():
            return self._answer(401, b"{}")
        token = f"token{len(self.registry.left)}"
        self.registry.left[token] = self.registry.tokens
        return self._answer(200, json.dumps({"token": token}).encode())

    def _upload(self, upload: str) -> None:
        registry = self.registry
        if self.command == "POST":
            upload = f"u{len(registry.asked)}"
            registry.uploads[upload] = bytearray()
            return self._at(202, upload)
        if upload not in registry.uploads:
            self._read_body()
            return self._answer(404)
        there = registry.uploads[upload]
        if self.command == "GET":
            return self._at(204, upload)
        if self.command == "PATCH":
            return self._chunk(upload, there)
        there += self._read_body()
        digest = "sha256:" + hashlib.sha256(there).hexdigest()
        if digest != self.query["digest"]:
            return self._answer(400, b'{"errors": [{"code": "DIGEST_INVALID", "message": "other bytes"}]}')
        registry.blobs[digest] = bytes(registry.uploads.pop(upload))
        if registry.loses_answers:
            registry.loses_answers -= 1
            return self._hang_up()
        return self._answer(201)

    def _chunk(self, upload: str, there: bytearray) -> None:
        start = int(self.headers["Content-Range"].partition("-")[0])
        if start != len(there) or int(self.headers["Content-Length"]) > self.registry.largest_chunk:
            self._read_body()
            return self._at(416, upload)
        self.registry.first_ends.setdefault(upload, int(self.headers["Content-Range"].partition("-")[2]))
        if self.registry.cut_chunks:
            there += self._read_body(self.registry.cut_chunks.pop(0))
            if self.registry.forgets_cut:
                del self.registry.uploads[upload]
            return self._hang_up()
        there += self._read_body()
        return self._at(202, upload)

    def _at(self, status: int, upload: str) -> None:
        last = max(0, len(self.registry.uploads[upload]) - 1)
        if self.registry.old_ranges:
            last = min(last, self.registry.first_ends.get(upload, 0))
        headers = {"Location": f"/v2/x/blobs/uploads/{upload}", "Range": f"0-{last}", **self.registry.upload_headers}
        self._answer(status, headers=headers)

    def _blob(self, digest: str) -> None:
        content = self.registry.blobs.get(digest)
        if content is None:
            return self._answer(404)
        if self.registry.redirects and self.command == "GET":
            return self._answer(307, headers={"Location": self.registry.redirects})
        self.registry.bytes_out += self.command == "GET" and len(content)
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        heard = match is not None and not self.registry.ignores_ranges
        start, end = (int(match[1]), int(match[2]) + 1) if match and heard else (0, len(content))
        self.registry.bytes_out -= start + len(content) - end
        status, content = 206 if heard else 200, content[:end]
        if self.command == "GET" and self.registry.cut_downloads:
            return self._cut(status, content[start:], self.registry.cut_downloads.pop(0))
        return self._answer(status, content[start:])

    def _manifest(self, reference: str) -> None:
        registry = self.registry
        if self.command == "PUT":
            content = self._read_body()
            digest = "sha256:" + hashlib.sha256(content).hexdigest()
            registry.manifests[digest] = (self.headers["Content-Type"], content)
            if not reference.startswith("sha256:"):
                registry.tags[reference] = digest
            subject = json.loads(content).get("subject")
            more = {"OCI-Subject": subject["digest"]} if subject and registry.lists_referrers else {}
            return self._answer(201, headers={"Docker-Content-Digest": digest, **more})
        found = registry.manifests.get(registry.tags.get(reference, reference))
        if found is None or (registry.only_accepted and found[0] not in self.headers.get("Accept", "")):
            return self._answer(404)
        return self._answer(200, found[1], headers={"Content-Type": found[0], **registry.headers})

    def _referrers(self, digest: str) -> None:
        if not self.registry.lists_referrers:
            return self._answer(404)
        entries = [
            {"mediaType": kind, "digest": name, "size": len(content)}
            for name, (kind, content) in self.registry.manifests.items()
            if (json.loads(content).get("subject") or {}).get("digest") == digest
        ]
        return self._answer(200, json.dumps({"manifests": entries}).encode())

    def _tags(self) -> None:
        names = [name for name in sorted(self.registry.tags) if name > self.query.get("last", "")]
        page, rest = names[:3], names[3:]
        more = {"Link": f'</v2/x/tags/list?last={page[-1]}>; rel="next"'} if rest else {}
        self._answer(200, json.dumps({"tags": page}).encode(), headers=more)

    def _read_body(self, limit: int | None = None) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length if limit is None else min(limit, length))
        self.registry.bytes_in += len(content)
        return content

    def _answer(self, status: int, content: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self, status: int, content: bytes, sent: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()


@contextmanager
def serving(registry: Registry) -> Iterator[Registry]:
    """Serves the registry on loopback, without TLS, until the block ends."""

    class Handler(_Handler):
        pass

    Handler.registry = registry
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    registry.host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
