"""Durable, atomic changes to folders."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qexport.amounts import size
from qexport.errors import QexportError, ResourceError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_BROKEN = {errno.EIO, errno.EREMOTEIO, errno.ESTALE}
_NUMBER: Final = re.compile(r"\(os error (\d+)\)|SystemError : (\d+)")
"""The system's error number as libraries in Rust and ONNX Runtime write it into their messages."""


def ensure_space(path: Path, needed: int, *, replaced: Path | None = None) -> None:
    """Checks that the disk has room for a folder, which need not exist yet.

    Args:
        path: where the bytes will go.
        needed: bytes.
        replaced: a folder, if it exists, whose files are among these bytes, or will be removed before.

    Raises:
        ResourceError: the file system has less free space.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free + (_allocated(replaced) if replaced else 0)
    if free < needed:
        raise ResourceError(
            f"not enough room on the disk: {size(needed, decimals=2)} needed, {size(free, decimals=2)} free",
            where=str(path),
            mend="free some space, or choose an output on another disk",
        )


def disk_failure(error: BaseException | None, *, where: str | None, after: str = "") -> ResourceError | None:
    """What to tell of an error of the disk itself; None for any other error, for example that of a wrong path.

    Args:
        error: any exception, also one that was raised from the disk's or while it was handled, for example that a file
            cannot be read. Libraries that are not written in Python tell the system's error by its number.
        where: the path concerned.
        after: what has become of the files, to follow the message.
    """
    if isinstance(error, ResourceError):
        return None
    while error is not None:
        number = _error_number(error)
        if number in _FULL:
            mend = "free some space, or choose an output on another disk"
            return ResourceError(f"the disk is full{after}", where=where, mend=mend)
        if number in _BROKEN:
            mend = "check the disk or the connection to it (dmesg shows its errors), then run it again"
            return ResourceError(f"the disk failed: {os.strerror(number)}{after}", where=where, mend=mend)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _error_number(error: BaseException) -> int:
    """The system's number of an error; 0 if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = None if isinstance(error, QexportError) else _NUMBER.search(str(error))
    return int(told[1] or told[2]) if told else 0


def _allocated(folder: Path) -> int:
    """Bytes that a folder's files take on the disk; one with several paths counts once."""
    found = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return 512 * sum({each.st_ino: each.st_blocks for each in found}.values())


def sync_tree(folder: Path) -> None:
    """Forces every file and folder below `folder`, and itself, onto the disk.

    Raises:
        OSError: the disk failed, or a folder cannot be listed.
    """
    for parent, _, files in os.walk(folder, onerror=_raise):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def _raise(error: OSError) -> None:
    raise error


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates a folder with its parents. Each name is forced onto the disk, as a folder is lost with its parents."""
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        missing.mkdir(exist_ok=True)
        sync(missing.parent)


def write_whole(path: Path, content: str, *, suffix: str | None = None) -> None:
    """Writes a file as UTF-8 next to its path, then renames it, so that its content is always the old or the new.

    Args:
        path: of the file, which may exist; its folder must exist.
        content: the new text.
        suffix: see `write_together`.

    Raises:
        OSError: it could not be written; the path is unchanged.
    """
    write_together(path.parent, {path.name: content}, suffix=suffix)


def write_together(folder: Path, contents: Mapping[str, str], *, suffix: str | None = None) -> None:
    """Writes files as UTF-8 next to their paths, then renames all of them: either all are replaced, or none is.

    Args:
        folder: of all files; it must exist.
        contents: the new text of each file, by its name. An existing file is replaced, a folder is an error.
        suffix: of the files beside them. By default it names this process, since another may write the same files;
            where only one can, a fixed one lets the next process replace what a killed one left.

    Raises:
        OSError: one could not be written; all are unchanged.
    """
    suffix = f".{os.getpid()}.partial" if suffix is None else suffix
    beside = {folder / name: folder / f".{name}{suffix}" for name in contents}
    path = folder
    try:
        for (path, partial), content in zip(beside.items(), contents.values(), strict=True):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            partial.write_bytes(content.encode())
            sync(partial)
        with uninterrupted():
            for path, partial in beside.items():
                partial.replace(path)
            sync(folder)
    except BaseException as error:
        for partial in beside.values():
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no path, other errors name the partial file
            error.filename = str(path)
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and SIGTERM while something is moved to its path: the error would claim that nothing was done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def move_into_place(source: Path, target: Path) -> Path | None:
    """Renames a folder to `target`, in one step even if a folder is there already. The caller syncs the parent folder.

    Args:
        source: a complete folder that is on the disk (`sync_tree`).
        target: its final path, in the same parent folder.

    Returns:
        The new path of the folder that was at the target, for the caller to delete; None if there was none.

    Raises:
        OSError: nothing was changed.
        ResourceError: the disk failed, and again when the old folder was to be put back; it lies at `path_aside`.
    """
    if not target.exists() or not any(target.iterdir()):
        source.rename(target)
        return None
    try:
        _exchange(source, target)
        return source
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        return _swap_in_two_steps(source, target)


def _exchange(first: Path, second: Path) -> None:
    """Linux's renameat2 with RENAME_EXCHANGE: both paths exist at every moment."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2 is missing")
    status = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))


def path_aside(target: Path) -> Path:
    """Where the folder at `target` lies for the moment in which another takes its place."""
    return target.with_name(target.name + ".replaced")


def _swap_in_two_steps(source: Path, target: Path) -> Path:
    """For systems that cannot exchange: the target is missing for a moment, but never incomplete."""
    aside = path_aside(target)
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException as error:
        _put_back(aside, target, error)
        raise
    return aside


def _put_back(aside: Path, target: Path, reason: BaseException) -> None:
    try:
        aside.rename(target)
    except OSError as error:
        raise ResourceError(
            f"the old folder could not be put back after a failure ({reason}): {error.strerror}",
            where=str(aside),
            mend=f"move it to {target.name} once the disk works, or run again with --force, which does that first",
        ) from error
