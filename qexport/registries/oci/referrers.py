"""Files attached to a release as referrers (OCI 1.1), also in registries that keep no list of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.artifact.digests import sha256_bytes
from qexport.errors import InputError
from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import (
    EMPTY_CONTENT,
    INDEX,
    MANIFEST,
    Descriptor,
    Document,
    referrer,
    referrers_index,
)
from qexport.registries.oci.downloads import parsed, read_answer, read_document, read_listed
from qexport.registries.oci.uploads import Blob, upload
from qexport.registries.package import Attachment

_LARGEST: Final = 256 << 20
_MOST: Final = 1000


@dataclass(frozen=True)
class Bytes:
    """Content of a blob that is in memory."""

    content: bytes

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from one offset to another."""
        yield self.content[start:end]


def upload_bytes(client: Client, content: bytes) -> None:
    """Uploads a small blob."""
    upload(client, Blob(Bytes(content), f"sha256:{sha256_bytes(content)}", len(content)), lambda _: None)


def read_attachments(folder: Path, attachments: Sequence[Attachment]) -> dict[Attachment, bytes]:
    """The files to attach.

    Raises:
        InputError: one cannot be read, or is as large as only weights are.
    """
    found = {}
    for attachment in attachments:
        path = folder / attachment.path
        try:
            if path.stat().st_size > _LARGEST:
                raise InputError(f"a file to attach has more than {_LARGEST} bytes", where=str(path))
            found[attachment] = path.read_bytes()
        except OSError as error:
            raise InputError(f"a file to attach cannot be read: {error.strerror}", where=str(path)) from error
    return found


def attach(client: Client, subject: Descriptor, attachments: dict[Attachment, bytes]) -> None:
    """Attaches files to a document that is in the registry."""
    if attachments:
        upload_bytes(client, EMPTY_CONTENT)
    listed: list[dict[str, Any]] = []
    kept = True
    for attachment, content in attachments.items():
        upload_bytes(client, content)
        blob = Descriptor(attachment.media_type, f"sha256:{sha256_bytes(content)}", len(content), _titled(attachment))
        document = referrer(attachment, blob, subject)
        kept &= put_document(client, document, document.descriptor.digest)
        listed.append(document.descriptor.json(artifactType=attachment.artifact_type))
    if not kept:
        _list_by_tag(client, subject, listed)


def put_document(client: Client, document: Document, reference: str) -> bool:
    """Puts a manifest or an index, under a digest or a tag.

    Returns:
        Whether the registry has noted which document it refers to.

    Raises:
        InputError: the registry has not stored exactly these bytes.
    """
    headers = {"Content-Type": document.media_type}
    response = client.do_request(client.url(f"manifests/{reference}"), "PUT", document.content, headers)
    digest = document.descriptor.digest
    if response.status_code != 201 or response.headers.get("Docker-Content-Digest", digest) != digest:
        raise client.failure(f"the registry has not stored a manifest (HTTP status {response.status_code})")
    return bool(response.headers.get("OCI-Subject"))


def referrers(client: Client, subject: str) -> list[tuple[str, str]]:
    """What is attached to a document: the artifact type and the digest of each content.

    Args:
        client: the repository.
        subject: the document's digest.

    Raises:
        InputError: a listed referrer is missing or malformed.
    """
    found = []
    for entry in _listed(client, subject):
        digest, missing = entry.get("digest"), "a referrer is listed, but missing"
        _, content = read_listed(client, digest, place="the list of referrers", missing=missing)
        document = parsed(client, content)
        about = document.get("subject")
        if not isinstance(about, dict) or about.get("digest") != subject:
            raise client.failure(f"a referrer is about something else: {digest}")
        layers = document.get("layers")
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
            raise client.failure(f"a referrer is malformed: {digest}")
        found += [(str(document.get("artifactType")), str(layer.get("digest"))) for layer in layers]
    return found


def fallback_tag(subject: str) -> str:
    """The tag that lists referrers in registries without a list of them (distribution-spec 1.1)."""
    return subject.replace(":", "-", 1)


def _titled(attachment: Attachment) -> dict[str, Any]:
    return {"annotations": {"org.opencontainers.image.title": attachment.path.rpartition("/")[2]}}


def _list_by_tag(client: Client, subject: Descriptor, listed: list[dict[str, Any]]) -> None:
    tag = fallback_tag(subject.digest)
    known = {entry.get("digest") for entry in listed}
    others = [entry for entry in _of_tag(client, tag) if entry.get("digest") not in known]
    put_document(client, referrers_index([*others, *listed]), tag)


def _listed(client: Client, subject: str) -> list[dict[str, Any]]:
    read = read_answer(client, f"referrers/{subject}", INDEX)
    return _entries(client, read[1]) if read else _of_tag(client, fallback_tag(subject))


def _of_tag(client: Client, tag: str) -> list[dict[str, Any]]:
    read = read_document(client, tag)
    return _entries(client, read[1]) if read else []


def _entries(client: Client, content: bytes) -> list[dict[str, Any]]:
    found = parsed(client, content).get("manifests")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    if len(entries) > _MOST:
        raise client.failure(f"more than {_MOST} referrers are listed")
    return [entry for entry in entries if entry.get("mediaType") == MANIFEST]
