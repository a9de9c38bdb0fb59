"""The progress of stages. They call a `ProgressCallback`; the command line shows what it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["load", "merge", "prepare", "calibrate", "quantize", "export", "verify", "publish", "fetch"]


@dataclass(frozen=True)
class Progress:
    """One step of a stage.

    Attributes:
        stage: the running stage.
        done: units finished so far, 0 to total.
        total: units of the whole stage; 0 if not known.
        unit: what is counted, for example "block" or "window".
        detail: a few words on the step, for example "loss 0.021" (may be empty).
        tokens: tokens that went through the model in this stage so far.
    """

    stage: Stage
    done: int
    total: int
    unit: str
    detail: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Notice:
    """Something that a user should know and that does not stop the run, for example a base of another name."""

    text: str


ProgressCallback = Callable[[Progress | Notice], None]


def silent(event: Progress | Notice) -> None:
    """Ignores every event."""


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

    def finished_block(self, what: str, number: int, blocks: int, tokens: int) -> None:
        """Counts one finished block of those that something goes through."""
        self.finished(f"{what}, block {number} of {blocks}", tokens)

    def _notify(self, detail: str) -> None:
        self.progress(Progress(self.stage, self.done, max(self.total, self.done), "step", detail, self.tokens))
