"""The error of gates that did not pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qexport.cli.failures import Failure
from qexport.errors import GateFailed, GateUndecided
from qexport.reporting.units import counted

if TYPE_CHECKING:
    from qexport.artifact.figures import GateResult

_MAX_NAMED: Final = 12
_MEND_OF_LIMITS: Final = "try more bits or a smaller group_size, or loosen the limit where the use allows it"
_MEND: Final = {
    "config": "bring config.json to what the reference's says",
    "tokenizer": "take the tokenizer's files from the base",
    "graph": "export the model again: this graph does not heed its attention mask or its cache",
    "merge": "check that the adapter was made for this base",
    "adapter": "check that the artifact was made with this adapter",
    "better_than_rtn": "calibrate with more or other text, or check that this reference is the artifact's",
}


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
        mend = "; ".join(dict.fromkeys(_MEND.get(each.name, _MEND_OF_LIMITS) for each in failed))
        return Failure(what, GateFailed.exit_code, where, mend)
    if undecided:
        what = f"{counted(len(undecided), 'gate')} could not be decided: {_named(undecided)}"
        mend = "verify with more windows, or loosen or remove what cannot be measured"
        return Failure(what, GateUndecided.exit_code, where, mend)
    return None


def _named(results: Sequence[GateResult]) -> str:
    rest = [f"and {len(results) - _MAX_NAMED} more"] if len(results) > _MAX_NAMED else []
    return ", ".join([*map(_in_short, results[:_MAX_NAMED]), *rest])


def _in_short(result: GateResult) -> str:
    if result.value is None or result.limit is None:
        return f"{result.name} ({result.reason})"
    bound = "at most" if result.bound == "at_most" else "at least"
    return f"{result.name} is {result.value:.5g} where the limit is {bound} {result.limit:.5g}"
