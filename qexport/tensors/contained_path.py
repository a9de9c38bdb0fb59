"""File names that come from a model: they must stay inside its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from qexport.errors import InputError

_MEND = "keep the model's files themselves in its folder; a model of the hub's cache is named by its hub id"


def contained_path(folder: Path, name: str, *, root: Path | None = None) -> Path:
    """The path of `name` in `folder`. The file need not exist.

    Args:
        folder: the model's folder.
        name: a relative path with forward slashes, as the model writes it.
        root: where symbolic links may lead; the folder itself where none is given.

    Raises:
        InputError: the name is absolute or climbs upwards, or a symbolic link leads out of `root`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise InputError(f"the name {name!r} leaves the model's folder", where=str(folder), mend=_MEND)
    path = folder / name
    try:
        inside = path.resolve().is_relative_to((root or folder).resolve())
    except (OSError, RuntimeError) as error:
        raise InputError(f"a symbolic link cannot be followed: {error}", where=str(path), mend=_MEND) from error
    if not inside:
        raise InputError("a symbolic link leads out of the model's folder", where=str(path), mend=_MEND)
    return path
