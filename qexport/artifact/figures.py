"""What verification measured, and what gates said of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from qexport.artifact.record import Record

Verdict = Literal["pass", "fail", "undecided"]

Unit = Literal["window", "prompt", "pair", "item", "repeat"]
"""What was drawn independently of each other; tokens of one window are not."""


class Figure(Record):
    """One figure, over all text or over one domain of it. `qexport.artifact.catalogue` says what each name means."""

    name: str

    domain: str | None = None
    """The domain, or the task; None for all text."""

    value: float

    low: float | None = None
    """Lower end of the 95 % confidence interval for the number of units that were measured."""

    high: float | None = None
    """Upper end of it. Both are None where no interval can be given."""

    sequence_low: float | None = None
    """Lower end of the 95 % confidence sequence, which holds however often one looks. Gates are decided on it."""

    sequence_high: float | None = None
    """Upper end of it."""

    n: int
    """How many units it was measured on."""

    unit: Unit

    tokens: int | None = None
    """Predicted tokens in those units."""

    noise_floor: float | None = None
    """The same figure between the reference and itself computed in a wider dtype."""


class GateResult(Record):
    """A gate and its decision."""

    name: str
    """The figure, with its domain in brackets where it has one; or the name of a check."""

    figure: str | None = None
    """The figure that it limits; None for a check that passes or fails as a whole."""

    domain: str | None = None

    bound: Literal["at_most", "at_least"] | None = None
    limit: float | None = None

    value: float | None = None
    """What was measured; None where nothing was, and the gate is then never passed."""

    low: float | None = None
    """Lower end of the interval that decided."""

    high: float | None = None
    """Upper end of it."""

    n: int = 0
    unit: Unit | None = None
    verdict: Verdict

    reason: str
    """One sentence for the reader."""

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """`fail` where one failed, else `undecided` where one is undecided, else `pass`."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "undecided" if "undecided" in found else "pass"


def find_figure(figures: Iterable[Figure], name: str, domain: str | None = None) -> Figure | None:
    """The figure of that name and domain, None where it was not measured."""
    return next((figure for figure in figures if (figure.name, figure.domain) == (name, domain)), None)
