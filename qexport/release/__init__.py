"""Releases: an artifact whose proof holds, locked together with everything that it came from, and its evidence.

The recipe's `release` is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Final

from pydantic import AfterValidator

from qexport.errors import RecipeError
from qexport.settings import Settings

_NAME: Final = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
"""A component of a repository's name, as OCI registries take it."""

_VERSION: Final = re.compile(r"[0-9A-Za-z]+(?:[.-][0-9A-Za-z]+)*")
_LONGEST: Final = 64


def checked_name(text: str) -> str:
    """The name of a release if registries take it.

    Raises:
        ValueError: they do not.
    """
    if len(text) > _LONGEST or not _NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no name of a release: use a-z, 0-9, and single dots, dashes or underscores inside"
        )
    return text


def checked_version(text: str) -> str:
    """The version of a release if it can stand in a name.

    Raises:
        ValueError: it cannot.
    """
    if len(text) > _LONGEST or not _VERSION.fullmatch(text):
        raise ValueError(f"{text!r} is no version: use letters, digits, and single dots or dashes inside, as in 1.4.0")
    return text


class ReleaseSettings(Settings):
    """The name under which the artifacts are released, and where to."""

    name: Annotated[str, AfterValidator(checked_name)] | None = None
    """What the release is called. By default base and adapter."""

    version: Annotated[str, AfterValidator(checked_version)] | None = None
    """For example `1.4.0`. With it, a run whose gates pass is released at once; without it, `qexport release` names
    it."""

    to: str | None = None
    """Where it goes: a folder, in which each release has its own. By default the current one. `--to` replaces it."""

    sign: str | None = None
    """A PEM file with the private key (EC), and its certificates behind it if there are some. It never enters an
    artifact. `--sign` replaces it."""


def named_or_refused(text: str | None, check: Callable[[str], str], option: str) -> str | None:
    """A name or a version from the command line.

    Raises:
        RecipeError: it cannot stand in a release's name.
    """
    if text is None:
        return None
    try:
        return check(text)
    except ValueError as error:
        raise RecipeError(str(error), where=option) from error
