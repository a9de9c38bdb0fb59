"""Tar archives whose bytes depend on names and contents alone, read at any offset without being written anywhere.

Pax headers (POSIX.1-2001) for long and non-ASCII names and for large files; sorted, times and owners zero, files 0644
and folders 0755. The same files give the same bytes, so the same digest, on every machine.
"""

from __future__ import annotations

import bisect
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from qexport.errors import InputError

_BLOCK: Final = tarfile.BLOCKSIZE
_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class _Segment:
    """Bytes of an archive: these, or those of a file."""

    size: int
    content: bytes = b""
    path: Path | None = None


class TarStream:
    """The bytes of an archive of some files, in order; nothing is held in memory but the headers.

    Args:
        folder: where the files are.
        files: their sizes in bytes by their paths inside the folder. A file that has another size when it is read is an
            error, so that a length that was announced stays true.
        prefix: the folder inside the archive, without a slash at its end.

    Attributes:
        size: of the archive in bytes.
        names: of the files in it, sorted.
    """

    def __init__(self, folder: Path, files: Mapping[str, int], prefix: str) -> None:
        self.names = tuple(f"{prefix}/{name}" for name in sorted(files))
        self._segments: list[_Segment] = []
        for parent in _folders(self.names):
            self._add(_header(f"{parent}/", 0, tarfile.DIRTYPE))
        for inside in sorted(files):
            self._add(_header(f"{prefix}/{inside}", files[inside], tarfile.REGTYPE))
            self._segments.append(_Segment(files[inside], path=folder / inside))
            self._add(bytes(-files[inside] % _BLOCK))
        self._add(bytes(2 * _BLOCK))
        self._starts = [0]
        for segment in self._segments:
            self._starts.append(self._starts[-1] + segment.size)
        self.size = self._starts[-1]

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from one offset to another (by default the end), in pieces of at most a mebibyte.

        Raises:
            InputError: a file is gone or has changed its size.
        """
        end = self.size if end is None else min(end, self.size)
        position = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            segment, inside = self._segments[position], start - self._starts[position]
            stop = min(segment.size, inside + end - start)
            if segment.path is None:
                yield segment.content[inside:stop]
            else:
                yield from _read(segment.path, segment.size, inside, stop)
            start += stop - inside
            position += 1

    def _add(self, content: bytes) -> None:
        if content:
            self._segments.append(_Segment(len(content), content))


def _folders(names: tuple[str, ...]) -> list[str]:
    parts = [name.split("/") for name in names]
    return sorted({"/".join(each[:count]) for each in parts for count in range(1, len(each))})


def _header(name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mtime = size, kind, 0
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info.tobuf(tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")


def _read(path: Path, size: int, start: int, stop: int) -> Iterator[bytes]:
    try:
        with closing(path.open("rb")) as file:
            if file.seek(0, 2) != size:
                raise _changed(path)
            file.seek(start)
            yield from _exactly(file, stop - start, path)
    except OSError as error:
        raise InputError(f"a file of the release cannot be read: {error.strerror}", where=str(path)) from error


def _exactly(file: BinaryIO, count: int, path: Path) -> Iterator[bytes]:
    while count:
        piece = file.read(min(_PIECE, count))
        if not piece:
            raise _changed(path)
        count -= len(piece)
        yield piece


def _changed(path: Path) -> InputError:
    return InputError("a file of the release has changed while it was read", where=str(path), mend="write it again")
