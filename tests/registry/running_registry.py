"""Debian's docker-registry (distribution 2.8) on loopback, with TLS by an authority of its own and htpasswd."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAME, PASSWORD = "releaser", "correct horse"
HTPASSWD = "releaser:$2y$05$SCK9fXajSTwNyVBCkAvJaOGSTPvIVfvnVRjD6g/DeBoOj0pN/Zt2O"
LINE = re.compile(r'"(\w+) (/\S*) HTTP/1.1" (\d+) ')


@dataclass
class RunningRegistry:
    """A registry that runs, and what it was asked."""

    host: str
    storage: Path
    log: Path
    certificate: Path

    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path without query and status of each request so far."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [(method, path.partition("?")[0], int(status)) for method, path, status in LINE.findall(text)]

    def forget(self) -> None:
        """Empties the log."""
        os.truncate(self.log, 0)

    def blobs(self) -> dict[str, int]:
        """The sizes of the blobs in its storage, by hex digest."""
        found = self.storage.glob("docker/registry/v2/blobs/sha256/??/*/data")
        return {path.parent.name: path.stat().st_size for path in found}

    def blob_path(self, digest: str) -> Path:
        """Where it keeps a blob."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"


def make_certificate(folder: Path) -> Path:
    """An authority's certificate; beside it a server's certificate and key, by it."""
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    commands = [
        ["req", "-x509", *new, "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA"],
        ["req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=registry"],
        ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
         "-extfile", "names", "-out", "server.pem"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem"


@contextmanager
def running_registry(folder: Path, certificate: Path) -> Iterator[RunningRegistry]:
    """The registry, with its files in a folder, until the block ends."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (Debian: apt-get install docker-registry)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "htpasswd").write_text(HTPASSWD + "\n")
    (folder / "registry.yml").write_text(json.dumps(_settings(folder, host, certificate)))
    with (folder / "registry.log").open("ab") as output:
        command = [program, "serve", str(folder / "registry.yml")]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(host, certificate)
        yield RunningRegistry(host, folder / "storage", folder / "registry.log", certificate)
    finally:
        process.kill()
        process.wait()


def _settings(folder: Path, host: str, certificate: Path) -> dict[str, Any]:
    tls = {"certificate": str(certificate.with_name("server.pem")), "key": str(certificate.with_name("server.key"))}
    return {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
        "http": {"addr": host, "secret": "for the addresses of uploads", "tls": tls},
        "auth": {"htpasswd": {"realm": "Registry Realm", "path": str(folder / "htpasswd")}},
    }


def log_in(folder: Path, host: str, password: str) -> None:
    """Writes docker's config.json as `docker login` does."""
    folder.mkdir(exist_ok=True)
    auth = base64.b64encode(f"{NAME}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def wait_for(host: str, certificate: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificate))
    address, _, port = host.partition(":")
    for _ in range(100):
        try:
            with socket.create_connection((address, int(port)), timeout=5) as connection:
                context.wrap_socket(connection, server_hostname=address).close()
                return
        except ConnectionError:
            time.sleep(0.1)
    raise AssertionError("the registry does not start")
