"""The contents of a report as text, for the terminal, Markdown, the page and the test results alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from qexport.amounts import counted, size
from qexport.artifact.figures import Figure, GateResult, Verdict
from qexport.artifact.manifest import Sizes
from qexport.artifact.measurements import Generations, PromptComparison
from qexport.artifact.report import Report
from qexport.reporting.selection import by_urgency, confirmation, distance, key_figures, sentence, worst_prompts
from qexport.reporting.values import (
    UNMEASURED,
    Piece,
    cut,
    figure_interval,
    figure_value,
    gate_interval,
    gate_limit,
    gate_units,
    gate_value,
    label_of,
    word_diff,
)

VERDICT_WORDS: Final[dict[Verdict, str]] = {"pass": "Passed", "fail": "Failed", "undecided": "Undecided"}

FEW_EQUAL: Final = (
    "Two texts part at the first token where the models choose otherwise, so few are equal even where both are good; "
    "decisive flips count the choices that were clear."
)
"""Said where half of the continuations or fewer are equal."""

_LONGEST_TEXT: Final = 2000


@dataclass(frozen=True)
class GateRow:
    """A gate and its decision.

    Attributes:
        result: the gate.
        word: the verdict, for example `passed`.
        value: the measured value, or a dash.
        interval: the interval that decided.
        tolerance: the limit, with its unit.
        units: how much was measured, for example `24 windows`.
    """

    result: GateResult
    word: str
    value: str
    interval: str
    tolerance: str
    units: str


@dataclass(frozen=True)
class FigureRow:
    """A figure.

    Attributes:
        label: what it is.
        value: with its unit.
        interval: the 95 % confidence interval without a unit, or a dash.
        units: how much was measured, for example `24 windows`.
    """

    label: str
    value: str
    interval: str
    units: str

    @property
    def whole(self) -> str:
        """The value, with its interval if it has one."""
        return self.value if self.interval == UNMEASURED else f"{self.value} {self.interval}"


@dataclass(frozen=True)
class SizeView:
    """How large the artifact is.

    Attributes:
        total: the bytes of its tensors.
        reference: the bytes of the merged model's tensors.
        share: total divided by reference, in percent.
        bits: bits per weight, with scales and unquantized layers, without a unit.
    """

    total: str
    reference: str
    share: str
    bits: str

    @property
    def bits_per_weight(self) -> str:
        """The bits per weight with their unit."""
        return f"{self.bits} bits per weight"


@dataclass(frozen=True)
class PromptView:
    """The continuations of one prompt, as pieces that both have and that only one has."""

    comparison: PromptComparison
    reference: list[Piece]
    artifact: list[Piece]


@dataclass(frozen=True)
class Summary:
    """A report in short.

    Attributes:
        name: the artifact's.
        how: its method and size.
        verdict: the verdict over all gates.
        word: the same, for example `Passed`.
        sentence: the reason for the verdict.
        distance: whose limits hold, and how far the nearest one is; empty where no limit is.
        confirmation: which programs have computed the artifact, and which have not.
        gates: failed ones first.
        figures: the key figures, over all text.
        few_equal: whether half of the continuations or fewer are equal, which needs `FEW_EQUAL` beside it.
        prompts: the prompt whose continuations differ most, with long texts cut; empty if none differ.
    """

    name: str
    how: str
    verdict: Verdict
    word: str
    sentence: str
    distance: str
    confirmation: str
    gates: list[GateRow]
    figures: list[FigureRow]
    few_equal: bool
    prompts: list[PromptView]


def summarize(report: Report) -> Summary:
    """The short form of a report, for a terminal or a comment on a pull request."""
    sizes = size_view(report.subject.sizes, report.subject.reference_bytes)
    return Summary(
        name=report.subject.name,
        how=f"{report.subject.method}, {sizes.total}, {sizes.bits_per_weight}",
        verdict=report.verdict,
        word=VERDICT_WORDS[report.verdict],
        sentence=sentence(report),
        distance=distance(report),
        confirmation=confirmation(report),
        gates=gate_rows(report.gates),
        figures=[figure_row(figure) for figure in key_figures(report)],
        few_equal=report.generations is not None
        and few_equal(report.generations.identical, report.generations.prompts),
        prompts=[prompt_view(each, _LONGEST_TEXT) for each in worst_prompts(report)[:1]],
    )


def gate_rows(gates: Iterable[GateResult]) -> list[GateRow]:
    """A row for each gate, failed ones first, then undecided ones."""
    return [gate_row(gate) for gate in by_urgency(gates)]


def gate_row(gate: GateResult) -> GateRow:
    """The texts of a gate."""
    return GateRow(
        result=gate,
        word=VERDICT_WORDS[gate.verdict].lower(),
        value=gate_value(gate),
        interval=gate_interval(gate),
        tolerance=gate_limit(gate),
        units=gate_units(gate),
    )


def figure_row(figure: Figure) -> FigureRow:
    """The texts of a figure."""
    return FigureRow(
        label=label_of(figure.name),
        value=figure_value(figure),
        interval=figure_interval(figure),
        units=counted(figure.n, figure.unit),
    )


def size_view(sizes: Sizes, reference_bytes: int) -> SizeView:
    """An artifact's size beside the merged model's."""
    return SizeView(
        total=size(sizes.total_bytes),
        reference=size(reference_bytes),
        share=share(sizes.total_bytes, reference_bytes),
        bits=f"{sizes.bits_per_weight:.2f}",
    )


def share(part: int, whole: int) -> str:
    """The share in percent; a dash if the whole is 0."""
    return f"{part / whole:.0%}" if whole else UNMEASURED


def few_equal(equal: int, prompts: int) -> bool:
    """Whether half of the continuations or fewer are equal."""
    return 2 * equal <= prompts


def equal_texts(generations: Generations) -> str:
    """How many greedy continuations are equal, and what that says."""
    equal, prompts = generations.identical, generations.prompts
    found = (
        f"{equal} of {counted(prompts, 'greedy continuation')} {'is' if equal == 1 else 'are'} equal, of at most "
        f"{counted(generations.max_new_tokens, 'token')}."
    )
    return f"{found} {FEW_EQUAL}" if few_equal(equal, prompts) else found


def prompt_view(comparison: PromptComparison, longest: int | None = None) -> PromptView:
    """Both continuations as pieces.

    Args:
        comparison: the two continuations.
        longest: how many characters of each to show; None for all.
    """
    texts: Sequence[str] = (comparison.reference, comparison.artifact)
    if longest is not None:
        texts = [cut(text, longest) for text in texts]
    return PromptView(comparison, *word_diff(*texts))
