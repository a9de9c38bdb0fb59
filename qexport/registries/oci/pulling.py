"""From a tag's document to the files of a release: its layers, and whether all that was attached still is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import ATTACHED, INDEX, Descriptor
from qexport.registries.oci.downloads import BlobStream, is_digest, parsed
from qexport.registries.oci.layers import FOLDER, MODEL_LAYERS, WEIGHTS
from qexport.registries.oci.referrers import referrers
from qexport.registries.oci.release_index import layers_of_manifest, model_of
from qexport.registries.tar_extraction import extract

_SMALL: Final = 1 << 20
"""Bytes of a layer that is fetched whole, and so compared with its digest, whatever it holds."""


@dataclass(frozen=True)
class PulledLayer:
    """A layer of a release in a registry."""

    blob: Descriptor

    @property
    def may_hold_weights(self) -> bool:
        """Whether it says so, or says nothing and is large: layers of the ModelPack artifact say what they hold, those
        of an image do not.
        """
        if self.blob.media_type.startswith(MODEL_LAYERS):
            return self.blob.media_type == WEIGHTS
        return self.blob.size > _SMALL

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
        return [PulledLayer(layer) for layer in model_of(client, document)[1]]
    return [PulledLayer(layer) for layer in layers_of_manifest(client, document)]


def _check_attachments(client: Client, digest: str, index: dict[str, Any]) -> None:
    """Compares what is attached with what the index says was attached."""
    annotations = index.get("annotations")
    text = annotations.get(ATTACHED) if isinstance(annotations, dict) else None
    if text is None:
        return
    try:
        wanted = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict) or not all(map(is_digest, wanted.values())):
        raise client.failure("the release's list of attachments is malformed")
    there = {content for _, content in referrers(client, digest)} if wanted else set()
    missing = sorted(path for path, content in wanted.items() if content not in there)
    if missing:
        raise client.failure(
            f"a referrer of the release is missing: {missing[0]} is no longer attached",
            "publish the release again under another tag",
        )
