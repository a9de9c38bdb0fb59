"""What a server's loader demands of a folder: one check for each rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.errors import QexportError, listed


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


def refuse_failed(checks: Sequence[Check], server: str) -> None:
    """Refuses a folder that breaks a rule.

    Raises:
        QexportError: one or more checks have failed; all are listed.
    """
    failed = [f"{check.name}: {check.detail} ({check.source})" for check in checks if not check.passed]
    if failed:
        raise QexportError(f"{len(failed)} of {len(checks)} demands of {server} are not met", where=listed(failed))
