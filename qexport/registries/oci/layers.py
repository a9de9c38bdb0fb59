"""The layers of a release: uncompressed tar files, the same for the image and for the ModelPack artifact.

A container image's layers must be tar files, and ModelPack allows tar files beside raw ones, so tar files are what both
can share. All files are below `models/`, where KServe looks for them in an image. Weights have a layer of their own for
each file: a file that has not changed is not stored again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from qexport.progress import Progress, ProgressCallback
from qexport.registries.oci.documents import FILE_PATH, Descriptor
from qexport.registries.oci.uploads import Blob
from qexport.registries.tar_stream import TarStream

FOLDER: Final = "models"
MODEL_LAYERS: Final = "application/vnd.cncf.model."
"""How the media types of ModelPack's layers begin."""

_MEDIA_TYPE: Final = MODEL_LAYERS + "{}.v1.tar"
WEIGHTS: Final = _MEDIA_TYPE.format("weight")
_MOST_LAYERS: Final = 100
"""Container runtimes mount some 120 layers at most."""

_WEIGHTS: Final = frozenset({".safetensors", ".onnx", ".gguf", ".data", ".onnx_data", ".bin"})
_CODE: Final = frozenset({".py", ".sh", ".yaml", ".yml", ".pbtxt"})
_DOCUMENTS: Final = frozenset({".md", ".html", ".pem", ".sig"})
_DOCUMENT_NAMES: Final = ("LICENSE", "NOTICE", "COPYING", "SHA256SUMS")
_DOCUMENT_FOLDERS: Final = frozenset({"report"})


@dataclass(frozen=True)
class Layer:
    """A layer as it is uploaded, and as ModelPack describes it."""

    blob: Blob
    descriptor: Descriptor


def layers_of(folder: Path, files: Mapping[str, int], progress: ProgressCallback) -> list[Layer]:
    """Reads all files once for the digests of their layers.

    Args:
        folder: of the release.
        files: their sizes by their paths.
        progress: is called as they are read.
    """
    streams = [
        (kind, TarStream(folder, {name: files[name] for name in names}, FOLDER)) for kind, names in _grouped(files)
    ]
    done, total, found = 0, sum(stream.size for _, stream in streams), []
    for kind, stream in streams:
        digest = hashlib.sha256()
        for piece in stream.pieces():
            digest.update(piece)
            done += len(piece)
            progress(Progress("publish", done, 2 * total, "byte", "digests"))
        found.append(_layer(kind, stream, f"sha256:{digest.hexdigest()}"))
    return found


def _layer(kind: str, stream: TarStream, digest: str) -> Layer:
    path = stream.names[0] if len(stream.names) == 1 else FOLDER
    descriptor = Descriptor(_MEDIA_TYPE.format(kind), digest, stream.size, {"annotations": {FILE_PATH: path}})
    return Layer(Blob(stream, digest, stream.size), descriptor)


def _grouped(files: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    """The kinds of ModelPack, in its order, with the files of each layer."""
    weights = [name for name in files if _kind(name) == "weight"]
    together = -(-len(weights) // _MOST_LAYERS) or 1
    found = [("weight", weights[start : start + together]) for start in range(0, len(weights), together)]
    for kind in ("weight.config", "code", "doc"):
        if names := [name for name in files if _kind(name) == kind]:
            found.append((kind, names))
    return found


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return PurePosixPath(name).suffix in _WEIGHTS


def _kind(name: str) -> str:
    path = PurePosixPath(name)
    if is_weights(name):
        return "weight"
    if path.suffix in _DOCUMENTS or path.name.startswith(_DOCUMENT_NAMES) or path.parts[0] in _DOCUMENT_FOLDERS:
        return "doc"
    return "code" if path.suffix in _CODE else "weight.config"
