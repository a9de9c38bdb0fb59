"""Where finished folders go: a folder of this machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qexport.errors import RecipeError
from qexport.progress import ProgressCallback, silent


@dataclass(frozen=True)
class Attachment:
    """A file of a package that a registry shows beside it.

    Attributes:
        path: inside the folder, with forward slashes.
        media_type: of its bytes.
        artifact_type: of the thing that it is.
    """

    path: str
    media_type: str
    artifact_type: str


@dataclass(frozen=True)
class Package:
    """A finished folder, and what a registry is told about it.

    Attributes:
        folder: complete, with its listing; never changed.
        name: without the version.
        version: of the release.
        format: of the weights' files.
        architecture: the model's family.
        precision: of the weights that are not quantized.
        quantization: the method; None if nothing is quantized.
        parameters: of the model.
        licenses: by SPDX's names; may be empty.
        attachments: files inside the folder.
    """

    folder: Path
    name: str
    version: str
    format: str
    architecture: str
    precision: str
    quantization: str | None
    parameters: int
    licenses: tuple[str, ...]
    attachments: tuple[Attachment, ...]


@dataclass(frozen=True)
class FolderDestination:
    """A folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


Destination = FolderDestination


@dataclass(frozen=True)
class Published:
    """What can be fetched again.

    Attributes:
        reference: where.
        digest: of what lies there, if the place has one.
    """

    reference: str
    digest: str | None


def parse_destination(text: str) -> Destination:
    """Where a text points.

    Raises:
        RecipeError: it is empty, or names a place that cannot be reached yet.
    """
    if not text or text.startswith(("oci://", "hub:")) or text.endswith(".tar"):
        raise RecipeError(f"{text!r} is not a folder, and only folders are written", where="--to")
    return FolderDestination(Path(text))


def publish(package: Package, destination: Destination, *, progress: ProgressCallback = silent) -> Published:
    """Copies a package to its destination, complete or not at all.

    Raises:
        RecipeError: something is there.
    """
    if os.path.lexists(destination.path):
        raise RecipeError("something is at the destination", where=str(destination), mend="choose another one")
    partial = destination.path.with_name(f".{destination.path.name}.partial")
    shutil.copytree(package.folder, partial)
    partial.rename(destination.path)
    return Published(str(destination), None)


def fetch(reference: Destination, folder: Path, *, progress: ProgressCallback = silent) -> None:
    """Copies what lies at a reference into a folder that does not exist."""
    shutil.copytree(reference.path, folder)
