"""What was measured through the runtimes that an artifact's users have, for the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from qexport.artifact.figures import CheckResult, Figure, GateResult, Verdict, overall
from qexport.artifact.measurements import Pace
from qexport.records import Record, added

Scored = Literal["vocabulary", "token", "nothing"]
"""What a runtime gives for a prompt: the log-probabilities of the whole vocabulary, of each of the prompt's own tokens,
or none at all."""

_THROUGH = " through "


class RuntimeFacts(Record):
    """A runtime, as it describes itself."""

    name: str

    version: str
    """`unknown` if an endpoint does not tell it."""

    kernels: dict[str, int]
    """How many layers each class of kernel computes; a graph's execution providers. Empty if it cannot be known."""

    dtype: str
    """What it computes in: as it says, else as the recipe says."""

    arguments: dict[str, str]
    """What it was started with; of an endpoint what it tells of itself."""


class ServedRecord(Record):
    """An artifact, as a runtime computes it."""

    label: str
    """The entry of `verify.through`; the gates of this runtime end in it."""

    runtime: RuntimeFacts
    scored: Scored
    figures: list[Figure]
    """Against the reference, by the names of the figures that our own reader gives; those against our own float32
    reading of the same files begin with `fidelity_`."""

    checks: list[CheckResult] = []
    """Of an endpoint: whether it makes the same tokens of a text."""

    fidelity_limit: float | None
    """The largest `fidelity_kl` that passes, if the recipe sets no other; None where activations are rounded, since two
    computations of such a model are as far from each other as from the reference."""

    compares_drift: bool = False
    """Whether `kl_over_reading` has a limit, if the recipe sets no other: where activations are rounded."""

    notes: list[str]
    """What could not be measured, and why."""

    speed: Pace | None = added()
    """The runtime beside the reference in transformers; its ratios are among the figures. Absent if not measured."""


def through(name: str, label: str) -> str:
    """The name of a gate on what a runtime computes."""
    return f"{name}{_THROUGH}{label}"


def is_through(gate: GateResult) -> bool:
    """Whether a gate is on what a runtime computes."""
    return _THROUGH in gate.name


def verdict_through(label: str, gates: Iterable[GateResult]) -> Verdict:
    """The verdict over the gates of a runtime; `undecided` without any."""
    own = [gate.verdict for gate in gates if gate.name.endswith(through("", label))]
    return overall(own) if own else "undecided"


def confirmation(record: ServedRecord, gates: Iterable[GateResult]) -> Verdict:
    """The verdict over the gates of a runtime; one that has scored nothing confirms nothing, whatever it tokenizes."""
    verdict = verdict_through(record.label, gates)
    return "undecided" if verdict == "pass" and record.scored == "nothing" else verdict


def confirming(served: Sequence[ServedRecord], gates: Sequence[GateResult]) -> list[str]:
    """The runtimes that compute what was verified, each with its version."""
    return [
        f"{each.label} ({each.runtime.name} {each.runtime.version})"
        for each in served
        if confirmation(each, gates) == "pass"
    ]
