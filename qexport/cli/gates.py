"""Gates at the terminal: a table of all, and the error of those that did not pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qexport.cli.failures import Failure
from qexport.errors import GateFailed, GateUndecided
from qexport.reporting.units import counted

if TYPE_CHECKING:
    from qexport.artifact.figures import GateResult

_STYLES: Final = {"pass": "green", "fail": "bold red", "undecided": "yellow"}


def gates_shown(results: Sequence[GateResult]) -> RenderableType:
    """A row for each gate, and below the reason of each one that did not pass."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("gate", style="bold", overflow="fold", min_width=20)
    for name in ("value", "interval", "limit", "n"):
        table.add_column(name, justify="right")
    table.add_column("verdict", no_wrap=True)
    for each in results:
        verdict = Text(each.verdict, _STYLES[each.verdict])
        n = f"{each.n} {each.unit}s" if each.unit else ""
        table.add_row(Text(each.name), _number(each.value), _interval(each), _limit(each), n, verdict)
    reasons = (
        Text.assemble((f"{each.name} ", _STYLES[each.verdict]), each.reason) for each in results if not each.passed
    )
    return Group(table, "", *reasons)


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
        mend = "try more bits or a smaller group_size, or loosen the limit where the use allows it"
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


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _interval(result: GateResult) -> str:
    return "" if result.low is None or result.high is None else f"{result.low:.5g} to {result.high:.5g}"


def _limit(result: GateResult) -> str:
    if result.limit is None:
        return ""
    return f"{'≤' if result.bound == 'at_most' else '≥'} {result.limit:.5g}"
