"""The result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qexport.artifact.figures import GateResult, Verdict
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.errors import GateFailed, GateUndecided, QexportError
from qexport.gates.failures import gates_error


@dataclass(frozen=True)
class UnprovenMerge:
    """A merge that is not what PEFT makes of the adapter, or that could not be compared with it.

    Attributes:
        gate: the gate `merge`.
        error: the same as an exception.
    """

    gate: GateResult
    error: GateFailed | GateUndecided


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        folder: the published folder, or the one set aside if a gate did not pass; None if the merge is unproven, since
            then nothing was quantized.
        manifests: the manifest of each layout's folder, by the layout's name, in the recipe's order.
        reports: the report of each layout's folder; empty if the recipe has no `verify`.
        verdict: the verdict over all gates.
        unproven_merge: why nothing was quantized; None if the run was completed.
        roots: the root digest of each layout's folder, which stands for all of its files; also in `<folder>.sha256`.
    """

    folder: Path | None
    manifests: Mapping[str, Manifest]
    reports: Mapping[str, Report]
    verdict: Verdict
    unproven_merge: UnprovenMerge | None = None
    roots: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return self.verdict == "pass"

    @property
    def artifact_path(self) -> Path:
        """The artifact's folder: the published one, or the one set aside if a gate did not pass.

        Raises:
            QexportError: nothing was quantized.
        """
        self._refuse_empty()
        assert self.folder is not None
        return self.folder

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first layout.

        Raises:
            QexportError: nothing was quantized.
        """
        self._refuse_empty()
        return next(iter(self.manifests.values()))

    @property
    def report(self) -> Report:
        """The report of the first layout.

        Raises:
            QexportError: nothing was measured.
        """
        self._refuse_empty()
        if not self.reports:
            raise QexportError("nothing was measured", mend="give `verify`")
        return next(iter(self.reports.values()))

    @property
    def gates(self) -> list[GateResult]:
        """The results of all gates. If the layouts differ in a gate, the result is one that did not pass."""
        if self.unproven_merge is not None:
            return [self.unproven_merge.gate]
        found: dict[str, GateResult] = {}
        for report in self.reports.values():
            for gate in report.gates:
                if gate.name not in found or not gate.passed:
                    found[gate.name] = gate
        return list(found.values())

    def raise_for_verdict(self) -> None:
        """Raises unless every gate passed.

        Raises:
            GateFailed: a gate failed.
            GateUndecided: no gate failed, and one could not be decided.
        """
        if self.unproven_merge is not None:
            raise self.unproven_merge.error
        error = gates_error(self.gates, f"{self.artifact_path} (set aside, not published)")
        if error is not None:
            raise error

    def _refuse_empty(self) -> None:
        if self.unproven_merge is not None:
            raise QexportError("nothing was quantized, since the merge is unproven") from self.unproven_merge.error
