"""The packages that an artifact was made with: qexport and what it needs, with their versions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT: Final = "qexport"
_NOT_OF_A_RUN: Final = frozenset({"dev", "docs"})
"""Extras that change no artifact."""


@cache
def installed_packages() -> dict[str, str]:
    """The version of each installed package that qexport needs, directly or not, by canonical name; sorted."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(_ROOT, _extras(_ROOT) - _NOT_OF_A_RUN)]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name).version
        except PackageNotFoundError:  # of an extra, or for another platform
            continue
        waiting += _needed(name, extras)
    return dict(sorted(found.items()))


def requirements_text(packages: dict[str, str]) -> str:
    """The packages as pip reads them."""
    return "".join(f"{name}=={version}\n" for name, version in packages.items())


def _extras(name: str) -> frozenset[str]:
    return frozenset(distribution(name).metadata.get_all("Provides-Extra") or ())


def _needed(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        chosen = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(requirement.marker.evaluate(each) for each in chosen):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)
