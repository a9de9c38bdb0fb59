"""Releases as folders on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qexport.progress import Progress, ProgressCallback, Stage


def link_or_copy(
    source: Path, files: Mapping[str, int], target: Path, stage: Stage, progress: ProgressCallback
) -> None:
    """Puts files of one folder into another: hard links on the same file system, else copies.

    Args:
        source: the folder that they are in.
        files: their sizes in bytes, by their paths inside it.
        target: an empty folder.
        stage: for the progress.
        progress: is called after each file.

    Raises:
        OSError: a file cannot be read or written.
    """
    done, total = 0, sum(files.values())
    for name, size in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(source / name, target / name)
        done += size
        progress(Progress(stage, done, total, "byte", name))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links: what else is wrong, copying says too
        shutil.copyfile(source, target)
