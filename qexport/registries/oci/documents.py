"""The JSON documents of a release in a registry, as bytes that depend on the release alone.

A tag stands for an index. The index lists the release as a container image, for two platforms whose configs differ and
whose layers do not, and as a CNCF ModelPack artifact of the same layers. Specifications: OCI image-spec 1.1,
https://github.com/modelpack/model-spec.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from qexport.artifact.digests import sha256_bytes
from qexport.registries.package import Attachment, Package

INDEX: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
IMAGE_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
IMAGE_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
MODEL: Final = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
EMPTY: Final = "application/vnd.oci.empty.v1+json"
EMPTY_CONTENT: Final = b"{}"

FILE_PATH: Final = "org.cncf.model.filepath"
TAG: Final = "org.opencontainers.image.ref.name"
"""In an index of ours: the tag under which the release was published, which no other release may take."""

ATTACHED: Final = "io.github.qexport.attachments"
"""In an index of ours: the digests of what is attached, so that a missing referrer is noticed."""

PLATFORMS: Final = ("amd64", "arm64")
_SCALES: Final = ((10**15, "Q"), (10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


@dataclass(frozen=True)
class Descriptor:
    """What a document says of a blob or of another document.

    Attributes:
        media_type: of the content.
        digest: `sha256:...`.
        size: bytes.
        more: further fields, for example `annotations`.
    """

    media_type: str
    digest: str
    size: int
    more: dict[str, Any] = field(default_factory=dict)

    def json(self, **more: Any) -> dict[str, Any]:
        """As it stands in a document, with still further fields."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **self.more, **more}


@dataclass(frozen=True)
class Document:
    """A document's exact bytes.

    Attributes:
        media_type: of the document.
        content: its bytes.
    """

    media_type: str
    content: bytes

    @property
    def descriptor(self) -> Descriptor:
        """Its digest and size."""
        return Descriptor(self.media_type, f"sha256:{sha256_bytes(self.content)}", len(self.content))


def model_config(package: Package, layers: Sequence[Descriptor]) -> Document:
    """What ModelPack's config says of a model. Layers are not compressed, so their digests are their diff ids."""
    described = {
        "name": package.name,
        "version": package.version,
        "family": package.architecture,
        "licenses": list(package.licenses) or None,
    }
    technical = {
        "architecture": "transformer",
        "format": package.format,
        "paramSize": parameter_size(package.parameters),
        "precision": package.precision,
        "quantization": package.quantization,
    }
    return _document(
        MODEL_CONFIG,
        {
            "descriptor": _without_none(described),
            "config": _without_none(technical),
            "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
        },
    )


def image_config(architecture: str, layers: Sequence[Descriptor]) -> Document:
    """The config of the image for one platform: a file system and no program."""
    rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    return _document(IMAGE_CONFIG, {"architecture": architecture, "os": "linux", "config": {}, "rootfs": rootfs})


def model_manifest(package: Package, config: Descriptor, layers: Sequence[Descriptor]) -> Document:
    """The ModelPack artifact."""
    return _manifest(config, layers, artifactType=MODEL, annotations=_annotations(package))


def image_manifest(package: Package, config: Descriptor, layers: Sequence[Descriptor]) -> Document:
    """The image of the same layers, which runtimes know by other media types."""
    as_image = [Descriptor(IMAGE_LAYER, layer.digest, layer.size) for layer in layers]
    return _manifest(config, as_image, annotations=_annotations(package))


def index(package: Package, tag: str, images: Sequence[Descriptor], model: Descriptor, attached: str) -> Document:
    """The index that a tag stands for.

    Args:
        package: the release.
        tag: under which it is published.
        images: the image manifests, in the order of `PLATFORMS`.
        model: the ModelPack manifest. Its platform keeps runtimes from choosing it.
        attached: see `attachment_digests`.
    """
    entries = [
        image.json(platform={"architecture": each, "os": "linux"})
        for image, each in zip(images, PLATFORMS, strict=True)
    ]
    entries.append(model.json(artifactType=MODEL, platform={"architecture": "unknown", "os": "unknown"}))
    annotations = {**_annotations(package), TAG: tag, ATTACHED: attached}
    return _document(INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, "annotations": annotations})


def referrer(attachment: Attachment, content: Descriptor, subject: Descriptor) -> Document:
    """The manifest by which a file is attached to a document."""
    config = Document(EMPTY, EMPTY_CONTENT).descriptor
    more = {"artifactType": attachment.artifact_type, "subject": subject.json()}
    return _manifest(config, [content], **more)


def attachment_digests(digests: dict[str, str]) -> str:
    """The digests of attached files, by their paths, as an annotation."""
    return json.dumps(digests, sort_keys=True, separators=(",", ":"))


def referrers_index(entries: Sequence[dict[str, Any]]) -> Document:
    """The index of a document's referrers, for registries that keep no list of them."""
    return _document(INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)})


def parameter_size(count: int) -> str:
    """A number of parameters as ModelPack writes it, with at most one decimal: `134.5M`, `7.2B`."""
    for unit, name in _SCALES:
        if count >= unit:
            return f"{count / unit:.1f}".removesuffix(".0") + name
    return f"{count / 1000:.1f}K"


def _annotations(package: Package) -> dict[str, str]:
    found = {"title": package.name, "version": package.version, "licenses": " AND ".join(package.licenses)}
    return {f"org.opencontainers.image.{key}": value for key, value in found.items() if value}


def _manifest(config: Descriptor, layers: Sequence[Descriptor], **more: Any) -> Document:
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.json(),
        "layers": [layer.json() for layer in layers],
    }
    return _document(MANIFEST, {**document, **more})


def _document(media_type: str, value: dict[str, Any]) -> Document:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Document(media_type, text.encode("utf-8"))


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
