"""What a text in a recipe or on the command line names: a local path, a model or dataset of the hub, a packaged file.

The form of the text decides, not what is on the disk: `org/name` never means a folder, and `folder/name.gguf` is a
file. A relative folder is written as `./org/name`; recipes that are read from a file hold absolute paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

DATASET_PREFIX: Final = "hub:"
"""The prefix of a dataset's id, in texts that otherwise name a file."""

GGUF_SUFFIX: Final = ".gguf"
"""The end of a GGUF file's name."""

PACKAGE_PREFIX: Final = "pkg:"
"""The prefix of a package's import name and a file inside it."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PACKAGE: Final = re.compile(r"pkg:(?P<package>[A-Za-z_]\w*)/(?P<file>[^\0\\]+\.gguf)", re.ASCII)
_PART: Final = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)
_EXPLICIT: Final = ("./", "../", "/", "~")


@dataclass(frozen=True)
class LocalReference:
    """A local path, absolute or relative to the current directory; `~` is not yet expanded."""

    text: str


@dataclass(frozen=True)
class HubReference:
    """A model on the hub, at a branch, tag or commit (`main` if None)."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True)
class PackageReference:
    """A file inside an installed package: the import name, and the path from there."""

    package: str
    file: str


def parse_reference(text: str) -> LocalReference | HubReference | PackageReference:
    """What kind of place the text of a base model or an adapter names.

    Raises:
        ValueError: the text begins with `pkg:`, but names no file inside a package.
    """
    if text.startswith(PACKAGE_PREFIX):
        if match := _PACKAGE.fullmatch(text):
            return PackageReference(match["package"], match["file"])
        raise ValueError(
            f"{text!r} does not name a file inside a package: write pkg:package/file.gguf with its import name"
        )
    return HubReference(text) if is_hub_id(text) and not names_gguf(text) else LocalReference(text)


def names_gguf(text: str) -> bool:
    """Whether the text has the form of a GGUF file's path, with or without folders before it."""
    return text.endswith(GGUF_SUFFIX)


def gguf_part(prefix: str, number: int, count: int) -> str:
    """The name of one of several GGUF files of a model, as llama.cpp wants it: `model-00001-of-00003.gguf`.

    Args:
        prefix: what all begin with.
        number: of the file, from 1.
        count: of the files.
    """
    return f"{prefix}-{number:05}-of-{count:05}{GGUF_SUFFIX}"


def parsed_gguf_part(name: str) -> tuple[str, int, int] | None:
    """Prefix, number and count in a name of that form; None for other names."""
    found = _PART.fullmatch(name)
    return None if found is None else (found["prefix"], int(found["number"]), int(found["count"]))


def is_first_part(name: str) -> bool:
    """Whether a file of this name is the first of several, which has the model's header."""
    found = parsed_gguf_part(name)
    return found is not None and found[1] == 1


def is_hub_id(text: str) -> bool:
    """Whether the text has the form of a model's or dataset's id: `org/name`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text


def is_explicit_path(text: str) -> bool:
    """Whether the text has the form of a path, and so names one even if nothing is there."""
    return text.startswith(_EXPLICIT) or text in (".", "..")
