"""Reading what is in a registry: every byte is counted and digested, and a cut download goes on where it was cut."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, Final, TypeGuard

import requests
import urllib3

from qexport.artifact.digests import sha256_bytes
from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import INDEX, MANIFEST, Descriptor
from qexport.registries.oci.transport import backoff

_ANSWER_LIMIT: Final = 4 << 20
_MOST_CUTS: Final = 6
_PIECE: Final = 1 << 16
_DOCKER: Final = "application/vnd.docker.distribution.manifest"
_ANY_DOCUMENT: Final = f"{INDEX}, {MANIFEST}, {_DOCKER}.list.v2+json, {_DOCKER}.v2+json, */*"
"""Some registries answer that there is no tag where its document has a type that is not asked for."""

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


class BlobStream:
    """The bytes of a blob, in order.

    Args:
        client: the repository.
        blob: which one.
        told: is called with the bytes read so far.
        span: read from one offset to another; None for all of it, whose digest `finish` compares.
    """

    def __init__(
        self, client: Client, blob: Descriptor, told: Callable[[int], None], span: tuple[int, int] | None = None
    ) -> None:
        self._client, self._blob, self._told = client, blob, told
        self._hash, self._cuts = hashlib.sha256(), 0
        self._offset, self._end = span or (0, blob.size)
        self._response: requests.Response | None = None

    def read(self, count: int, /) -> bytes:
        """At most so many bytes, fewer than one only at the blob's end.

        Raises:
            InputError: the registry does not have it, or cuts it again and again.
        """
        count = min(count, self._end - self._offset)
        while count:
            try:
                found = self._open().raw.read(count, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError):
                found = b""
            if found:
                self._hash.update(found)
                self._offset += len(found)
                self._cuts = 0
                self._told(self._offset)
                return bytes(found)
            self._cut()
        return b""

    def finish(self) -> None:
        """Reads what is left, and compares the digest.

        Raises:
            InputError: it is another.
        """
        while self.read(_PIECE):
            pass
        self.close()
        if f"sha256:{self._hash.hexdigest()}" != self._blob.digest:
            raise self._client.failure(
                f"a layer is damaged: its bytes do not have the digest {self._blob.digest}",
                "publish the release again under another tag",
            )

    def close(self) -> None:
        """Gives the connection back."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _open(self) -> requests.Response:
        if self._response is None:
            headers = {"Accept-Encoding": "identity"}
            if self._offset or self._end < self._blob.size:
                headers["Range"] = f"bytes={self._offset}-{self._end - 1}"
            url = self._client.url(f"blobs/{self._blob.digest}")
            response = self._client.do_request(url, headers=headers, stream=True)
            if response.status_code not in (200, 206):
                raise self._client.failure(f"a layer is missing in the registry: {self._blob.digest}")
            self._response = response
            if self._offset and response.status_code == 200:
                self._skip(response)
        return self._response

    def _skip(self, response: requests.Response) -> None:
        """Passes what is known already, where a registry sends everything instead of the range."""
        left = self._offset
        while left and (found := response.raw.read(min(_PIECE, left), decode_content=False)):
            left -= len(found)

    def _cut(self) -> None:
        self.close()
        self._cuts += 1
        if self._cuts >= _MOST_CUTS:
            raise self._client.failure(f"the download broke {self._cuts} times", "try again later")
        self._client.sleep(backoff(self._cuts))


def read_answer(client: Client, path: str, accept: str = "*/*") -> tuple[requests.Response, bytes] | None:
    """A small answer about something in the repository, and its exact bytes; None if there is no such thing.

    Raises:
        InputError: the registry fails or refuses, or the bytes are too many.
    """
    headers = {"Accept": accept, "Accept-Encoding": "identity"}
    response = client.do_request(client.url(path), headers=headers, stream=True)
    try:
        return (response, b"".join(_bounded(client, response))) if response.status_code == 200 else None
    finally:
        response.close()


def read_document(client: Client, reference: str) -> tuple[Descriptor, bytes] | None:
    """The manifest or index of a tag or digest, as its exact bytes; None if there is none.

    Raises:
        InputError: the bytes do not have the digest that was asked for or that the registry names, or are too many.
    """
    read = read_answer(client, f"manifests/{reference}", f"{INDEX}, {MANIFEST}")
    if read is None:
        return None
    response, content = read
    digest = f"sha256:{sha256_bytes(content)}"
    named = reference if reference.startswith("sha256:") else response.headers.get("Docker-Content-Digest", digest)
    if digest != named:
        raise client.failure(f"the manifest is damaged: its bytes do not have the digest {named}")
    media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
    return Descriptor(media_type, digest, len(content)), content


def read_listed(client: Client, digest: Any, *, place: str, missing: str) -> tuple[Descriptor, bytes]:
    """The manifest or index that a document lists.

    Args:
        client: the repository.
        digest: as the document gives it.
        place: the document, for errors.
        missing: what is said if there is no such manifest.

    Raises:
        InputError: the digest is malformed, nothing has it, or the bytes have another.
    """
    if not is_digest(digest):
        raise client.failure(f"a digest in {place} is malformed")
    read = read_document(client, digest)
    if read is None:
        raise client.failure(f"{missing}: {digest}")
    return read


def digest_of(client: Client, tag: str) -> str | None:
    """The digest of whatever a tag stands for, of any media type; None if there is no such tag.

    Raises:
        InputError: the registry fails or refuses, or the bytes are too many.
    """
    read = read_answer(client, f"manifests/{tag}", _ANY_DOCUMENT)
    return f"sha256:{sha256_bytes(read[1])}" if read else None


def is_digest(value: object) -> TypeGuard[str]:
    """Whether a value of a document is a digest."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def parsed(client: Client, content: bytes) -> dict[str, Any]:
    """A JSON object of a registry.

    Raises:
        InputError: it is none.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise client.failure("a document in the registry is malformed")
    return document


def _bounded(client: Client, response: requests.Response) -> list[bytes]:
    found: list[bytes] = []
    try:
        for piece in response.iter_content(_PIECE):
            found.append(piece)
            if sum(map(len, found)) > _ANSWER_LIMIT:
                raise client.failure(f"an answer of the registry has more than {_ANSWER_LIMIT} bytes")
    except requests.RequestException as error:
        raise client.failure("the connection broke", "try again") from error
    return found
