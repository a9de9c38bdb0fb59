"""A small model hub in this process: as much of the API as huggingface_hub's own client uploads and downloads through.

Commits are whole trees, weights go through LFS's batch API, tags and branches name commits. Nothing is kept on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Trees by commit, in order; names by commit."""

    private: bool
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, tree: dict[str, bytes], message: str) -> str:
        """Adds a commit to the main branch."""
        oid = hashlib.sha1(f"{len(self.trees)}{sorted(tree)}".encode()).hexdigest()
        self.trees[oid], self.branches["main"] = tree, oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        """The commit of a revision."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.trees else None


@dataclass
class Hub:
    """What a hub holds.

    Attributes:
        url: of the server.
        token: what clients must show.
        fails: the statuses of the next requests that match `METHOD path`, by pattern.
        drops: names of files that commits lose.
    """

    url: str = ""
    token: str = "hf_secret"
    fails: dict[str, int] = field(default_factory=dict)
    drops: set[str] = field(default_factory=set)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._any()

    do_GET = do_HEAD = do_PUT = do_POST

    def _any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = (
            self.rfile.read(int(self.headers.get("Content-Length", 0))) if not self._chunked() else self._chunks()
        )
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        status = next((status for pattern, status in self.hub.fails.items() if re.search(pattern, request)), None)
        if status is not None:
            return self._json({"error": "it fails"}, status)
        if path.startswith("/objects/"):
            return self._object(path.removeprefix("/objects/"))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "no"}, 401, {"X-Error-Code": "RepoNotFound"})
        for pattern, method in (
            (r"POST /api/repos/create$", self._create),
            (r"POST /api/validate-yaml$", self._valid),
            (rf"GET /api/models/{REPOSITORY}/refs$", self._refs),
            (rf"GET /api/models/{REPOSITORY}/tree/(?P<revision>.+)$", self._tree),
            (rf"GET /api/models/{REPOSITORY}/revision/(?P<revision>.+)$", self._info),
            (rf"GET /api/models/{REPOSITORY}$", self._info),
            (rf"POST /api/models/{REPOSITORY}/preupload/(?P<revision>.+)$", self._preupload),
            (rf"POST /api/models/{REPOSITORY}/commit/(?P<revision>.+)$", self._commit),
            (rf"POST /api/models/{REPOSITORY}/tag/(?P<revision>.+)$", self._tag),
            (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch$", self._batch),
            (rf"(GET|HEAD) /{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)$", self._resolve),
        ):
            if match := re.match(pattern, request):
                return self._known(method, match.groupdict())
        return self._json({"error": f"not in this hub: {request}"}, 404)

    def _known(self, method: Callable[..., None], found: dict[str, str]) -> None:
        repo = found.pop("repo", None)
        if repo is None:
            return method()
        if repo not in self.hub.repositories:
            return self._json({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})
        repository = self.hub.repositories[repo]
        if "revision" in found:
            oid = repository.find(found["revision"])
            if oid is None:
                return self._json({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
            found["revision"] = oid
        return method(repository, **found)

    def _chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding") == "chunked"

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[name] = Repository(
                wanted.get("visibility") == "private" or bool(wanted.get("private"))
            )
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._json({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def _valid(self) -> None:
        self._json({"warnings": [], "errors": []})

    def _refs(self, repository: Repository) -> None:
        def listed(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        self._json({"branches": branches, "tags": tags, "converts": []})

    def _tree(self, repository: Repository, revision: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": _blob_oid(content)}
            for name, content in repository.trees[revision].items()
        ]
        self._json(entries)

    def _info(self, repository: Repository, revision: str = "main") -> None:
        oid = repository.find(revision) or ""
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": _blob_oid(content)}
            for name, content in repository.trees[oid].items()
        ]
        self._json(
            {"_id": "1", "id": "org/name", "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
        )

    def _preupload(self, repository: Repository, revision: str) -> None:
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(self.body)["files"]
        ]
        self._json({"files": files, "commitOid": revision})

    def _batch(self, repository: Repository) -> None:
        found = []
        for each in json.loads(self.body)["objects"]:
            known = each["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}", "header": {}}}
            found.append({**each, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": found}, content_type="application/vnd.git-lfs+json")

    def _object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "other bytes"}, 400)
        self.hub.objects[oid] = self.body
        return self._json({})

    def _commit(self, repository: Repository, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.branches["main"]):
            return self._json({"error": "the branch has moved"}, 412)
        tree = dict(repository.trees[revision])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    tree[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del tree[value["path"]]
        oid = repository.commit({name: tree[name] for name in tree if name not in self.hub.drops}, header["summary"])
        return self._json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/org/name/commit/{oid}", "hookOutput": ""}
        )

    def _tag(self, repository: Repository, revision: str) -> None:
        name = json.loads(self.body)["tag"]
        if name in repository.tags:
            return self._json({"error": "it exists"}, 409)
        repository.tags[name] = revision
        return self._json({})

    def _resolve(self, repository: Repository, revision: str, name: str) -> None:
        content = repository.trees[revision].get(name)
        if content is None:
            return self._json({"error": "no"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": revision, "ETag": f'"{_blob_oid(content)}"', "X-Linked-Size": str(len(content))}
        return self._answer(200, content, {**headers, "Content-Type": "application/octet-stream"})

    def _json(
        self, value: Any, status: int = 200, headers: Mapping[str, str] = {}, content_type: str = "application/json"
    ) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": content_type, **headers})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob_oid(content: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves the hub on loopback until the block ends."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
