"""What is published, and what comes back: the types of this room that know no place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qexport.artifact.integrity import entries
from qexport.artifact.manifest import LISTING_NAME
from qexport.errors import InputError
from qexport.registries.names import is_portable

_MEND: Final = "write the release again"


@dataclass(frozen=True)
class Attachment:
    """A file of the release that registries also keep beside it, so that it can be read without the weights.

    Attributes:
        path: inside the folder, with forward slashes.
        media_type: of the file's content.
        artifact_type: what it is, as clients filter by it.
    """

    path: str
    media_type: str
    artifact_type: str


@dataclass(frozen=True)
class Package:
    """A finished release and what places say of it.

    Attributes:
        folder: complete, with its listing `SHA256SUMS`; never changed here.
        name: of the release.
        version: of the release; the tag on a model hub.
        format: `safetensors`, `onnx` or `gguf`.
        architecture: the family of models, for example `llama`.
        precision: the dtype of what is not quantized, for example `float16`.
        quantization: the method, or None.
        parameters: their number.
        licenses: SPDX ids; may be empty.
        attachments: files of the folder that an OCI registry keeps as referrers too.
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

    def files(self) -> dict[str, int]:
        """`files_of` its folder.

        Raises:
            InputError: as `files_of`, or an attachment is missing.
        """
        found = files_of(self.folder)
        for attachment in self.attachments:
            if attachment.path not in found:
                raise InputError("a file to attach is missing", where=str(self.folder / attachment.path), mend=_MEND)
        return found


@dataclass(frozen=True)
class Published:
    """Where a release went.

    Attributes:
        reference: what fetches it again, with its digest where the place has one.
        digest: `sha256:` and hex digits, of the index in a registry; the commit on a hub; None for folders and tar
            files.
    """

    reference: str
    digest: str | None


@dataclass(frozen=True)
class Tag:
    """A name in a registry, and the digest (`sha256:...`) of what it stands for."""

    name: str
    digest: str


def files_of(folder: Path) -> dict[str, int]:
    """The sizes of all files in bytes, by their sorted paths inside the folder, with forward slashes.

    Raises:
        InputError: an entry is a link or no regular file, a name cannot be carried, the listing is missing, or the
            folder cannot be read.
    """
    names = [name for name in entries(folder) if not name.endswith("/")]
    if (unfit := next((name for name in names if not is_portable(name)), None)) is not None:
        raise InputError("a name cannot be carried to other places", where=str(folder / repr(unfit)), mend="rename it")
    if LISTING_NAME not in names:
        raise InputError(f"the release has no {LISTING_NAME}", where=str(folder), mend=_MEND)
    return {name: (folder / name).stat().st_size for name in names}
