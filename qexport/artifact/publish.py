"""Publishing: an artifact is written to a temporary folder and appears at its final path in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qexport.artifact.disk import is_disk_full, move_into_place, sync_tree, uninterrupted
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.roots import check_roots_path
from qexport.errors import QexportError, RecipeError, ResourceError

MARKER_NAME = ".qexport-partial"


def check_output(output: Path, *, force: bool) -> Path:
    """Checks, before any work, that an artifact may be published at a path, or moved next to it if rejected.

    Args:
        output: the final path; a link is followed.
        force: replace a folder that is not empty.

    Returns:
        The path with all links resolved.

    Raises:
        RecipeError: a path is taken, also that of the root digest, or contains the current directory.
    """
    resolved = Path(os.path.realpath(output))
    if not resolved.name or (force and Path.cwd().is_relative_to(resolved)):
        raise RecipeError(
            "the output must not contain the current directory", where=str(output), mend="choose another output"
        )
    if resolved.exists() and not resolved.is_dir():
        raise RecipeError("the output is a file, not a folder", where=str(output), mend="choose another output")
    if not force and resolved.is_dir() and any(resolved.iterdir()):
        raise RecipeError(
            "the output folder is not empty",
            where=str(output),
            mend="choose another output, or replace it with --force",
        )
    for target in (resolved, _rejected_path(resolved)):
        check_roots_path(target)
    _check_rejected(_rejected_path(resolved))
    return resolved


def _rejected_path(output: Path) -> Path:
    """Where an artifact goes that a gate stopped."""
    return output.with_name(output.name + ".rejected")


def _check_rejected(rejected: Path) -> None:
    """Refuses anything but an older artifact of qexport, since it would be deleted."""
    mend = "move or remove it, or choose another output"
    if rejected.is_symlink() or (rejected.exists() and not rejected.is_dir()):
        raise RecipeError(
            "a file or a link is at the path of the folder for a rejected artifact", where=str(rejected), mend=mend
        )
    if rejected.is_dir() and any(rejected.iterdir()) and not _is_complete(rejected):
        what = "the folder for a rejected artifact holds files that are not qexport's"
        raise RecipeError(what, where=str(rejected), mend=mend)
    if Path.cwd().is_relative_to(rejected):
        raise RecipeError(
            "the current directory is in the folder for a rejected artifact",
            where=str(rejected),
            mend="change to another directory",
        )


class Publication:
    """The temporary folder `<output>.partial/`, locked against other runs.

    Used as a context manager. `publish` moves the folder to its final path, `reject` to `<output>.rejected/`; if
    neither was called, because of an error or Ctrl-C, the folder is removed and the final path is unchanged. What a
    killed run left behind is removed by the next one.

    Args:
        output: the final path; parents are created.
        force: replace a folder that is not empty, in one step at the end.

    Raises:
        RecipeError: the output is taken, another run is writing it, or `<output>.partial/` is not qexport's.
        ResourceError: the disk became full inside the context.
    """

    def __init__(self, output: Path, *, force: bool = False) -> None:
        self.output = check_output(output, force=force)
        self._force = force
        self._lock: int | None = None

    @property
    def rejected(self) -> Path:
        """Where the artifact goes if a gate stops it."""
        return _rejected_path(self.output)

    @property
    def folder(self) -> Path:
        """Where the artifact is written."""
        return self.output.with_name(self.output.name + ".partial")

    def __enter__(self) -> Self:
        _make_folder(self.folder)
        self._lock = _lock(self.folder)
        _empty(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            with suppress(OSError):  # the first error matters more, and the next run removes the rest
                _remove(self.folder)
            self._release()
        if is_disk_full(error):
            raise ResourceError(
                "the disk is full; what was written has been removed",
                where=str(self.output),
                mend="free some space, or choose an output on another disk",
            ) from error

    def publish(self) -> Path:
        """Moves the finished folder, one artifact or a folder of artifacts, to its final path, and returns that.

        Raises:
            QexportError: a manifest is missing.
            RecipeError: something else has appeared at the final path.
        """
        if not _is_complete(self.folder):
            raise QexportError("an artifact without its manifest cannot be published", where=str(self.folder))
        check_output(self.output, force=self._force)
        self._move_to(self.output)
        return self.output

    def reject(self) -> Path:
        """Moves the folder to `<output>.rejected/`, in place of an older one, and returns that path.

        Raises:
            RecipeError: something else has appeared there.
        """
        rejected = _rejected_path(self.output)
        _check_rejected(rejected)
        self._move_to(rejected)
        return rejected

    def _move_to(self, target: Path) -> None:
        """Keeps the locked marker until the rename is done, so that no other run can take the folder before it."""
        sync_tree(self.folder)
        with uninterrupted():
            replaced = move_into_place(self.folder, target)
            (target / MARKER_NAME).unlink()
            self._release()
            if replaced is not None:
                lock = _lock(replaced)
                _remove(replaced)
                os.close(lock)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest, or consists of folders that have one."""
    entries = [entry for entry in folder.iterdir() if entry.name != MARKER_NAME]
    several = bool(entries) and all((entry / MANIFEST_NAME).is_file() for entry in entries)
    return several or (folder / MANIFEST_NAME).is_file()


def _make_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RecipeError(
            "the temporary folder's path is taken by a file or a link", where=str(folder), mend="remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"the output cannot be created: {error.strerror}", where=str(folder)) from error
    if not (folder / MARKER_NAME).exists() and any(folder.iterdir()):
        raise RecipeError(
            "the temporary folder holds files that are not qexport's", where=str(folder), mend="move or remove it"
        )


def _lock(folder: Path) -> int:
    """Opens and locks the marker. The lock ends with the descriptor, so also when the process is killed."""
    marker = folder / MARKER_NAME
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    if not _take(descriptor, marker):
        os.close(descriptor)
        raise RecipeError("another run is writing this output", where=str(folder), mend="wait for it, or stop it")
    return descriptor


def _take(descriptor: int, marker: Path) -> bool:
    """Locks the open marker; False if another run holds it, or has moved it away with its folder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), marker.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER_NAME:
            entry.unlink()


def _remove(folder: Path) -> None:
    """Removes the marker last, so that an interrupted removal is still recognized as qexport's."""
    _empty(folder)
    (folder / MARKER_NAME).unlink(missing_ok=True)
    folder.rmdir()
