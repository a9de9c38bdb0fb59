"""Publishing: an artifact is written to a temporary folder and appears at its final path in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qexport.artifact.disk import (
    disk_failure,
    move_into_place,
    path_aside,
    sync,
    sync_tree,
    uninterrupted,
)
from qexport.artifact.partial import (
    MARKER_NAME,
    empty,
    has_records,
    is_complete,
    is_ours,
    lock,
    lock_file,
    lock_finished,
    make_temporary,
    manifests_in,
    marked_if_foreign,
    remove,
    remove_unlocked,
)
from qexport.artifact.roots import check_roots_path
from qexport.errors import GO_ON, QexportError, RecipeError, ResourceError

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


def temporary_path(output: Path) -> Path:
    """Where the artifact of an output is written."""
    return output.with_name(output.name + ".partial")


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
    if rejected.is_dir() and any(rejected.iterdir()) and not is_complete(rejected):
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
    if aside.is_symlink() or not aside.is_dir() or (any(aside.iterdir()) and not is_ours(aside)):
        what = "something that is not qexport's lies where a folder goes while it is replaced"
        raise RecipeError(what, where=str(aside), mend="move or remove it, or choose another output")
    if not force and not target.exists():
        what = "a run with --force was killed while it replaced the output, and the old one lies beside"
        raise RecipeError(what, where=str(aside), mend=f"move it back to {target.name}, or run again with --force")


class Publication:
    """The temporary folder `<output>.partial/`, locked against other runs.

    Used as a context manager. `publish` moves the folder to its final path, `reject` to `<output>.rejected/`; if
    neither was called, because of an error or Ctrl-C, the final path is unchanged. The folder is removed then, unless
    its journal holds records and the error is not one that would come again, or it is finished. What a killed run left
    behind stays too if its journal holds records or it is what this run would make, else it is removed by the next run,
    or put back if it is the old output.

    The journal (`qexport.artifact.journal`) is the content of the marker, which leaves the folder last.

    Args:
        output: the final path; parents are created.
        force: replace a folder that is not empty, in one step at the end.
        made_here: whether a finished folder, which a run was killed at publishing, is what this run would make. By
            default it is not.

    Attributes:
        finished: the folder is finished and has no marker any more: it can only be published.

    Raises:
        RecipeError: the output is taken, another run is writing it, or `<output>.partial/` is not qexport's.
        ResourceError: the disk became full or failed inside the context.
    """

    def __init__(
        self, output: Path, *, force: bool = False, made_here: Callable[[Path], bool] = lambda folder: False
    ) -> None:
        self.output = check_output(output, force=force)
        self.finished = False
        self._force, self._made_here = force, made_here
        self._lock: int | None = None

    @property
    def rejected(self) -> Path:
        """Where the artifact goes if a gate stops it."""
        return _rejected_path(self.output)

    @property
    def folder(self) -> Path:
        """Where the artifact is written."""
        return temporary_path(self.output)

    def __enter__(self) -> Self:
        with _telling_of_the_disk(self.output):
            make_temporary(self.folder)
            try:
                self.finished = self._take_over()
                if not self.finished:
                    self._lock = lock(self.folder)
                    self._clear()
            except BaseException:
                self._release()
                raise
        return self

    def _take_over(self) -> bool:
        """Locks a finished folder that only needs to be published. Nothing is written into it, nor removed."""
        self._lock = lock_finished(self.folder)
        if self._lock is None:
            return False
        aside = [path for path in map(_put_back, (self.output, self.rejected)) if path.exists()]
        if not aside and self._made_here(self.folder):
            return True
        self._release()
        return False

    def _clear(self) -> None:
        """Removes what a killed run left and no journal names."""
        if not has_records(self.folder):
            empty(self.folder)
        for target in (self.output, self.rejected):
            _end_replacing(target, self.folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._lock is not None and self._has_work and _may_go_on(error)
        after = ""
        if self._lock is not None:
            with suppress(OSError):  # the first error matters more, and the next run removes the rest
                if not kept:
                    remove(self.folder)
                    after = "; what was written has been removed"
            self._release()
        failure = disk_failure(error, where=str(self.output), after=after)
        told = failure or error
        if kept and told is not None and not isinstance(told, RecipeError):
            told.add_note(GO_ON)
        if failure:
            raise failure from error

    @property
    def _has_work(self) -> bool:
        """Whether there is something in the folder for the next run."""
        return self.finished or has_records(self.folder)

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
        empty(self.folder)

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
        _check_rejected(self.rejected)
        self._move_to(self.rejected)
        return self.rejected

    def _move_to(self, target: Path) -> None:
        """Moves the folder to the target, which is replaced.

        A finished artifact never contains the marker, wherever the run is killed: it is removed before the rename. For
        that moment the manifest is locked in its place, and what is left there is known by its manifest. What is moved
        away carries a manifest or gets a marker first, so that the next run knows it.
        """
        if not is_complete(self.folder):
            raise QexportError("an artifact without its manifest cannot be published", where=str(self.folder))
        sync_tree(self.folder)
        with uninterrupted(), ExitStack() as locks:
            if not self.finished:
                locks.callback(os.close, lock_file(manifests_in(self.folder)[0], wait=True))
                (self.folder / MARKER_NAME).unlink()
                self.finished = True
                sync(self.folder)
            with marked_if_foreign(target):
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


def _may_go_on(error: BaseException | None) -> bool:
    """Whether the same run might come further, or is not the one whose work is in the folder."""
    return error is not None and (not isinstance(error, QexportError) or isinstance(error, ResourceError | RecipeError))


def _end_replacing(target: Path, folder: Path) -> None:
    """Ends what a run was killed at that could not exchange two folders.

    The old folder is put back if the new one has not taken its place, else it is moved into the temporary folder and
    removed there: what lies aside is always whole.
    """
    garbage = folder / path_aside(target).name
    if garbage.exists():
        shutil.rmtree(garbage)
    aside = _put_back(target)
    if aside.exists():
        aside.rename(garbage)
        shutil.rmtree(garbage)
        sync(target.parent)


def _put_back(target: Path) -> Path:
    """Moves what lies aside back to the target if nothing has taken its place; returns the path aside."""
    aside = path_aside(target)
    if aside.exists() and not (target.exists() and any(target.iterdir())):
        aside.rename(target)
        (target / MARKER_NAME).unlink(missing_ok=True)
        sync(target.parent)
    return aside


def _remove_replaced(replaced: Path, folder: Path) -> None:
    """Removes the old folder at the temporary path, where the next run looks for what is left of it."""
    if replaced != folder:
        replaced.rename(folder)
    remove_unlocked(folder)
