"""The error of gates that did not pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qexport.cli.failures import Failure
from qexport.errors import GateFailed, GateUndecided
from qexport.reporting.units import counted

if TYPE_CHECKING:
    from qexport.artifact.figures import GateResult

_DRIFTED: Final = "try more bits or a smaller group_size, or loosen the limit where the use allows it"

_OTHER_MODEL: Final = "verify it against the base and the adapter that it was made from, or make it again from them"
_MENDS: Final[Mapping[str, str]] = {
    "config": _OTHER_MODEL,
    "tokenizer": _OTHER_MODEL,
    "adapter": _OTHER_MODEL,
    "merge": "check that the adapter was made for this base; if it was, please report this",
    "better_than_rtn": "look at the calibration text and the layer losses: calibration has gained nothing here",
}
"""What no limit loosens, by gate: more bits would not help."""


def gates_failure(results: Sequence[GateResult], where: str) -> Failure | None:
    """What the user is told where not every gate passed: exit code 6 where one failed, else 7; None where all passed.

    Args:
        results: of all gates.
        where: the artifact or the report that they belong to.
    """
    failed = [each for each in results if each.verdict == "fail"]
    undecided = [each for each in results if each.verdict == "undecided"]
    if failed:
        what = f"{counted(len(failed), 'gate')} failed: {_named(failed)}"
        mend = next((_MENDS[each.name] for each in failed if each.name in _MENDS), _DRIFTED)
        return Failure(what, GateFailed.exit_code, where, mend)
    if undecided:
        what = f"{counted(len(undecided), 'gate')} could not be decided: {_named(undecided)}"
        mend = "verify with more windows, or loosen or remove what cannot be measured"
        return Failure(what, GateUndecided.exit_code, where, mend)
    return None


def _named(results: Sequence[GateResult]) -> str:
    return ", ".join(map(_in_short, results))


def _in_short(result: GateResult) -> str:
    if result.value is None or result.limit is None:
        return f"{result.name} ({result.reason})"
    bound = "at most" if result.bound == "at_most" else "at least"
    return f"{result.name} is {result.value:.5g} where the limit is {bound} {result.limit:.5g}"
