"""Measuring on as many windows as the gates need: more are added until each is decided or the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final, Literal, cast

from torch import Tensor

from qexport.architectures.runner import BlockRunner
from qexport.artifact.figures import GateResult
from qexport.execution.inline import INLINE
from qexport.execution.workers import Execution, WorkerLostError, begun_anew
from qexport.progress import Notice, Steps
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.kept import NOTHING_KEPT, Kept, KeptStates, digest_of
from qexport.verifying.layer_inputs import LayerInputs
from qexport.verifying.lockstep import Lockstep
from qexport.verifying.predictors import most_windows_at_once, windows_at_once
from qexport.verifying.window_share import WindowRunner

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


@dataclass(frozen=True)
class Models:
    """The models that run side by side.

    Attributes:
        reference: the merged model.
        artifact: the artifact, block by block, or as a graph that can only be run whole.
        nearest: the merged model rounded to nearest on the artifact's grids.
        base: the model without the adapter.
        inputs: gets what the reference's layers receive; None if nobody wants it.
    """

    reference: BlockRunner
    artifact: BlockRunner | WindowRunner
    nearest: BlockRunner | None = None
    base: BlockRunner | None = None
    inputs: LayerInputs | None = None

    @property
    def named(self) -> dict[str, BlockRunner | WindowRunner]:
        """Those that there are, the reference first."""
        own = {"reference": self.reference, "artifact": self.artifact, "nearest": self.nearest, "base": self.base}
        return {name: model for name, model in own.items() if model is not None}


@dataclass(frozen=True)
class Look:
    """What was measured on the windows before one look at the gates.

    Attributes:
        windows: how many.
        parts: the tokens of each comparison.
        block_drift: see `Lockstep.run`. Empty if the artifact does not run block by block.
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


@dataclass(frozen=True)
class KeptWindows:
    """What the comparisons of other artifacts with the same reference have left, and this one leaves.

    Attributes:
        kept: the files.
        nearest: JSON values that tell the model rounded to nearest from others: the grids.
        reads_reference: whether the reference need not be run for what its layers receive, see `LayerInputs`.
    """

    kept: Kept = NOTHING_KEPT
    nearest: Any = None
    reads_reference: bool = True

    def states(self, model: str, windows: Tensor, depth: int, *, each_block: bool) -> KeptStates | None:
        """Of the models that are the same for all artifacts.

        Args:
            model: its name in `Models`.
            windows: int64 [windows, sequence_length].
            depth: the number of blocks.
            each_block: whether the states after each block are needed, not only those after the last.
        """
        if not self.kept.keeps or model not in {"reference", "base"}:
            return None
        each_block = each_block and model == "reference"
        blocks = range(depth) if each_block else [depth - 1]
        found = KeptStates(self.kept, model, windows, windows_at_once(windows.shape[1]), blocks)
        must_run = each_block and found.complete and not self.reads_reference
        return None if must_run else found

    def figures(self, comparison: Comparison, windows: Tensor) -> TokenFigures | None:
        """Those of a comparison without the artifact; None if they were not kept."""
        found = self.kept.tensors("figures", self._key(comparison, windows))
        return None if found is None else TokenFigures(**found)

    def keep_figures(self, comparison: Comparison, windows: Tensor, figures: TokenFigures) -> None:
        """Keeps them."""
        tensors = {each.name: getattr(figures, each.name) for each in fields(figures)}
        self.kept.keep_tensors("figures", self._key(comparison, windows), tensors)

    def _key(self, comparison: Comparison, windows: Tensor) -> Any:
        of = self.nearest if comparison == "nearest" else None
        return {"comparison": comparison, "windows": digest_of(windows), "of": of}


NO_KEPT_WINDOWS: Final = KeptWindows()

_WITHOUT_ARTIFACT: Final[Sequence[Comparison]] = ("nearest", "base")
"""Comparisons that are the same for all artifacts on the same grids."""


@dataclass
class Measured:
    """What has been measured so far.

    Attributes:
        parts: the tokens of each comparison, one part per look.
        indices: the windows of each comparison; the artifact has all of them.
        looks: how many windows had been measured at each look.
        block_drift: of the first look, see `Lockstep.run`. Empty if the artifact does not run block by block.
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
    kept: KeptWindows = NO_KEPT_WINDOWS,
    execution: Execution = INLINE,
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
        kept: what need not be computed again for other artifacts.
        execution: the workers, to which the windows of a look are dealt out.

    Raises:
        WorkerLostError: workers went in each attempt at a look.
    """
    found, gates, earlier = Measured(), list[GateResult](), iter(looks.earlier)
    with closing(Lockstep(execution, models.named)) as lockstep:
        work = _Work(models, lockstep, steps, kept)
        for first, last in looks_at(len(input_ids), first_look):
            look = next(earlier, None)
            if look is None:
                look = work.attempted(_taking_part(models, gates, first=not first), input_ids[first:last], first)
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


def _taking_part(models: Models, gates: Sequence[GateResult], *, first: bool) -> list[str]:
    """The models of the next look; `gates` are those of the look before."""
    open_figures = {gate.figure for gate in gates if gate.verdict == "undecided"}
    return [name for name in models.named if name not in _RIVAL_FIGURES or first or _RIVAL_FIGURES[name] & open_figures]


def _pairs(names: Sequence[str]) -> dict[Comparison, tuple[str, str]]:
    """The reference and the artifact of each comparison of these models."""
    pairs: dict[Comparison, tuple[str, str]] = {"artifact": ("reference", "artifact")}
    if "nearest" in names:
        pairs["nearest"] = ("reference", "nearest")
    if "base" in names:
        pairs |= {"base": ("reference", "base"), "artifact_from_base": ("base", "artifact")}
    return pairs


@dataclass(frozen=True)
class _Work:
    """What looks are made with."""

    models: Models
    lockstep: Lockstep
    steps: Steps
    kept: KeptWindows

    def attempted(self, names: Sequence[str], input_ids: Tensor, before: int) -> Look:
        """Measures windows with some of the models. If a worker goes meanwhile, all begin these windows anew.

        Args:
            names: of the models.
            input_ids: int64 [windows, sequence_length].
            before: windows that have been measured before.
        """

        def renew(error: WorkerLostError) -> None:
            self.steps.progress(Notice(f"{error.what}; its windows begin anew"))
            self.lockstep.renew()

        return begun_anew(partial(self._look, names, input_ids, before), renew)

    def _look(self, names: Sequence[str], input_ids: Tensor, before: int) -> Look:
        all_pairs = _pairs(names)
        parts = {
            name: own for name in _WITHOUT_ARTIFACT if name in all_pairs and (own := self.kept.figures(name, input_ids))
        }
        running = [name for name in names if name != "nearest" or "nearest" not in parts]
        pairs = {name: pair for name, pair in _pairs(running).items() if name not in parts}
        drift = self._through_blocks(running, input_ids, drift=not before)
        measured = cast(
            dict[Comparison, TokenFigures],
            self.lockstep.figures(
                cast(dict[str, tuple[str, str]], pairs),
                lambda done: self.steps.finished(f"predictions in {before + done} windows"),
            ),
        )
        for name in _WITHOUT_ARTIFACT:
            if name in measured:
                self.kept.keep_figures(name, input_ids, measured[name])
        parts |= measured
        return Look(len(input_ids), {name: parts[name] for name in all_pairs}, drift)

    def _through_blocks(self, names: Sequence[str], input_ids: Tensor, *, drift: bool) -> list[float]:
        """Runs the models that run block by block; returns the artifact's drift after each block."""
        windows, length = input_ids.shape
        counts = {name: _windows_of(name, windows, length) for name in names if name in self.lockstep.by_blocks}
        drift = drift and "artifact" in counts
        depth = len(self.models.reference.structure.blocks)
        through = f"text through {len(counts)} models" if len(counts) > 1 else "text through the reference"
        self.steps.expect(depth + math.ceil(windows / windows_at_once(length)))
        self.lockstep.begin(input_ids, counts, lambda name, own: self.kept.states(name, own, depth, each_block=drift))
        return self.lockstep.run(
            lambda block: self.steps.finished_block(through, block, depth, sum(counts.values()) * length),
            drift=drift,
            inputs=self.models.inputs,
        )


def _windows_of(model: str, windows: int, length: int) -> int:
    """Reference and artifact run all windows of a look, rivals the first ones: as many whatever memory there is."""
    if model not in _RIVAL_FIGURES:
        return windows
    at_once = most_windows_at_once(length)
    return min(windows, math.ceil(_RIVAL_WINDOWS / at_once) * at_once)
