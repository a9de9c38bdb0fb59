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

_RIVAL_FIGURES: Final[Mapping[str, frozenset[str]]] = {
    "nearest": frozenset({"rtn_mean_kl", "kl_over_rtn"}),
    "base": frozenset({"adapter_effect", "kl_over_base", "adapter_strength_predictions"}),
}
"""What a rival is run for. Once all gates on these figures are decided, the rival is not run again."""


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


@dataclass(frozen=True)
class Look:
    """What was measured on the windows before one look at the gates.

    Attributes:
        windows: how many.
        parts: the tokens of each comparison.
        block_drift: see `run_in_lockstep`. Empty if the artifact does not run block by block.
    """

    windows: int
    parts: Mapping[Comparison, TokenFigures]
    block_drift: Sequence[float]


@dataclass(frozen=True)
class Looks:
    """The looks that an interrupted run has finished, and what keeps those of this run.

    Attributes:
        earlier: in their order.
        keep: is called with each further one.
    """

    earlier: Sequence[Look] = ()
    keep: Callable[[Look], None] = lambda _: None


NO_LOOKS: Final = Looks()


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

    def add(self, look: Look) -> None:
        """Adds further windows."""
        for name, own in look.parts.items():
            self.parts.setdefault(name, []).append(own)
            self.indices.setdefault(name, []).extend(range(self.windows, self.windows + len(own.kl)))
        self.block_drift = self.block_drift or list(look.block_drift)
        self.looks.append(self.windows + look.windows)

    def tokens(self) -> dict[Comparison, TokenFigures]:
        """The tokens of each comparison, over its windows."""
        return {name: TokenFigures.joined(parts) for name, parts in self.parts.items()}


def measure(
    models: Models,
    input_ids: Tensor,
    first_look: int,
    decide: Callable[[Measured], Sequence[GateResult]],
    wants_more: Callable[[Measured, Sequence[GateResult]], bool],
    steps: Steps,
    looks: Looks = NO_LOOKS,
) -> Measured:
    """Runs the models over the windows until the gates are decided.

    Args:
        models: what to run.
        input_ids: int64 [windows, sequence_length], as many as may be used.
        first_look: windows before the first look at the gates; their number doubles from look to look.
        decide: decides the gates from what has been measured so far.
        wants_more: whether more windows than those could decide them.
        steps: counts the steps.
        looks: those that need not be repeated.
    """
    found, gates, earlier = Measured(), list[GateResult](), iter(looks.earlier)
    for first, last in looks_at(len(input_ids), first_look):
        look = next(earlier, None)
        if look is None:
            look = _look(_taking_part(models, gates, first=not first), input_ids[first:last], found, steps)
            looks.keep(look)
        found.add(look)
        gates = list(decide(found))
        if not wants_more(found, gates):
            break
    return found


def looks_at(windows: int, first_look: int) -> Iterator[tuple[int, int]]:
    """The windows before each look at the gates, as first and last + 1; their number doubles from look to look."""
    first, last = 0, min(windows, first_look)
    while first < windows:
        yield first, last
        first, last = last, min(windows, _GROWTH * last)


def _taking_part(models: Models, gates: Sequence[GateResult], *, first: bool) -> dict[str, BlockRunner | WindowRunner]:
    """The models of the next look; `gates` are those of the look before."""
    rivals = {"nearest": models.nearest, "base": models.base}
    open_figures = {gate.figure for gate in gates if gate.verdict == "undecided"}
    chosen: dict[str, BlockRunner | WindowRunner] = {"reference": models.reference, "artifact": models.artifact}
    return chosen | {
        name: runner
        for name, runner in rivals.items()
        if runner is not None and (first or _RIVAL_FIGURES[name] & open_figures)
    }


def _pairs(names: Sequence[str]) -> dict[Comparison, Pair]:
    pairs: dict[Comparison, Pair] = {"artifact": (0, 1)}
    if "nearest" in names:
        pairs["nearest"] = (0, names.index("nearest"))
    if "base" in names:
        base = names.index("base")
        pairs |= {"base": (0, base), "artifact_from_base": (base, 1)}
    return pairs


def _look(models: Mapping[str, BlockRunner | WindowRunner], input_ids: Tensor, found: Measured, steps: Steps) -> Look:
    """Measures further windows than those in `found`."""
    pairs = _pairs(list(models))
    with _predictors(models, input_ids, steps) as (predicting, drift):
        figures = compare(
            predicting,
            list(pairs.values()),
            input_ids,
            lambda done: steps.finished(f"predictions in {found.windows + done} windows"),
        )
    return Look(len(input_ids), dict(zip(pairs, figures, strict=True)), drift)


@contextmanager
def _predictors(
    models: Mapping[str, BlockRunner | WindowRunner], input_ids: Tensor, steps: Steps
) -> Iterator[tuple[list[Predictor], list[float]]]:
    """Runs the models that run block by block, and yields every model's predictions, in the order of `models`, and the
    artifact's drift after each block.
    """
    runners = {name: model for name, model in models.items() if isinstance(model, BlockRunner)}
    windows, length = input_ids.shape
    counts = [_windows_of(name, windows, length) for name in runners]
    by_blocks = list(runners.values())
    depth = len(by_blocks[0].structure.blocks)
    through = f"text through {len(runners)} models" if len(runners) > 1 else "text through the reference"
    steps.expect(depth + math.ceil(windows / windows_at_once(length)))
    batches, drift = run_in_lockstep(
        by_blocks,
        input_ids,
        lambda block: steps.finished_block(through, block, depth, sum(counts) * length),
        windows=counts,
        drift="artifact" in runners,
    )
    with ExitStack() as stack:
        ready = dict(zip(runners, stack.enter_context(predictors(by_blocks, batches)), strict=True))
        for name, model in models.items():
            if not isinstance(model, BlockRunner):
                ready[name] = stack.enter_context(model.predictor(input_ids))
        yield [ready[name] for name in models], drift


def _windows_of(model: str, windows: int, length: int) -> int:
    """Reference and artifact run all windows of a look, rivals the first ones: as many whatever memory there is."""
    if model not in _RIVAL_FIGURES:
        return windows
    at_once = most_windows_at_once(length)
    return min(windows, math.ceil(_RIVAL_WINDOWS / at_once) * at_once)
