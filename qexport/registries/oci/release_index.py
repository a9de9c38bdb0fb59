"""The index that a release's tag stands for: every entry is read, since each client follows another one.

Kubernetes mounts the image for its platform and modctl pulls the ModelPack artifact; what was checked must be in both.
"""

from __future__ import annotations

import re
from typing import Any, Final

from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import IMAGE_LAYER, MANIFEST, MODEL, PLATFORMS, Descriptor, Document
from qexport.registries.oci.downloads import is_digest, parsed, read_listed

_MOST_LAYERS: Final = 1000
_LARGEST: Final = 1 << 50
_MODEL_LAYER: Final = re.compile(r"application/vnd\.cncf\.model\.[a-z.]+\.v1\.tar", re.ASCII)


def model_of(client: Client, index: dict[str, Any]) -> tuple[Document, list[Descriptor]]:
    """The ModelPack manifest of a release's index, and its layers, which all images of the index have too.

    Args:
        client: the repository.
        index: the index.

    Raises:
        InputError: the index does not list exactly what a release has, something in it is malformed or missing, or an
            image has other layers than the model.
    """
    manifests = _read_entries(client, index)
    model, document = manifests.pop(MODEL)
    layers = layers_of_manifest(client, document)
    for platform, (_, image) in manifests.items():
        found = layers_of_manifest(client, image)
        if [each.digest for each in found] != [each.digest for each in layers]:
            raise client.failure(f"the image for {platform} has other layers than the model", "do not use it")
        if any(each.media_type != IMAGE_LAYER for each in found):
            raise client.failure(f"the image for {platform} has a layer of a kind that releases do not have")
    return model, layers


def layers_of_manifest(client: Client, manifest: dict[str, Any]) -> list[Descriptor]:
    """The layers of a manifest.

    Raises:
        InputError: there are none, or one is malformed or of a kind that releases do not have.
    """
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= _MOST_LAYERS:
        raise client.failure("this is no release: it has no layers")
    return [_layer(client, layer) for layer in layers]


def _read_entries(client: Client, index: dict[str, Any]) -> dict[str, tuple[Document, dict[str, Any]]]:
    """The manifests of an index, by what they are: `MODEL` or one of `PLATFORMS`."""
    entries = index.get("manifests")
    kinds = [_kind(entry) for entry in entries] if isinstance(entries, list) else []
    if MODEL not in kinds:
        raise client.failure("this is no release: its index lists no ModelPack artifact")
    if sorted(map(str, kinds)) != sorted([MODEL, *PLATFORMS]):
        what = f"its index lists something else than one ModelPack artifact and images for {', '.join(PLATFORMS)}"
        raise client.failure(f"this is no release: {what}")
    return {str(kind): _manifest(client, entry) for kind, entry in zip(kinds, entries or [], strict=True)}


def _kind(entry: Any) -> str | None:
    if not isinstance(entry, dict) or entry.get("mediaType") != MANIFEST:
        return None
    if "artifactType" in entry:
        return MODEL if entry["artifactType"] == MODEL else None
    platforms = [each for each in PLATFORMS if entry.get("platform") == {"architecture": each, "os": "linux"}]
    return platforms[0] if platforms else None


def _manifest(client: Client, entry: dict[str, Any]) -> tuple[Document, dict[str, Any]]:
    missing = "a manifest of the release is missing in the registry"
    found, content = read_listed(client, entry.get("digest"), place="the release's index", missing=missing)
    if found.media_type != MANIFEST:
        raise client.failure(f"a manifest of the release is something else: {found.digest}")
    return Document(MANIFEST, content), parsed(client, content)


def _layer(client: Client, layer: Any) -> Descriptor:
    found = layer if isinstance(layer, dict) else {}
    media_type, digest, size = (found.get(key) for key in ("mediaType", "digest", "size"))
    if not is_digest(digest):
        raise client.failure("a layer of the release is malformed")
    if not isinstance(size, int) or not 0 < size < _LARGEST:
        raise client.failure("a layer of the release is malformed")
    if media_type != IMAGE_LAYER and not (isinstance(media_type, str) and _MODEL_LAYER.fullmatch(media_type)):
        raise client.failure(
            f"a layer is of a kind that releases do not have: {str(media_type)[:100]!r}",
            "use a program for artifacts of that kind, for example modctl or oras",
        )
    return Descriptor(str(media_type), digest, size)
