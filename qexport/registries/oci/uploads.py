"""Uploads of blobs: what a registry has is not sent, large ones go in chunks, and go on where they were cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import requests

from qexport.errors import InputError
from qexport.registries.oci.client import BrokenRequest, Client
from qexport.registries.oci.pending import PendingUpload
from qexport.registries.oci.transport import backoff

CHUNK = 32 << 20
"""Bytes of a chunk. Each is in memory as a whole; registries in front of object stores want at least 5 MiB."""

SMALL_CHUNK = 4 << 20
"""Bytes of a chunk where larger ones are refused: ghcr.io takes no more in one request."""

_LARGEST_CHUNK: Final = 256 << 20
_MOST_FAILURES: Final = 6
_MOST_RESTARTS: Final = 3
_MOST_REFUSALS: Final = 2
_COUNT: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_RANGE: Final = re.compile(r"(?:bytes=)?0-([0-9]{1,18})", re.ASCII)


class Content(Protocol):
    """Bytes that can be read at any offset, as often as needed."""

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from one offset to another."""
        ...


@dataclass(frozen=True)
class Blob:
    """Something to upload.

    Attributes:
        content: its bytes.
        digest: `sha256:...`.
        size: bytes.
    """

    content: Content
    digest: str
    size: int


def upload(client: Client, blob: Blob, told: Callable[[int], None]) -> None:
    """Uploads a blob, unless the registry has it.

    Args:
        client: the repository.
        blob: what to upload.
        told: is called with the bytes of it that are there, after each chunk.

    Raises:
        InputError: the registry refuses, or fails again and again without taking anything; the blob's content is not
            what its digest says.
    """
    if not client.blob_exists({"digest": blob.digest}, client.container):
        _Upload(client, blob, told).run()
    told(blob.size)


class _Upload:
    """One upload: its address, and how many bytes are there."""

    def __init__(self, client: Client, blob: Blob, told: Callable[[int], None]) -> None:
        self._client, self._blob, self._told, self._chunk = client, blob, told, CHUNK
        self._pending = PendingUpload(client.destination, blob.digest)
        self._location, self._offset, self._restarts, self._refused = "", 0, 0, 0

    def run(self) -> None:
        self._location = self._pending.location() or ""
        if not self._location or not self._ask():
            self._begin()
        failures = 0
        while True:
            before = self._offset
            try:
                if self._offset < self._blob.size:
                    self._send_chunk()
                elif self._finish():
                    break
            except BrokenRequest as error:
                failures += 1
                if failures >= _MOST_FAILURES:
                    what = f"the upload broke {failures} times: {error.reason}"
                    raise self._client.failure(what, "run it again: it goes on from what is there") from error
                self._client.sleep(backoff(failures))
                self._recover(error)
            if self._offset > before:
                failures = 0
                self._told(self._offset)
        self._pending.forget()

    def _recover(self, error: BrokenRequest) -> None:
        """Finds out where the upload goes on.

        A refused chunk may have been too large, or have begun elsewhere than the registry thinks. Where the registry
        tells of a place that it refuses itself, as Amazon's may, the upload begins anew.
        """
        refused = error.status in (413, 416)
        self._refused = self._refused + 1 if refused else 0
        if refused:
            self._chunk = min(self._chunk, SMALL_CHUNK)
        if self._refused > _MOST_REFUSALS or not self._ask():
            self._begin_again()

    def _begin(self) -> None:
        response = self._client.do_request(self._client.url("blobs/uploads/"), "POST", data=b"")
        if response.status_code != 202:
            raise self._client.failure("the registry takes no uploads there")
        least = response.headers.get("OCI-Chunk-Min-Length", "")
        if _COUNT.fullmatch(least):
            self._chunk = min(_LARGEST_CHUNK, max(self._chunk, int(least)))
        self._at(response, 0)

    def _begin_again(self) -> None:
        """Some registries give up an upload whose chunk was cut in the middle: it has to begin anew."""
        self._restarts, self._refused = self._restarts + 1, 0
        if self._restarts > _MOST_RESTARTS:
            raise self._client.failure(
                f"the registry has lost the upload {self._restarts} times", "try again on a steadier connection"
            )
        self._begin()

    def _ask(self) -> bool:
        """Asks how many bytes are there; False if the registry does not know the upload any more."""
        try:
            response = self._client.do_request(self._location, "GET")
        except InputError:
            if self._offset:
                raise
            return False  # what an earlier process left is of no use, whatever the reason
        if response.status_code not in (200, 202, 204):
            return False
        self._at(response, _end(response))
        return self._offset <= self._blob.size

    def _send_chunk(self) -> None:
        start, end = self._offset, min(self._offset + self._chunk, self._blob.size)
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{start}-{end - 1}"}
        data = b"".join(self._blob.content.pieces(start, end))
        response = self._client.do_request(self._location, "PATCH", data=data, headers=headers, attempts=1)
        if response.status_code not in (201, 202, 204):
            raise BrokenRequest(f"HTTP status {response.status_code}", response.status_code)
        self._refused = 0
        self._at(response, end)  # not by its header Range, which Amazon's registry leaves where it was

    def _finish(self) -> bool:
        parts = urlsplit(self._location)
        query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", self._blob.digest)])
        url = urlunsplit(parts._replace(query=query))
        try:
            response = self._client.do_request(url, "PUT", data=b"", attempts=1)
        except BrokenRequest:
            if self._client.blob_exists({"digest": self._blob.digest}, self._client.container):
                return True
            raise
        if response.status_code != 201:
            raise BrokenRequest(f"HTTP status {response.status_code}", response.status_code)
        return True

    def _at(self, response: requests.Response, offset: int) -> None:
        if response.headers.get("Location"):
            self._location = self._client.location(response)
        self._offset = offset
        self._pending.keep(self._location)


def _end(response: requests.Response) -> int:
    """How many bytes are there, by the header Range. `0-0` stands for none: no chunk of ours is a single byte."""
    match = _RANGE.fullmatch(response.headers.get("Range", ""))
    return int(match[1]) + 1 if match and int(match[1]) else 0
