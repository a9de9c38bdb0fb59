"""What gates that did not pass are called in an error, and what may help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qexport.amounts import counted
from qexport.artifact.figures import CATALOGUE, GateResult
from qexport.artifact.served import is_through
from qexport.errors import GateFailed, GateUndecided
from qexport.gates.baseline import PAIRED

_MAX_NAMED: Final = 12
_MEND_OF_LIMITS: Final = "try more bits or a smaller group_size, or loosen the limit where the use allows it"
_MEND_OF_BASELINE: Final = (
    "keep the release that is in production, or quantize again with more bits or other calibration text"
)
_MEND_OF_RUNTIMES: Final = (
    "the runtime does not compute what was verified: check that it serves this very folder, and which kernels it takes"
)
_MEND: Final = {
    "config": "correct config.json so that it describes the reference's model",
    "files": "copy these files from the base",
    "tokenizer": "copy the tokenizer's files from the base",
    "weights": "quantize and export the model again; if the artifact came from elsewhere, fetch it again",
    "graph": "export the model again: this graph does not use its attention mask or its cache correctly",
    "merge": "check that the adapter was made for this base",
    "adapter": "check that the artifact was made with this adapter",
    "adapter_strength": "merge with the adapter's own alpha and rank, once",
    "better_than_rtn": "calibrate with more or other text, or check that the artifact was made from this reference",
}


def gates_error(results: Sequence[GateResult], where: str) -> GateFailed | GateUndecided | None:
    """The error if not every gate passed: `GateFailed` if one failed, else `GateUndecided`; None if all passed.

    Args:
        results: of all gates.
        where: the artifact or the report of these gates.
    """
    failed = [each for each in results if each.verdict == "fail"]
    undecided = [each for each in results if each.verdict == "undecided"]
    if failed:
        mend = "; ".join(dict.fromkeys(_mend(each) for each in failed))
        return GateFailed(f"{counted(len(failed), 'gate')} failed: {_named(failed)}", where=where, mend=mend)
    if undecided:
        return GateUndecided(
            f"{counted(len(undecided), 'gate')} could not be decided: {_named(undecided)}",
            where=where,
            mend="verify with more windows, or loosen or remove limits on what cannot be measured",
        )
    return None


def _mend(result: GateResult) -> str:
    if is_through(result) or (result.figure is not None and CATALOGUE[result.figure].served):
        return _MEND_OF_RUNTIMES
    if result.figure in PAIRED:
        return _MEND_OF_BASELINE
    return _MEND.get(result.name, _MEND_OF_LIMITS)


def _named(results: Sequence[GateResult]) -> str:
    rest = [f"and {len(results) - _MAX_NAMED} more"] if len(results) > _MAX_NAMED else []
    return ", ".join([*map(_in_short, results[:_MAX_NAMED]), *rest])


def _in_short(result: GateResult) -> str:
    if result.value is None or result.limit is None:
        return f"{result.name} ({result.reason})"
    bound = "at most" if result.bound == "at_most" else "at least"
    return f"{result.name} is {result.value:.5g} where the limit is {bound} {result.limit:.5g}"
