"""The suites of a report as pages show them: counts of answers, and the answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qexport.artifact.answers import Answer, Answers
from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.report import Report
from qexport.reporting.values import UNMEASURED, Piece, word_diff
from qexport.reporting.view import FigureRow, figure_row

SHOWN: Final = 8
"""Changed answers of a suite that are shown in full."""

HEAD: Final = ("suite", "prompts", "reference", "artifact", "only reference", "only artifact", "McNemar's p")
"""The columns of `count_rows`."""

NUMBERS: Final = (1, 2, 3, 4, 5, 6)
"""Those that hold numbers."""


@dataclass(frozen=True)
class ChangedAnswer:
    """An answer that was judged differently, as pieces that both texts have and that only one has."""

    answer: Answer
    reference: list[Piece]
    artifact: list[Piece]


@dataclass(frozen=True)
class SuiteView:
    """One suite.

    Attributes:
        name: the field of the report, and of the recipe's `verify`.
        title: for people.
        meaning: what is counted, and how.
        yes: the word for an answer that is counted.
        no: the word for another one.
        answers: as the report has them.
        figures: those of the suite, with their rows.
        changed: the answers to show.
    """

    name: str
    title: str
    meaning: str
    yes: str
    no: str
    answers: Answers
    figures: Sequence[tuple[Figure, FigureRow]]
    changed: Sequence[ChangedAnswer]

    @property
    def count_rows(self) -> list[list[str]]:
        """One row for each kind of prompts, without escapes."""
        return [
            [
                f"{self.title.lower()}, {each.kind}",
                f"{each.prompts:,}",
                f"{each.reference:,} {self.yes}",
                f"{each.artifact:,} {self.yes}",
                f"{each.only_reference:,}",
                f"{each.only_artifact:,}",
                f"{each.p_value:.2g}",
            ]
            for each in self.answers.counts
        ]


_FORMATS: Final = (
    "formats",
    "Formats",
    "An answer is valid if its JSON fits the schema, its call fits one of the tools, or its Python code parses.",
    "valid",
    "not valid",
    "format_",
)

_REFUSALS: Final = (
    "refusals",
    "Refusals",
    "A refusal is found by phrases at the beginning of an answer, which miss some and mistake others.",
    "refused",
    "not refused",
    "refusal_",
)

_NEEDLES: Final = (
    "needles",
    "Facts recalled from long texts",
    "One fact is inside a generated text of so many tokens; an answer recalls it if it has the fact's number.",
    "recalled",
    "not recalled",
    "recall_",
)

_SUITES: Final = (_FORMATS, _REFUSALS, _NEEDLES)

SUITES: Final = tuple(name for name, *_ in _SUITES)
"""The fields of a report that hold answers."""


LENGTH_HEAD: Final = ("length or position", "KL divergence", "95% interval", "perplexity ratio", "same likeliest token",
                      "late against early", "n")  # fmt: skip
"""The columns of `length_rows`."""

_LENGTH_COLUMNS: Final = ("length_perplexity_ratio", "length_top1_agreement", "late_kl_over_early")


def length_rows(report: Report) -> list[list[str]]:
    """Drift by length, then by position in the longest windows, without escapes; empty if it was not measured."""
    found = []
    for figure in report.figures:
        if figure.name not in ("length_kl", "position_kl") or figure.domain is None:
            continue
        others = [find_figure(report.figures, name, figure.domain) for name in _LENGTH_COLUMNS]
        row, word = figure_row(figure), "length" if figure.name == "length_kl" else "positions"
        cells = [UNMEASURED if each is None else figure_row(each).value for each in others]
        found.append([f"{word} {figure.domain}", row.value, row.interval, *cells, row.units])
    return found


def suite_views(report: Report) -> list[SuiteView]:
    """The suites that were measured."""
    found = []
    for name, title, meaning, yes, no, prefix in _SUITES:
        answers: Answers | None = getattr(report, name)
        if answers is not None:
            figures = [(figure, figure_row(figure)) for figure in report.figures if figure.name.startswith(prefix)]
            changed = [
                ChangedAnswer(each, *word_diff(each.reference, each.artifact)) for each in answers.changed[:SHOWN]
            ]
            found.append(SuiteView(name, title, meaning, yes, no, answers, figures, changed))
    return found
