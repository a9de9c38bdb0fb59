"""Measuring on as many windows as the gates need: more are added until each is decided or the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from torch import Tensor

from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import GateResult
from qexport.progress import Steps
from qexport.verifying.divergence import Pair, TokenFigures, compare
from qexport.verifying.predictors import Predictor, most_windows_at_once, predictors, run_in_lockstep, windows_at_once

Comparison = Literal["artifact", "nearest", "base", "artifact_from_base"]
"""What is compared with the reference; `artifact_from_base` is the artifact compared with the base."""

_GROWTH: Final = 2
"""The factor by which the windows grow from one look at the gates to the next."""

_RIVAL_WINDOWS: Final = 16
"""Windows of a look that rivals run, rounded up to whole batches: they differ by more than the artifact does."""

_RIVAL_GATES: Final[Mapping[str, str]] = {"nearest": "better_than_rtn", "base": "adapter"}
"""The gate that a rival is run for. Once it is decided, the rival is not run again."""


class WindowRunner(Protocol):
    """A model that computes the logits of windows, without access to its hidden states."""

    def predictor(self, input_ids: Tensor) -> AbstractContextManager[Predictor]:
        """Its predictions in windows [windows, sequence_length], valid within the context."""
        ...


@dataclass(frozen=True)
class Models:
    """The models that run side by side.

    Attributes:
        reference: the merged model.
        artifact: the artifact, block by block, or as a graph that can only be run whole.
        nearest: the merged model rounded to nearest on the artifact's grids.
        base: the model without the adapter.
    """

    reference: BlockRunner
    artifact: BlockRunner | WindowRunner
    nearest: BlockRunner | None = None
    base: BlockRunner | None = None


@dataclass
class Measured:
    """What has been measured so far.

    Attributes:
        parts: the tokens of each comparison, one part per look.
        indices: the windows of each comparison; the artifact has all of them.
        looks: how many windows had been measured at each look.
        block_drift: of the first look, see `run_in_lockstep`. Empty if the artifact does not run block by block.
    """

    parts: dict[Comparison, list[TokenFigures]] = field(default_factory=dict)
    indices: dict[Comparison, list[int]] = field(default_factory=dict)
    looks: list[int] = field(default_factory=list)
    block_drift: list[float] = field(default_factory=list)

    @property
    def windows(self) -> int:
        """The number of windows measured so far."""
        return self.looks[-1] if self.looks else 0

    def tokens(self) -> dict[Comparison, TokenFigures]:
        """The tokens of each comparison, over its windows."""
        return {name: TokenFigures.joined(parts) for name, parts in self.parts.items()}


def measure(
    models: Models,
    input_ids: Tensor,
    first_look: int,
    decide: Callable[[Measured], Sequence[GateResult]],
    wants_more: Callable[[Sequence[GateResult]], bool],
    steps: Steps,
) -> Measured:
    """Runs the models over the windows until the gates are decided.

    Args:
        models: what to run.
        input_ids: int64 [windows, sequence_length], as many as may be used.
        first_look: windows before the first look at the gates; their number doubles from look to look.
        decide: decides the gates from what has been measured so far.
        wants_more: whether more windows could decide them.
        steps: counts the steps.
    """
    found, gates = Measured(), list[GateResult]()
    for first, last in _looks(len(input_ids), first_look):
        _look(_taking_part(models, gates), input_ids[first:last], found, steps)
        gates = list(decide(found))
        if not wants_more(gates):
            break
    return found


def _looks(windows: int, first_look: int) -> Iterator[tuple[int, int]]:
    first, last = 0, min(windows, first_look)
    while first < windows:
        yield first, last
        first, last = last, min(windows, _GROWTH * last)


def _taking_part(models: Models, gates: Sequence[GateResult]) -> dict[str, BlockRunner | WindowRunner]:
    """The models of the next look. `gates` is empty before the first one."""
    decided = {gate.name for gate in gates if gate.verdict != "undecided"}
    rivals = {"nearest": models.nearest, "base": models.base}
    chosen: dict[str, BlockRunner | WindowRunner] = {"reference": models.reference, "artifact": models.artifact}
    return chosen | {
        name: runner for name, runner in rivals.items() if runner is not None and _RIVAL_GATES[name] not in decided
    }


def _pairs(names: Sequence[str]) -> dict[Comparison, Pair]:
    pairs: dict[Comparison, Pair] = {"artifact": (0, 1)}
    if "nearest" in names:
        pairs["nearest"] = (0, names.index("nearest"))
    if "base" in names:
        base = names.index("base")
        pairs |= {"base": (0, base), "artifact_from_base": (base, 1)}
    return pairs


def _look(models: Mapping[str, BlockRunner | WindowRunner], input_ids: Tensor, found: Measured, steps: Steps) -> None:
    """Measures further windows and adds them to `found`."""
    pairs = _pairs(list(models))
    with _predictors(models, input_ids, found, steps) as predicting:
        figures = compare(
            predicting,
            list(pairs.values()),
            input_ids,
            lambda done: steps.finished(f"predictions in {found.windows + done} windows"),
        )
    for name, own in zip(pairs, figures, strict=True):
        found.parts.setdefault(name, []).append(own)
        found.indices.setdefault(name, []).extend(range(found.windows, found.windows + len(own.kl)))
    found.looks.append(found.windows + len(input_ids))


@contextmanager
def _predictors(
    models: Mapping[str, BlockRunner | WindowRunner], input_ids: Tensor, found: Measured, steps: Steps
) -> Iterator[list[Predictor]]:
    """Runs the models that run block by block, and yields every model's predictions, in the order of `models`."""
    runners = {name: model for name, model in models.items() if isinstance(model, BlockRunner)}
    windows, length = input_ids.shape
    counts = [_windows_of(name, windows, length) for name in runners]
    blocks, label = list(runners.values()), f"{len(runners)} models" if len(runners) > 1 else "the reference"
    steps.expect(len(blocks[0].structure.blocks) + math.ceil(windows / windows_at_once(length)))
    batches, drift = run_in_lockstep(
        blocks,
        input_ids,
        lambda block: steps.finished(f"block {block} of {label}", sum(counts) * length),
        windows=counts,
        drift="artifact" in runners,
    )
    found.block_drift = found.block_drift or drift
    with ExitStack() as stack:
        ready = dict(zip(runners, stack.enter_context(predictors(blocks, batches)), strict=True))
        for name, model in models.items():
            if not isinstance(model, BlockRunner):
                ready[name] = stack.enter_context(model.predictor(input_ids))
        yield [ready[name] for name in models]


def _windows_of(model: str, windows: int, length: int) -> int:
    """Reference and artifact run all windows of a look, rivals the first ones: as many whatever memory there is."""
    if model not in _RIVAL_GATES:
        return windows
    at_once = most_windows_at_once(length)
    return min(windows, math.ceil(_RIVAL_WINDOWS / at_once) * at_once)
