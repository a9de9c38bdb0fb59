"""The result of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qexport.amounts import counted
from qexport.artifact.report import Report
from qexport.artifact.sweep import COMPARISON_NAME, SweepRecord
from qexport.errors import GateFailed, GateUndecided, QexportError


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        folder: of the sweep.
        record: what has become of each variant.
        reports: of the variants that were measured, by their names.
        refused: what was raised for the variants that cannot be made, by their names.
    """

    folder: Path
    record: SweepRecord
    reports: Mapping[str, Report]
    refused: Mapping[str, QexportError] = field(default_factory=dict)

    @property
    def page(self) -> Path:
        """The path of the comparison as a page."""
        return self.folder / COMPARISON_NAME

    @property
    def recommended(self) -> Path | None:
        """The artifact's folder of the smallest variant that passes; None if none does."""
        found = self.record.variant(self.record.recommended or "")
        return None if found is None or found.folder is None else self.folder / found.folder

    def raise_for_verdict(self) -> None:
        """Raises unless a variant passed.

        Raises:
            GateUndecided: none passed, and one could not be decided.
            GateFailed: none passed, and gates of all that were measured failed.
            QexportError: none could be made; what was raised for the first one.
        """
        if self.record.recommended is not None:
            return
        states = [each.state for each in self.record.variants]
        if "undecided" in states:
            names = ", ".join(each.name for each in self.record.variants if each.state == "undecided")
            raise GateUndecided(
                "no variant passed, and not all could be decided",
                where=f"{self.page}: undecided: {names}",
                mend="verify with more windows (verify.max_windows), or loosen the limits that are undecided",
            )
        if "fail" in states:
            raise GateFailed(
                f"no variant passed: gates of {counted(states.count('fail'), 'variant')} failed",
                where=str(self.page),
                mend="add variants with more bits or smaller groups, or loosen the limits where the use allows it",
            )
        raise next(iter(self.refused.values()))
