"""Selects and orders the contents of a report, in the same way for every output format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from qexport.amounts import counted
from qexport.artifact.figures import CheckResult, Figure, GateResult, Verdict, find_figure
from qexport.artifact.measurements import PromptComparison, WorstToken
from qexport.artifact.report import Report
from qexport.records import LayerRecord

WORST: Final = 5
"""How many tokens, prompts and layers are shown in full."""

KEY_FIGURES: Final = (
    "reference_perplexity",
    "artifact_perplexity",
    "perplexity_ratio",
    "mean_kl",
    "kl_p99",
    "top1_agreement",
    "decisive_flips",
    "identical_generations",
    "edit_distance",
    "format_validity_change",
    "recall_change",
    "speed_ratio",
    "first_token_ratio",
)
"""Figures over all text, shown where there is no room for every figure."""

IDENTITY_LABELS: Final = {
    "base_sha256": "base",
    "adapter_sha256": "adapter",
    "text_sha256": "held-out text",
    "prompts_sha256": "prompts",
    "tokenizer_sha256": "tokenizer",
    "template_sha256": "chat template",
}
"""Labels of the digests in `Identity`."""

_URGENCY: Final[dict[Verdict, int]] = {"fail": 0, "undecided": 1, "pass": 2}


def by_urgency(gates: Iterable[GateResult]) -> list[GateResult]:
    """Failed gates first, then undecided ones; otherwise in the report's order."""
    return sorted(gates, key=lambda gate: _URGENCY[gate.verdict])


def sentence(report: Report) -> str:
    """The reason for the verdict, in one sentence."""
    if not report.gates:
        return "No gate was set."
    total = counted(len(report.gates), "gate")
    parts = []
    for verdict, word in (("fail", "failed"), ("undecided", "undecided")):
        names = [gate.name for gate in report.gates if gate.verdict == verdict]
        if names:
            parts.append(f"{len(names)} of {total} {word}: {', '.join(names)}")
    if parts:
        return f"{'; '.join(parts)}."
    return "The only gate passed." if len(report.gates) == 1 else f"All {total} passed."


def distance(report: Report) -> str:
    """Whose limits hold, and which gate is nearest to its limit, in one or two sentences."""
    parts = []
    if report.profile is not None:
        parts.append(f"Limits of the profile {report.profile.name}{', strict' if report.profile.strict else ''}.")
    measured = [(gate.room, gate) for gate in report.gates if gate.room is not None and gate.limit is not None]
    if measured:
        room, gate = min(measured, key=lambda each: each[0])
        left = f"{room:.0%} of what it allows is left" if room >= 0 else f"over it by {-room:.0%} of what it allows"
        parts.append(f"Nearest to its limit: {gate.name}, {left}.")
    return " ".join(parts)


def confirmation(report: Report) -> str:
    """What has computed the artifact and what has not, in one sentence, to stand beside the verdict."""
    by = f"Measured through {', '.join(report.readers)}" if report.readers else "Measured through nothing"
    return f"{by}; unconfirmed: {', '.join(report.unconfirmed) or 'nothing'}."


def by_result(checks: Iterable[CheckResult]) -> list[CheckResult]:
    """Failed checks first, then those that had nothing to check."""
    return sorted(checks, key=lambda check: (check.passed is not False, check.passed is not None))


def key_figures(report: Report) -> list[Figure]:
    """Those of `KEY_FIGURES` that were measured."""
    found = (find_figure(report.all_figures, name) for name in KEY_FIGURES)
    return [figure for figure in found if figure is not None]


def domain_figures(figures: Sequence[Figure], name: str) -> list[Figure]:
    """A figure over all text first, then over each domain."""
    of_name = [figure for figure in figures if figure.name == name]
    return sorted(of_name, key=lambda figure: figure.domain is not None)


def worst_tokens(report: Report) -> list[WorstToken]:
    """The tokens with the largest KL divergence."""
    return sorted(report.worst_tokens, key=lambda token: -token.kl)[:WORST]


def worst_prompts(report: Report) -> list[PromptComparison]:
    """The prompts whose continuations differ most, by edit distance, then by decisive flips."""
    if report.generations is None:
        return []
    differ = [each for each in report.generations.comparisons if each.first_difference is not None]
    return sorted(differ, key=lambda each: (-each.edit_distance, -each.flips, each.id))[:WORST]


def fallen_back(layers: Iterable[LayerRecord]) -> list[LayerRecord]:
    """Layers that GPTQ could not solve and rounded to nearest; none if the whole model was rounded to nearest."""
    layers = list(layers)
    fallen = [layer for layer in layers if layer.method == "round_to_nearest"]
    return fallen if len(fallen) < len(layers) else []


def loss_ratio(layer: LayerRecord) -> float | None:
    """The method's loss divided by round-to-nearest's; None for layers that were rounded to nearest."""
    if layer.method == "round_to_nearest" or layer.loss is None or not layer.rtn_loss:
        return None
    return layer.loss / layer.rtn_loss


def worst_layers(layers: Iterable[LayerRecord]) -> list[LayerRecord]:
    """The layers where GPTQ gained least over round-to-nearest."""
    compared = [(ratio, layer) for layer in layers if (ratio := loss_ratio(layer)) is not None]
    return [layer for _, layer in sorted(compared, key=lambda pair: -pair[0])[:WORST]]
