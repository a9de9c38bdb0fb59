"""What a server's loader demands of a folder: one check for each rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from qexport.errors import QexportError, listed

FolderT = TypeVar("FolderT")


@dataclass(frozen=True)
class Check:
    """What holding a folder against one rule has found.

    Attributes:
        name: the rule, in a few words.
        source: where the rule comes from: a file of the server's repository.
        passed: the folder keeps it.
        detail: what was found.
    """

    name: str
    source: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Rule(Generic[FolderT]):
    """One demand of a server.

    Attributes:
        name: the demand in a few words; no two rules of a server have the same.
        source: the file of the server's repository that it comes from.
        faults: everything in a folder, as the server finds it, that breaks the rule.
    """

    name: str
    source: str
    faults: Callable[[FolderT], Iterator[str]]


def check_rules(rules: Iterable[Rule[FolderT]], folder: FolderT) -> list[Check]:
    """One check for each rule. Values of a kind that a rule cannot judge break it."""
    return [_check(rule, folder) for rule in rules]


def _check(rule: Rule[FolderT], folder: FolderT) -> Check:
    try:
        faults = list(rule.faults(folder))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        faults = [f"cannot be judged: {type(error).__name__}: {error}"]
    return Check(rule.name, rule.source, not faults, listed(faults, limit=3) if faults else "as demanded")


def refuse_failed(checks: Sequence[Check], server: str) -> None:
    """Refuses a folder that breaks a rule.

    Raises:
        QexportError: one or more checks have failed; all are listed.
    """
    failed = [f"{check.name}: {check.detail} ({check.source})" for check in checks if not check.passed]
    if failed:
        raise QexportError(f"{len(failed)} of {len(checks)} demands of {server} are not met", where=listed(failed))
