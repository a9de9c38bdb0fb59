"""Extracting what `tar_stream` writes, from a stream that may be a stranger's.

tarfile reads a pax header of any size into memory, follows links and knows formats that releases never use. Here only
regular files and folders are accepted, by names that stay inside the folder.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from qexport.errors import InputError
from qexport.registries.names import is_portable

_BLOCK: Final = tarfile.BLOCKSIZE
_PIECE: Final = 1 << 20
_PAX_LIMIT: Final = 1 << 16
_MOST_MEMBERS: Final = 100_000
_RECORD: Final = re.compile(rb"([1-9][0-9]{0,5}) ([a-z]+)=", re.ASCII)


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes, fewer only at the end."""
        ...


Write = Callable[[Readable, Path, int], None]
"""Writes so many bytes of a stream to a path, and passes what pads them."""


def extract(
    stream: Readable, folder: Path, prefix: str | None, limit: int, where: str, write: Write | None = None
) -> None:
    """Writes the files of an archive below a folder, which exists, without the first part of their names.

    Args:
        stream: of the archive; read to the end of its last block of zeros.
        folder: where the files go. None of them may be there.
        prefix: the folder inside the archive that all names must be in; None for whichever comes first.
        limit: bytes that all files may have together.
        where: the archive, for errors.
        write: writes a file, instead of all of its bytes.

    Raises:
        InputError: the archive is cut or malformed, holds anything but files and folders, has a name that is outside of
            the folder or comes twice, or holds more than the limit.
        OSError: a file cannot be written.
    """
    for _ in range(_MOST_MEMBERS):
        member = _next(stream, where)
        if member is None:
            return
        first, _, inside = member.name.rstrip("/").partition("/")
        prefix = prefix or first
        if first != prefix or not is_portable(member.name.rstrip("/")):
            raise _unsafe(f"a name in the archive is outside of its folder: {member.name!r}", where)
        if member.type == tarfile.DIRTYPE:
            _make(folder / inside, where)
            continue
        limit -= member.size
        if limit < 0 or not inside:
            raise _unsafe("the archive holds more than it should", where)
        path = _new(folder / inside, where)
        if write is None:
            _write(stream, path, member.size, where)
        else:
            write(stream, path, member.size)
    raise _unsafe(f"the archive has more than {_MOST_MEMBERS} members", where)


def _next(stream: Readable, where: str) -> tarfile.TarInfo | None:
    """The next member, its name and size taken from a pax header before it; None at the end of the archive."""
    records: dict[str, str] = {}
    while True:
        block = _exactly(stream, _BLOCK, where)
        if not any(block):
            if records or any(_exactly(stream, _BLOCK, where)):
                raise _unsafe("the archive is malformed", where)
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise _unsafe("the archive is malformed", where) from error
        if member.type != tarfile.XHDTYPE:
            return _checked(member, records, where)
        if records or not 0 < member.size <= _PAX_LIMIT:
            raise _unsafe("a header in the archive is too large", where)
        padded = _exactly(stream, member.size + -member.size % _BLOCK, where)
        records = _pax(padded[: member.size], where)


def _checked(member: tarfile.TarInfo, records: dict[str, str], where: str) -> tarfile.TarInfo:
    member.name = records.get("path", member.name)
    size = records.get("size", str(member.size))
    if not size.isascii() or not size.isdigit() or len(size) > 18:
        raise _unsafe("the archive is malformed", where)
    member.size = int(size)
    if member.type not in (tarfile.REGTYPE, tarfile.DIRTYPE) or member.linkname:
        raise _unsafe(f"the archive holds a link or a special file: {member.name!r}", where)
    if member.type == tarfile.DIRTYPE and member.size:
        raise _unsafe("the archive is malformed", where)
    return member


def _pax(content: bytes, where: str) -> dict[str, str]:
    records: dict[str, str] = {}
    while content:
        match = _RECORD.match(content)
        length = int(match[1]) if match else 0
        if not match or not match.end() < length <= len(content) or content[length - 1 : length] != b"\n":
            raise _unsafe("the archive is malformed", where)
        key = match[2].decode("ascii")
        if key not in ("path", "size") or key in records:
            raise _unsafe(f"the archive has a pax record that no release has: {key}", where)
        try:
            records[key] = content[match.end() : length - 1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _unsafe("the archive is malformed", where) from error
        content = content[length:]
    return records


def _write(stream: Readable, path: Path, size: int, where: str) -> None:
    with path.open("xb") as file:
        left = size
        while left:
            piece = _exactly(stream, min(_PIECE, left), where)
            file.write(piece)
            left -= len(piece)
    if any(_exactly(stream, -size % _BLOCK, where)):
        raise _unsafe("the archive is malformed", where)


def _make(folder: Path, where: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _unsafe(f"a name is a file and a folder: {folder.name!r}", where) from error


def _new(path: Path, where: str) -> Path:
    """A path where nothing is yet, in a folder."""
    _make(path.parent, where)
    if os.path.lexists(path):
        raise _unsafe(f"a name comes twice: {path.name!r}", where)
    return path


def _exactly(stream: Readable, count: int, where: str) -> bytes:
    found = b""
    while len(found) < count:
        piece = stream.read(count - len(found))
        if not piece:
            raise InputError("the archive ends too early", where=where, mend="fetch it again")
        found += piece
    return found


def _unsafe(what: str, where: str) -> InputError:
    return InputError(what, where=where, mend="fetch the release from where it was published first")
