"""Layers of weights of which only the heads of the files are downloaded, by ranges."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qexport.registries.oci.client import Client
from qexport.registries.oci.documents import Descriptor
from qexport.registries.oci.downloads import BlobStream
from qexport.registries.oci.layers import FOLDER, is_weights
from qexport.registries.tar_extraction import Readable, extract

WriteHead = Callable[[Path, int, Callable[[int, int], bytes]], None]
"""Writes the head of a file to a path, from the file's size and a function that gives its bytes between two offsets."""

_WINDOW: Final = 1 << 16
_PIECE: Final = 1 << 22


class _Ranges:
    """The bytes of a blob at any place. The digest of the whole is not known, so nothing of it is compared."""

    def __init__(self, client: Client, blob: Descriptor) -> None:
        self._client, self._blob = client, blob
        self._window, self._begin = b"", 0
        self.offset = 0

    def read(self, count: int, /) -> bytes:
        """At most so many bytes from the offset on, fewer only at the end."""
        if not self._begin <= self.offset < self._begin + len(self._window):
            self._begin, self._window = self.offset, self.between(self.offset, self.offset + _WINDOW)
        found = self._window[self.offset - self._begin :][:count]
        self.offset += len(found)
        return found

    def between(self, start: int, stop: int) -> bytes:
        """The bytes from one offset to another, or to the blob's end; none from behind it."""
        stop = min(stop, self._blob.size)  # a member of the archive may claim to be longer than what is left
        stream = BlobStream(self._client, self._blob, lambda _: None, (min(start, stop), stop))
        found = bytearray()
        try:
            while piece := stream.read(_WINDOW):
                found += piece
        finally:
            stream.close()
        return bytes(found)


def extract_heads(client: Client, blob: Descriptor, folder: Path, write_head: WriteHead) -> None:
    """Writes the files of a layer into a folder, of those with weights the heads.

    Args:
        client: the repository.
        blob: the layer.
        folder: where the files go.
        write_head: writes a file with weights.

    Raises:
        InputError: the layer is missing or unsafe, or the registry fails.
    """
    ranges = _Ranges(client, blob)

    def write(stream: Readable, path: Path, size: int) -> None:
        begin = ranges.offset

        def between(start: int, stop: int) -> bytes:
            return ranges.between(begin + start, begin + stop)

        if is_weights(path.name):
            write_head(path, size, between)
        else:
            with path.open("xb") as file:
                for start in range(0, size, _PIECE):
                    file.write(between(start, min(start + _PIECE, size)))
        ranges.offset = begin + size + -size % tarfile.BLOCKSIZE

    extract(ranges, folder, FOLDER, blob.size, f"{client.destination} {blob.digest}", write)
