"""From a tag's document to the files of a release: its layers, and whether all that was attached still is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import ATTACHED, IMAGE_LAYER, INDEX, MODEL, Descriptor
from qexport.registries.oci.downloads import BlobStream, parsed, read_document
from qexport.registries.oci.layers import FOLDER
from qexport.registries.oci.referrers import referrers
from qexport.registries.tar_extraction import extract

_MOST_LAYERS: Final = 1000
_LARGEST: Final = 1 << 50
_MODEL_LAYER: Final = re.compile(r"application/vnd\.cncf\.model\.[a-z.]+\.v1\.tar", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class PulledLayer:
    """A layer of a release in a registry."""

    blob: Descriptor

    def extract(self, client: Client, folder: Path, told: Callable[[int], None]) -> None:
        """Downloads it and writes its files.

        Raises:
            InputError: it is missing, damaged or unsafe.
        """
        stream = BlobStream(client, self.blob, told)
        try:
            extract(stream, folder, FOLDER, self.blob.size, f"{client.destination} {self.blob.digest}")
            stream.finish()
        finally:
            stream.close()


def pull(client: Client, descriptor: Descriptor, content: bytes) -> list[PulledLayer]:
    """The layers of a release, of its index or of one of the manifests in it.

    Args:
        client: the repository.
        descriptor: of the document.
        content: the document.

    Raises:
        InputError: it is no release of qexport, something in it is malformed or missing, or what was attached is.
    """
    document = parsed(client, content)
    if descriptor.media_type == INDEX:
        _check_attachments(client, descriptor.digest, document)
        document = _chosen(client, document)
    layers = document.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= _MOST_LAYERS:
        raise client.failure("this is no release: it has no layers")
    return [PulledLayer(_layer(client, layer)) for layer in layers]


def _chosen(client: Client, index: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for entry in index.get("manifests") or [] if isinstance(entry, dict)]
    digest = next((entry.get("digest") for entry in entries if entry.get("artifactType") == MODEL), None)
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise client.failure("this is no release: its index lists no ModelPack artifact")
    read = read_document(client, digest)
    if read is None:
        raise client.failure(f"a manifest of the release is missing in the registry: {digest}")
    return parsed(client, read[1])


def _layer(client: Client, layer: Any) -> Descriptor:
    found = layer if isinstance(layer, dict) else {}
    media_type, digest, size = (found.get(key) for key in ("mediaType", "digest", "size"))
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise client.failure("a layer of the release is malformed")
    if not isinstance(size, int) or not 0 < size < _LARGEST:
        raise client.failure("a layer of the release is malformed")
    if media_type != IMAGE_LAYER and not (isinstance(media_type, str) and _MODEL_LAYER.fullmatch(media_type)):
        raise client.failure(
            f"a layer is of a kind that releases do not have: {str(media_type)[:100]!r}",
            "use a program for artifacts of that kind, for example modctl or oras",
        )
    return Descriptor(str(media_type), digest, size)


def _check_attachments(client: Client, digest: str, index: dict[str, Any]) -> None:
    """Compares what is attached with what the index says was attached."""
    annotations = index.get("annotations")
    text = annotations.get(ATTACHED) if isinstance(annotations, dict) else None
    if text is None:
        return
    try:
        wanted = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise client.failure("the release's list of attachments is malformed") from None
    there = {content for _, content in referrers(client, digest)} if wanted else set()
    missing = sorted(str(path) for path, content in wanted.items() if content not in there)
    if missing:
        raise client.failure(
            f"a referrer of the release is missing: {missing[0]} is no longer attached",
            "publish the release again under another tag",
        )
