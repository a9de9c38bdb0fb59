"""Files and folders that are at their final path as a whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qexport.artifact.disk import disk_failure, make_folder, sync, sync_tree, uninterrupted
from qexport.artifact.partial import scratch_folder
from qexport.errors import RecipeError


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A path of the target's name for the block to fill, a file or a folder; it is moved when the block ends.

    Until then it is in a folder beside the target, which the next process removes if this one is killed.

    Args:
        target: the final path; its parents are created.

    Raises:
        RecipeError: something is at the target already, or its parents cannot be created.
        ResourceError: the disk is full or failed.
    """
    refuse_taken(target)
    try:
        make_folder(target.parent)
        with scratch_folder(target) as scratch:
            content = scratch / target.name
            yield content
            _publish(content, target)
    except OSError as error:
        if failure := disk_failure(error, where=str(target), after="; what was written has been removed"):
            raise failure from error
        if not _is_about(target, error):
            raise
        raise RecipeError(f"nothing can be written there: {error.strerror}", where=str(target)) from error


def refuse_taken(target: Path) -> None:
    """Refuses a path where something is: nothing is replaced.

    Raises:
        RecipeError: a file or a folder is there.
    """
    if os.path.lexists(target):
        raise RecipeError(
            "something is there already, and a release is never replaced",
            where=str(target),
            mend="choose another path or version, or remove it",
        )


def _is_about(target: Path, error: OSError) -> bool:
    """Whether an error is about the way to the target or what is in the folder beside it, not about another file."""
    if not isinstance(error.filename, str):
        return False
    target, path = target.absolute(), Path(error.filename).absolute()
    beside = path.relative_to(target.parent).parts if path.is_relative_to(target.parent) else ()
    return target.is_relative_to(path) or (beside != () and beside[0].startswith(f".{target.name}."))


def _publish(content: Path, target: Path) -> None:
    if content.is_dir():
        sync_tree(content)
    else:
        sync(content)
    with uninterrupted():
        refuse_taken(target)
        content.rename(target)
        sync(target.parent)
