"""Progress of a verification, whose length is not known until its gates are decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qexport.progress import Progress, ProgressCallback


@dataclass
class Steps:
    """Counts the steps: blocks, batches of predictions, continuations.

    Attributes:
        progress: is called with each step.
        stage: `prepare` before anything is quantized, `verify` after it.
        total: steps that are expected so far.
        done: steps that are finished.
        tokens: how many went through the models in the finished steps.
    """

    progress: ProgressCallback
    stage: Literal["prepare", "verify"] = "verify"
    total: int = 0
    done: int = 0
    tokens: int = 0

    def expect(self, count: int) -> None:
        """Adds steps that will follow."""
        self.total += count
        self._notify("")

    def finished(self, detail: str, tokens: int = 0) -> None:
        """Counts one finished step."""
        self.done += 1
        self.tokens += tokens
        self._notify(detail)

    def _notify(self, detail: str) -> None:
        self.progress(Progress(self.stage, self.done, max(self.total, self.done), "step", detail, self.tokens))
