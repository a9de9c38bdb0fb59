"""Publishing: an artifact is written to a temporary folder and appears at its final path in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from qexport.artifact.digests import sha256_file
from qexport.artifact.disk import is_disk_full, move_into_place, sync_tree, uninterrupted
from qexport.artifact.manifest import MANIFEST_NAME, REPORT_FOLDER, FileRecord, Manifest
from qexport.errors import GO_ON, InputError, QexportError, RecipeError, ResourceError

MARKER_NAME = ".qexport-partial"


def check_output(output: Path, *, force: bool) -> Path:
    """Checks, before any work, that an artifact may be published at a path, or moved next to it if rejected.

    Args:
        output: the final path; a link is followed.
        force: replace a folder that is not empty.

    Returns:
        The path with all links resolved.

    Raises:
        RecipeError: a path is taken, or contains the current directory.
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
    neither was called, because of an error or Ctrl-C, the final path is unchanged. The folder is removed then, unless
    its journal holds records and the error is not one that would come again. What a killed run left behind stays too
    if its journal holds records, else it is removed by the next run.

    The journal (`qexport.artifact.journal`) is the content of the marker, which leaves the folder last.

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
    def folder(self) -> Path:
        """Where the artifact is written."""
        return self.output.with_name(self.output.name + ".partial")

    def __enter__(self) -> Self:
        _make_folder(self.folder)
        self._lock = _lock(self.folder)
        if not _has_records(self.folder):
            _empty(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._lock is not None and _has_records(self.folder) and _may_go_on(error)
        if self._lock is not None:
            with suppress(OSError):  # the first error matters more, and the next run removes the rest
                if not kept:
                    _remove(self.folder)
            self._release()
        told = _disk_full(self.output, kept=kept) if is_disk_full(error) else error
        if kept and told is not None and not isinstance(told, RecipeError):
            told.add_note(GO_ON)
        if told is not error and told is not None:
            raise told from error

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


def _has_records(folder: Path) -> bool:
    marker = folder / MARKER_NAME
    return marker.exists() and marker.stat().st_size > 0


def _may_go_on(error: BaseException | None) -> bool:
    """Whether the same run might come further, or is not the one whose work is in the folder."""
    return error is not None and (not isinstance(error, QexportError) or isinstance(error, ResourceError | RecipeError))


def _disk_full(output: Path, *, kept: bool) -> ResourceError:
    if kept:
        return ResourceError("the disk is full", where=str(output), mend="free some space")
    what, mend = "the disk is full; what was written has been removed", "or choose an output on another disk"
    return ResourceError(what, where=str(output), mend=f"free some space, {mend}")


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
    """Removes the marker last, so that an interrupted removal is still recognized as qexport's; its journal first, so
    that no run goes on with files that are gone.
    """
    if (folder / MARKER_NAME).exists():
        os.truncate(folder / MARKER_NAME, 0)
    _empty(folder)
    (folder / MARKER_NAME).unlink(missing_ok=True)
    folder.rmdir()


@dataclass(frozen=True)
class Artifact:
    """A published folder.

    Attributes:
        path: the folder.
        manifest: what its manifest says.
    """

    path: Path
    manifest: Manifest

    @property
    def layout(self) -> str:
        """The layout's name."""
        return self.manifest.layout


def open_artifact(path: Path) -> Artifact:
    """Reads the manifest and checks every file against it.

    Raises:
        InputError: the manifest cannot be read; a file is missing, changed, or not in the manifest.
    """
    manifest = Manifest.read(path)
    found = dict(_files(path))
    for name in sorted(manifest.files.keys() | found.keys()):
        if fault := _fault(manifest.files.get(name), found.get(name)):
            raise InputError(f"a file of the artifact {fault}", where=str(path / name), mend="fetch the artifact again")
    return Artifact(path, manifest)


def digest_files(folder: Path, known: Mapping[str, str]) -> dict[str, FileRecord]:
    """Size and digest of every file in a folder except manifest and report, by its path inside the folder.

    Args:
        folder: the artifact.
        known: digests that need not be computed again, by path.
    """
    return {
        name: FileRecord(size=path.stat().st_size, sha256=known[name] if name in known else sha256_file(path))
        for name, path in _files(folder)
    }


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        own = name in (MANIFEST_NAME, MARKER_NAME) or name.startswith(f"{REPORT_FOLDER}/")
        if path.is_file() and not own:
            yield name, path


def _fault(record: FileRecord | None, path: Path | None) -> str | None:
    if path is None:
        return "is missing"
    if record is None:
        return "is not in its manifest"
    if path.stat().st_size != record.size or sha256_file(path) != record.sha256:
        return "has changed since it was written"
    return None
