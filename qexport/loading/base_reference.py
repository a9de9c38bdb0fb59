"""What the recipe's `base` and `adapter` may name: a folder, a hub id, a GGUF file inside a package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qexport.errors import InputError, RecipeError

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PACKAGE: Final = re.compile(r"pkg:(?P<package>[A-Za-z_]\w*)/(?P<file>[^\0\\]+\.gguf)", re.ASCII)


@dataclass(frozen=True)
class FolderReference:
    """A local folder that exists."""

    path: Path


@dataclass(frozen=True)
class HubReference:
    """A model on the hub, at a branch, tag or commit (the main branch where None)."""

    repo_id: str
    revision: str | None


@dataclass(frozen=True)
class PackageReference:
    """A file inside an installed package: the import name, and the path from there."""

    package: str
    file: str


def parse_folder_or_hub(text: str, revision: str | None, *, field: str) -> FolderReference | HubReference:
    """A hub id where the text has its form, else a local folder.

    The form decides, not what lies in the current directory: `org/name` never means a folder. A relative folder of that
    form is written `./org/name`; recipes that are read from a file hold absolute paths.

    Args:
        text: the recipe's value.
        revision: the recipe's revision.
        field: the recipe's field, for the errors.

    Raises:
        InputError: neither of the form of a hub id nor a folder.
        RecipeError: a revision for a local folder.
    """
    if _HUB_ID.fullmatch(text):
        return HubReference(text, revision)
    path = Path(text).expanduser()
    if not path.is_dir():
        raise InputError(
            f"{text!r} is a file, not a folder" if path.exists() else f"there is no folder {text!r}",
            where=field,
            mend="name the folder that holds config.json, or a hub id such as org/name",
        )
    if revision is not None:
        raise RecipeError(f"a revision was given for the local folder {text!r}", where=field, mend="remove it")
    return FolderReference(path)


def parse_base(text: str, revision: str | None) -> FolderReference | HubReference | PackageReference:
    """What `load.base` names.

    Raises:
        InputError: none of the three forms.
        RecipeError: a revision for a local folder.
    """
    if not text.startswith("pkg:"):
        return parse_folder_or_hub(text, revision, field="load.base")
    match = _PACKAGE.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text!r} does not name a file inside a package",
            where="load.base",
            mend="write pkg:package/file.gguf with the package's import name",
        )
    return PackageReference(match["package"], match["file"])
