"""Releases as tar files: the same release gives the same bytes."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import BinaryIO, Final

from qexport.artifact.disk import ensure_space
from qexport.errors import InputError, RecipeError
from qexport.progress import Progress, ProgressCallback
from qexport.registries.arrival import arriving
from qexport.registries.names import is_portable
from qexport.registries.package import Package
from qexport.registries.tar_extraction import extract
from qexport.registries.tar_stream import TarStream

_PIECE: Final = 1 << 20


def write(package: Package, target: Path, progress: ProgressCallback) -> None:
    """Writes a release as a tar file whose only folder is `NAME-VERSION`.

    Raises:
        RecipeError: the path is taken, or name and version cannot be a folder's name.
        ResourceError: the disk is full or failed.
    """
    prefix = f"{package.name}-{package.version}"
    if "/" in prefix or not is_portable(prefix):
        raise RecipeError("name and version of the release cannot be a folder's name", where=prefix)
    archive = TarStream(package.folder, package.files(), prefix)
    ensure_space(target, archive.size)
    done = 0
    with arriving(target) as content, content.open("xb") as file:
        for piece in archive.pieces():
            file.write(piece)
            done += len(piece)
            progress(Progress("publish", done, archive.size, "byte"))
        file.flush()


def read(source: Path, folder: Path, progress: ProgressCallback) -> None:
    """Extracts a release from a tar file.

    Args:
        source: the tar file.
        folder: an empty folder for the release's files.
        progress: is called as the archive is read.

    Raises:
        InputError: the archive cannot be read, is malformed or unsafe.
    """
    try:
        file = source.open("rb")
        size = source.stat().st_size
    except OSError as error:
        raise InputError(f"the tar file cannot be read: {error.strerror}", where=str(source)) from error
    ensure_space(folder, size)
    with file:
        extract(_Counted(file, size, progress), folder, None, size, str(source))
        while rest := file.read(_PIECE):
            if any(rest):
                raise InputError("something follows the archive", where=str(source), mend="fetch it again")


class _Counted:
    """A file that tells how much of it has been read."""

    def __init__(self, file: BinaryIO, size: int, progress: ProgressCallback) -> None:
        self._file, self._size, self._progress = file, size, progress

    def read(self, count: int, /) -> bytes:
        found = self._file.read(count)
        if len(found) > tarfile.BLOCKSIZE:
            self._progress(Progress("fetch", self._file.tell(), self._size, "byte"))
        return found
