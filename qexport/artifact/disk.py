"""Durable, atomic changes to folders."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qexport.amounts import size
from qexport.errors import ResourceError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


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


def _allocated(folder: Path) -> int:
    """Bytes that a folder's files take on the disk; one with several paths counts once."""
    found = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return 512 * sum({each.st_ino: each.st_blocks for each in found}.values())


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error says that the disk or the user's quota is full."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def sync_tree(folder: Path) -> None:
    """Forces every file and folder below `folder`, and itself, onto the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def write_whole(path: Path, content: str) -> None:
    """Writes a file as UTF-8 next to its path, then renames it, so that its content is always the old or the new.

    Args:
        path: of the file, which may exist; its folder must exist.
        content: the new text.

    Raises:
        OSError: it could not be written; the path is unchanged.
    """
    write_together(path.parent, {path.name: content})


def write_together(folder: Path, contents: Mapping[str, str]) -> None:
    """Writes files as UTF-8 next to their paths, then renames all of them: either all are replaced, or none is.

    Args:
        folder: of all files; it must exist.
        contents: the new text of each file, by its name. An existing file is replaced, a folder is an error.

    Raises:
        OSError: one could not be written; all are unchanged.
    """
    beside = {folder / name: folder / f".{name}.{os.getpid()}.partial" for name in contents}
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
    """Renames a folder to `target`, in one step even if a folder is there already.

    Args:
        source: a complete folder that is on the disk (`sync_tree`).
        target: its final path, in the same parent folder.

    Returns:
        The new path of the folder that was at the target, for the caller to delete; None if there was none.

    Raises:
        OSError: nothing was changed.
    """
    if not target.exists():
        source.rename(target)
        sync(target.parent)
        return None
    try:
        _exchange(source, target)
        replaced = source
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        replaced = _swap_in_two_steps(source, target)
    sync(target.parent)
    return replaced


def _exchange(first: Path, second: Path) -> None:
    """Linux's renameat2 with RENAME_EXCHANGE: both paths exist at every moment."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2 is missing")
    status = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))


def _swap_in_two_steps(source: Path, target: Path) -> Path:
    """For systems that cannot exchange: the target is missing for a moment, but never incomplete."""
    aside = target.with_name(target.name + ".replaced")
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    return aside


def sync(path: Path) -> None:
    """Forces a file or a folder onto the disk.

    Raises:
        OSError: the disk is full or failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
