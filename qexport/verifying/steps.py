"""Progress of a verification, whose length is not known before its gates are decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qexport.progress import Progress, ProgressCallback


@dataclass
class Steps:
    """Blocks, batches of predictions, continuations: whatever is counted as one step.

    Attributes:
        report: is told of each.
        stage: `prepare` before anything is quantized, `verify` after it.
        total: steps that are expected so far.
        done: steps that are finished.
        tokens: that went through the models in them.
    """

    report: ProgressCallback
    stage: Literal["prepare", "verify"] = "verify"
    total: int = 0
    done: int = 0
    tokens: int = 0

    def expect(self, count: int) -> None:
        """More steps will come."""
        self.total += count
        self._tell("")

    def finished(self, detail: str, tokens: int = 0) -> None:
        """One step is done."""
        self.done += 1
        self.tokens += tokens
        self._tell(detail)

    def _tell(self, detail: str) -> None:
        self.report(Progress(self.stage, self.done, max(self.total, self.done), "step", detail, self.tokens))
