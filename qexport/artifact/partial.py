"""The temporary folder of a run, `<output>.partial/`: its marker, its lock, and what a killed run has left of it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import mkdtemp

from qexport.artifact.disk import disk_failure, make_folder, sync
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.errors import RecipeError

MARKER_NAME = ".qexport-partial"
"""This file says that a folder is qexport's and may be deleted. It holds the journal, and is locked during a run."""


def manifests_in(folder: Path) -> list[Path]:
    """The manifest of a finished artifact, or those of the artifacts in a folder of several; none if one is missing."""
    if (folder / MANIFEST_NAME).is_file():
        return [folder / MANIFEST_NAME]
    found = [entry / MANIFEST_NAME for entry in sorted(folder.iterdir()) if entry.name != MARKER_NAME]
    return found if all(manifest.is_file() for manifest in found) else []


def has_records(folder: Path) -> bool:
    """Whether the folder's journal has records, so that a run may go on from it."""
    marker = folder / MARKER_NAME
    return marker.exists() and marker.stat().st_size > 0


def is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest, or consists of folders that have one."""
    return bool(manifests_in(folder))


def is_ours(folder: Path) -> bool:
    """Whether qexport made the folder, or was about to delete it."""
    return (folder / MARKER_NAME).exists() or is_complete(folder)


@contextmanager
def marked_if_foreign(folder: Path) -> Iterator[None]:
    """Marks a folder of the user, which is to be replaced in the block; the manifest of an artifact is mark enough."""
    if not folder.is_dir() or not any(folder.iterdir()) or is_complete(folder):
        yield
        return
    marker = folder / MARKER_NAME
    marker.touch()
    sync(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            marker.unlink()
        raise


def make_temporary(folder: Path) -> None:
    """Creates the temporary folder, which may exist if it is qexport's.

    Raises:
        RecipeError: something else is there, or the folder cannot be created.
        OSError: the disk is full or failed.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RecipeError(
            "the temporary folder's path is taken by a file or a link", where=str(folder), mend="remove it"
        )
    try:
        make_folder(folder)
    except OSError as error:
        if disk_failure(error, where=None):
            raise
        raise RecipeError(f"the output cannot be created: {error.strerror}", where=str(folder)) from error
    if any(folder.iterdir()) and not is_ours(folder):
        raise RecipeError(
            "the temporary folder holds files that are not qexport's", where=str(folder), mend="move or remove it"
        )


def lock(folder: Path) -> int:
    """Opens and locks the marker. The lock ends with the descriptor, so also when the process is killed.

    A finished folder without marker was left by a killed run, or is being published at this moment: its manifest is
    locked then.
    """
    marker = folder / MARKER_NAME
    if os.path.lexists(marker):
        return lock_file(marker)
    with ExitStack() as locks:
        for manifest in manifests_in(folder)[:1]:
            locks.callback(os.close, lock_file(manifest))
        return lock_file(marker, create=True)


def lock_finished(folder: Path) -> int | None:
    """Locks the manifest of a finished folder without marker, which a run was killed at publishing; None if the folder
    is not finished, or has a marker.
    """
    if os.path.lexists(folder / MARKER_NAME):
        return None
    manifests = manifests_in(folder)
    return lock_file(manifests[0]) if manifests else None


def lock_file(path: Path, *, create: bool = False, wait: bool = False) -> int:
    """Opens and locks a file; `wait` is for one that others lock for a moment only."""
    access = os.O_RDWR if create or os.access(path, os.W_OK) else os.O_RDONLY
    try:
        descriptor = os.open(path, access | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        raise _another_run(path) from None
    if not _take(descriptor, path, wait=wait):
        os.close(descriptor)
        raise _another_run(path)
    return descriptor


def _another_run(path: Path) -> RecipeError:
    return RecipeError("another run is writing this output", where=str(path.parent), mend="wait for it, or stop it")


def _take(descriptor: int, path: Path, *, wait: bool = False) -> bool:
    """Locks the open file; False if another run holds it, or has moved it away with its folder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def empty(folder: Path) -> None:
    """Removes everything but the marker."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER_NAME:
            entry.unlink()


def remove(folder: Path) -> None:
    """Removes the marker last, so that an interrupted removal is still recognized as qexport's; its journal first, so
    that no run goes on with files that are gone.
    """
    (folder / MARKER_NAME).write_bytes(b"")
    empty(folder)
    (folder / MARKER_NAME).unlink()
    folder.rmdir()


def remove_unlocked(folder: Path) -> None:
    """Removes a folder of qexport's, unless a run has it; that removes it itself."""
    try:
        held = lock(folder)
    except RecipeError:
        return
    try:
        remove(folder)
    finally:
        os.close(held)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """A folder beside an output for as long as the context, marked and locked; those of killed runs are removed."""
    beginning, end = f".{output.name}.", ".inputs"
    for left in output.parent.glob(f"{escape(beginning)}*{end}"):
        if (left / MARKER_NAME).is_file() and not left.is_symlink():
            with suppress(OSError):  # it may be another user's
                remove_unlocked(left)
    folder = Path(mkdtemp(prefix=beginning, suffix=end, dir=output.parent))
    with ExitStack() as ending:
        ending.callback(os.close, lock(folder))
        ending.callback(remove, folder)
        yield folder
