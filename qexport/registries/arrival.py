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
    """A path beside the target for the block to fill, a file or a folder; it is moved when the block ends.

    Args:
        target: the final path; its parents are created.

    Raises:
        RecipeError: something is at the target already, or its parents cannot be created.
        ResourceError: the disk is full or failed.
    """
    _refuse_taken(target)
    try:
        make_folder(target.parent)
        with scratch_folder(target) as scratch:
            content = scratch / "content"
            yield content
            _publish(content, target)
    except OSError as error:
        if failure := disk_failure(error, where=str(target), after="; what was written has been removed"):
            raise failure from error
        raise RecipeError(f"nothing can be written there: {error.strerror}", where=str(target)) from error


def _publish(content: Path, target: Path) -> None:
    if content.is_dir():
        sync_tree(content)
    else:
        sync(content)
    with uninterrupted():
        _refuse_taken(target)
        content.rename(target)
        sync(target.parent)


def _refuse_taken(target: Path) -> None:
    if os.path.lexists(target):
        raise RecipeError("something is there already", where=str(target), mend="choose another path, or remove it")
