"""Publishing: an artifact is written to a temporary folder and appears at its final path in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qexport.artifact.disk import (
    disk_failure,
    make_folder,
    move_into_place,
    path_aside,
    sync,
    sync_tree,
    uninterrupted,
)
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.roots import check_roots_path
from qexport.errors import GO_ON, QexportError, RecipeError, ResourceError

MARKER_NAME = ".qexport-partial"
_OWN_SUFFIXES = (".partial", ".rejected", ".replaced")


def check_output(output: Path, *, force: bool) -> Path:
    """Checks, before any work, that an artifact may be published at a path, or moved next to it if rejected.

    Args:
        output: the final path; a link is followed.
        force: replace a folder that is not empty.

    Returns:
        The path with all links resolved.

    Raises:
        RecipeError: a path is taken, also that of the root digest, is one of qexport's own, or contains the current
            directory.
    """
    resolved = Path(os.path.realpath(output))
    if resolved.suffix in _OWN_SUFFIXES:
        what = f"an output must not be called {resolved.name}: qexport makes and removes folders of such names"
        raise RecipeError(what, where=str(output), mend="choose another output")
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
    _check_aside(resolved, force=force)
    _check_aside(_rejected_path(resolved), force=True)
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


def _check_aside(target: Path, *, force: bool) -> None:
    """Refuses what lies where the folder at `target` goes for a moment, unless a killed run has put it there."""
    aside = path_aside(target)
    if not os.path.lexists(aside):
        return
    if aside.is_symlink() or not aside.is_dir() or (any(aside.iterdir()) and not _is_ours(aside)):
        what = "something that is not qexport's lies where a folder goes while it is replaced"
        raise RecipeError(what, where=str(aside), mend="move or remove it, or choose another output")
    if not force and not target.exists():
        what = "a run with --force was killed while it replaced the output, and the old one lies beside"
        raise RecipeError(what, where=str(aside), mend=f"move it back to {target.name}, or run again with --force")


class Publication:
    """The temporary folder `<output>.partial/`, locked against other runs.

    Used as a context manager. `publish` moves the folder to its final path, `reject` to `<output>.rejected/`; if
    neither was called, because of an error or Ctrl-C, the final path is unchanged. The folder is removed then, unless
    its journal holds records and the error is not one that would come again. What a killed run left behind stays too
    if its journal holds records, else it is removed by
    the next run, or put back if it is the old output.

    The journal (`qexport.artifact.journal`) is the content of the marker, which leaves the folder last.

    Args:
        output: the final path; parents are created.
        force: replace a folder that is not empty, in one step at the end.

    Raises:
        RecipeError: the output is taken, another run is writing it, or `<output>.partial/` is not qexport's.
        ResourceError: the disk became full or failed inside the context.
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
        with _telling_of_the_disk(self.output):
            _make_folder(self.folder)
            self._lock = _lock(self.folder)
            try:
                self._clear()
            except BaseException:
                self._release()
                raise
        return self

    def _clear(self) -> None:
        """Removes what a killed run left and no journal names."""
        if not _has_records(self.folder):
            _empty(self.folder)
        for target in (self.output, _rejected_path(self.output)):
            _end_replacing(target, self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._lock is not None and _has_records(self.folder) and _may_go_on(error)
        after = ""
        if self._lock is not None:
            with suppress(OSError):  # the first error matters more, and the next run removes the rest
                if not kept:
                    _remove(self.folder)
                    after = "; what was written has been removed"
            self._release()
        failure = disk_failure(error, where=str(self.output), after=after)
        told = failure or error
        if kept and told is not None and not isinstance(told, RecipeError):
            told.add_note(GO_ON)
        if failure:
            raise failure from error

    @property
    def journal(self) -> Path:
        """The file of the journal."""
        return self.folder / MARKER_NAME

    def keep_only(self, kept: Collection[Path]) -> None:
        """Removes all other files than these and the journal. Folders stay."""
        for parent, _, files in os.walk(self.folder):
            for path in (Path(parent, name) for name in files):
                if path not in kept and path != self.journal:
                    path.unlink()

    def empty(self) -> None:
        """Removes everything but the file of the journal."""
        _empty(self.folder)

    def publish(self) -> Path:
        """Moves the finished folder, one artifact or a folder of artifacts, to its final path, and returns that.

        Raises:
            QexportError: a manifest is missing.
            RecipeError: something else has appeared at the final path.
            ResourceError: the artifact is at its final path, but the disk failed afterwards.
        """
        check_output(self.output, force=self._force)
        self._move_to(self.output)
        return self.output

    def reject(self) -> Path:
        """Moves the folder to `<output>.rejected/`, in place of an older one, and returns that path.

        Raises:
            QexportError: a manifest is missing.
            RecipeError: something else has appeared there.
            ResourceError: the artifact is there, but the disk failed afterwards.
        """
        rejected = _rejected_path(self.output)
        _check_rejected(rejected)
        self._move_to(rejected)
        return rejected

    def _move_to(self, target: Path) -> None:
        """Moves the folder to the target, which is replaced.

        A finished artifact never contains the marker, wherever the run is killed: it is removed before the rename. For
        that moment the manifest is locked in its place. What is moved away carries a manifest or gets a marker first,
        so that the next run knows it.
        """
        if not _is_complete(self.folder):
            raise QexportError("an artifact without its manifest cannot be published", where=str(self.folder))
        sync_tree(self.folder)
        with uninterrupted(), ExitStack() as locks:
            locks.callback(os.close, _lock_file(_manifests(self.folder)[0], wait=True))
            (self.folder / MARKER_NAME).unlink()
            sync(self.folder)
            with _marked_if_foreign(target):
                replaced = move_into_place(self.folder, target)
            locks.close()
            self._release()
            self._finish(target, replaced)

    def _finish(self, target: Path, replaced: Path | None) -> None:
        """Removes the folder that was replaced, once the new one is certain to be found after a loss of power."""
        try:
            sync(target.parent)
            if replaced is not None:
                _remove_replaced(replaced, self.folder)
        except OSError as error:
            what = f"the artifact is complete, but the disk failed while the run was ending: {error.strerror}"
            mend = "check the disk; what is left of the old artifact lies beside, and a run with --force removes it"
            raise ResourceError(what, where=str(target), mend=mend) from error

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def _telling_of_the_disk(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if failure := disk_failure(error, where=str(output)):
            raise failure from error
        raise


def _manifests(folder: Path) -> list[Path]:
    """The manifest of a finished artifact, or those of the artifacts in a folder of several; none if one is missing."""
    if (folder / MANIFEST_NAME).is_file():
        return [folder / MANIFEST_NAME]
    found = [entry / MANIFEST_NAME for entry in sorted(folder.iterdir()) if entry.name != MARKER_NAME]
    return found if all(manifest.is_file() for manifest in found) else []


def _has_records(folder: Path) -> bool:
    marker = folder / MARKER_NAME
    return marker.exists() and marker.stat().st_size > 0


def _may_go_on(error: BaseException | None) -> bool:
    """Whether the same run might come further, or is not the one whose work is in the folder."""
    return error is not None and (not isinstance(error, QexportError) or isinstance(error, ResourceError | RecipeError))


def _is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest, or consists of folders that have one."""
    return bool(_manifests(folder))


def _is_ours(folder: Path) -> bool:
    """Whether qexport made the folder, or was about to delete it."""
    return (folder / MARKER_NAME).exists() or _is_complete(folder)


@contextmanager
def _marked_if_foreign(folder: Path) -> Iterator[None]:
    """Marks a folder of the user, which is to be replaced in the block; the manifest of an artifact is mark enough."""
    if not folder.is_dir() or not any(folder.iterdir()) or _is_complete(folder):
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


def _end_replacing(target: Path, folder: Path) -> None:
    """Ends what a run was killed at that could not exchange two folders.

    The old folder is put back if the new one has not taken its place, else it is moved into the temporary folder and
    removed there: what lies aside is always whole.
    """
    aside = path_aside(target)
    garbage = folder / aside.name
    if garbage.exists():
        shutil.rmtree(garbage)
    if not aside.exists():
        return
    if target.exists() and any(target.iterdir()):
        aside.rename(garbage)
        shutil.rmtree(garbage)
    else:
        aside.rename(target)
        (target / MARKER_NAME).unlink(missing_ok=True)
    sync(target.parent)


def _remove_replaced(replaced: Path, folder: Path) -> None:
    """Removes the old folder at the temporary path, where the next run looks for what is left of it."""
    if replaced != folder:
        replaced.rename(folder)
    try:
        lock = _lock(folder)
    except RecipeError:  # another run has just begun there, and removes it
        return
    try:
        _remove(folder)
    finally:
        os.close(lock)


def _make_folder(folder: Path) -> None:
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
    if any(folder.iterdir()) and not _is_ours(folder):
        raise RecipeError(
            "the temporary folder holds files that are not qexport's", where=str(folder), mend="move or remove it"
        )


def _lock(folder: Path) -> int:
    """Opens and locks the marker. The lock ends with the descriptor, so also when the process is killed.

    A finished folder without marker was left by a killed run, or is being published at this moment: its manifest is
    locked then.
    """
    marker = folder / MARKER_NAME
    if os.path.lexists(marker):
        return _lock_file(marker)
    with ExitStack() as locks:
        for manifest in _manifests(folder)[:1]:
            locks.callback(os.close, _lock_file(manifest))
        return _lock_file(marker, create=True)


def _lock_file(path: Path, *, create: bool = False, wait: bool = False) -> int:
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


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER_NAME:
            entry.unlink()


def _remove(folder: Path) -> None:
    """Removes the marker last, so that an interrupted removal is still recognized as qexport's; its journal first, so
    that no run goes on with files that are gone.
    """
    (folder / MARKER_NAME).write_bytes(b"")
    _empty(folder)
    (folder / MARKER_NAME).unlink()
    folder.rmdir()
