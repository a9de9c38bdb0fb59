"""The progress of stages. They call a `ProgressCallback`; the command line shows what it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["load", "merge", "prepare", "calibrate", "quantize", "export", "verify"]


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
