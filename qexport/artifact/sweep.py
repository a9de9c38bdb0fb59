"""The record of a sweep, `sweep.json`: what has become of each variant, and which one is recommended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from qexport.artifact.disk import write_whole
from qexport.errors import InputError
from qexport.records import Record
from qexport.tensors.strict_files import read_bounded

RECORD_NAME: Final = "sweep.json"
COMPARISON_NAME: Final = "comparison.html"

VariantState = Literal["waiting", "pass", "fail", "undecided", "refused", "skipped"]
"""`waiting`: its turn has not come. `refused`: it cannot be made. `skipped`: it need not be made. Else the verdict."""

_LARGEST: Final = 1 << 24


class Cost(Record):
    """What one variant has taken, since the last interruption."""

    cpu_seconds: float
    """Processor seconds of all threads and child processes."""

    seconds: float
    """Wall seconds."""


class VariantRecord(Record):
    """One variant of a sweep."""

    name: str
    method: str
    """For people, for example `GPTQ 4-bit, group 64`."""

    overrides: list[str]
    """`key=value` texts for `qexport run` that make this variant of the recipe."""

    state: VariantState
    reason: str
    """Why it is in this state, one sentence."""

    total_bytes: int | None
    """Of the tensors of its largest layout, from headers; None if it could not be planned, or if its method decides."""

    folder: str | None
    """Of the artifact, from the sweep's folder; None if there is none, or none any more."""

    report: str | None
    """Of `report.json`, from the sweep's folder; None if nothing was measured."""

    windows: int | None
    """Windows of text that were measured; None if none were."""

    cost: Cost | None
    """None if it was not made, or if it had been finished when this sweep began."""

    identity: str | None
    """The digest of all that decides its bytes and figures; None if it was not made."""

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return self.state == "pass"

    @property
    def measured(self) -> bool:
        """Whether there is a report."""
        return self.report is not None


class SweepRecord(Record):
    """The content of `sweep.json`."""

    schema_version: Literal[1]
    qexport_version: str
    recipe: str
    """The recipe's file name."""

    keep: Literal["all", "best"]
    variants: list[VariantRecord]
    """In the order in which they are made."""

    recommended: str | None
    """The name of the smallest variant that passes; None if none does."""

    finished: bool
    """Whether no variant is waiting."""

    def variant(self, name: str) -> VariantRecord | None:
        """The variant of this name."""
        return next((each for each in self.variants if each.name == name), None)

    def write(self, folder: Path) -> None:
        """Writes the record into the sweep's folder, in one step.

        Raises:
            OSError: it could not be written; an older one is unchanged.
        """
        write_whole(folder / RECORD_NAME, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> SweepRecord | None:
        """Reads the record of a sweep's folder; None if there is none.

        Raises:
            InputError: it is malformed.
        """
        path = folder / RECORD_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(read_bounded(path, _LARGEST))
        except ValidationError as error:
            raise InputError(
                f"the record of the sweep is malformed: {error.errors()[0]['msg']}",
                where=str(path),
                mend="choose another output, or begin again with --restart",
            ) from error


def smallest(passing: Sequence[tuple[VariantRecord, int, float]]) -> VariantRecord | None:
    """The smallest one; of equally small ones the nearest to the reference.

    Args:
        passing: each with the bytes of its tensors, and its mean KL divergence.
    """
    found = min(passing, key=lambda each: each[1:], default=None)
    return found[0] if found else None
