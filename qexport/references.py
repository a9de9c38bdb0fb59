"""What texts of recipes and of the command line name: a local path, a model or data set of the hub, a packaged file.

The form of the text decides, not what lies on the disk: `org/name` never means a folder. Such a relative folder is
written `./org/name`; recipes that are read from a file hold absolute paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

DATASET_PREFIX: Final = "hub:"
"""Before the id of a data set, where a text names a file otherwise."""

PACKAGE_PREFIX: Final = "pkg:"
"""Before a package's import name and a file inside it."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PACKAGE: Final = re.compile(r"pkg:(?P<package>[A-Za-z_]\w*)/(?P<file>[^\0\\]+\.gguf)", re.ASCII)
_EXPLICIT: Final = ("./", "../", "/", "~")


@dataclass(frozen=True)
class LocalReference:
    """A path of this machine, absolute or from the current directory; `~` is not yet expanded."""

    text: str


@dataclass(frozen=True)
class HubReference:
    """A model on the hub, at a branch, tag or commit (the main branch where None)."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True)
class PackageReference:
    """A file inside an installed package: the import name, and the path from there."""

    package: str
    file: str


def parse_reference(text: str) -> LocalReference | HubReference | PackageReference:
    """What a base model or an adapter is.

    Raises:
        ValueError: the text begins as a file inside a package, and names none.
    """
    if text.startswith(PACKAGE_PREFIX):
        if match := _PACKAGE.fullmatch(text):
            return PackageReference(match["package"], match["file"])
        raise ValueError(
            f"{text!r} does not name a file inside a package: write pkg:package/file.gguf with its import name"
        )
    return HubReference(text) if is_hub_id(text) else LocalReference(text)


def is_hub_id(text: str) -> bool:
    """Whether the text has the form of a model's or data set's id: `org/name`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def is_explicit_path(text: str) -> bool:
    """Whether the text says that it is a path, so that it names one even where nothing is there."""
    return text.startswith(_EXPLICIT) or text in (".", "..")
