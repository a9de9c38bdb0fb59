"""The errors of qexport, and the exit code that each one means.

    QexportError              1    a defect in qexport (also: any other exception)
    ├── RecipeError           2    usage or recipe: unknown key, wrong type, impossible combination
    ├── InputError            3    model, adapter or data: missing, malformed, unsafe, of another model
    ├── CompatibilityError    4    method, layout and model do not fit together
    ├── NumericalError        5    a Hessian that is not positive definite, NaN or Inf in the arithmetic
    ├── GateFailed            6    the artifact drifted further than a gate allows
    ├── GateUndecided         7    a gate could not be decided with what was measured
    └── ResourceError         8    not enough disk or memory

An interrupted run exits with 130.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

GO_ON: Final = "run the same command again: it goes on from what is finished"
"""A note (`BaseException.add_note`) on what has stopped a run whose work is kept."""


class QexportError(Exception):
    """An error in three lines: what happened, where, and how to fix it.

    Args:
        what: one sentence that says what is wrong, without the place.
        where: the file, field, tensor or layer concerned.
        mend: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.mend = mend

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"where: {self.where}")
        if self.mend:
            lines.append(f"mend:  {self.mend}")
        return "\n".join(lines)


class RecipeError(QexportError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class InputError(QexportError):
    """A model, an adapter or a data file cannot be used as it is."""

    exit_code = 3


class CompatibilityError(QexportError):
    """Method, layout and model do not fit together."""

    exit_code = 4


class NumericalError(QexportError):
    """The arithmetic failed: not finite, or a matrix that is not positive definite."""

    exit_code = 5


class GateFailed(QexportError):
    """The artifact drifted further than a gate allows."""

    exit_code = 6


class GateUndecided(QexportError):
    """A gate could not be decided with what was measured."""

    exit_code = 7


class ResourceError(QexportError):
    """There is not enough disk or memory."""

    exit_code = 8


def listed(problems: Sequence[str], *, limit: int = 12) -> str:
    """Problems for an error's `where`, one per line: at most `limit` of them, and the number of the others."""
    lines = list(problems[:limit])
    if len(problems) > limit:
        lines.append(f"and {len(problems) - limit} more")
    return "\n       ".join(lines)
