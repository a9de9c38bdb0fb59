"""The figures that verification measures, their names and meanings, and the results of gates and checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from qexport.records import Record, added

Better = Literal["lower", "higher", "near"]
Form = Literal["number", "share", "nats", "ratio", "points"]


@dataclass(frozen=True)
class FigureKind:
    """The meaning of a figure's name.

    Attributes:
        label: for people, without a unit.
        form: how to write its values.
        ideal: the value of an artifact that equals its reference; None if no value means that.
        better: which way a gate on it may point: `lower` takes at_most, `higher` at_least, `near` either.
        gated: whether it has an interval, without which no gate can be decided.
        teacher_forced: measured on the held-out text, on as many windows as the gates need.
        served: measured only through a runtime.
    """

    label: str
    form: Form
    ideal: float | None = None
    better: Better = "lower"
    gated: bool = True
    teacher_forced: bool = True
    served: bool = False


def _generated(label: str, form: Form, ideal: float, better: Better) -> FigureKind:
    return FigureKind(label, form, ideal, better, teacher_forced=False)


def _served(label: str, form: Form, ideal: float | None, better: Better) -> FigureKind:
    return FigureKind(label, form, ideal, better, teacher_forced=False, served=True)


CATALOGUE: Final[Mapping[str, FigureKind]] = {
    "reference_perplexity": FigureKind("perplexity of the reference", "number"),
    "artifact_perplexity": FigureKind("perplexity of the artifact", "number"),
    "perplexity_ratio": FigureKind("perplexity, artifact / reference", "ratio", 1.0, "near"),
    "mean_kl": FigureKind("mean KL divergence", "nats", 0.0),
    "median_kl": FigureKind("median KL divergence", "nats", 0.0),
    "kl_p90": FigureKind("KL divergence, 90 % quantile", "nats", 0.0),
    "kl_p95": FigureKind("KL divergence, 95 % quantile", "nats", 0.0),
    "kl_p99": FigureKind("KL divergence, 99 % quantile", "nats", 0.0),
    "kl_p999": FigureKind("KL divergence, 99.9 % quantile", "nats", 0.0),
    "max_kl": FigureKind("KL divergence, largest", "nats", 0.0, gated=False),
    "top1_agreement": FigureKind("same likeliest token", "share", 1.0, "higher"),
    "decisive_flips": FigureKind("decisive flips", "share", 0.0),
    "probability_change": FigureKind("change of the true token's probability", "points", 0.0, "near"),
    "probability_change_rms": FigureKind("change of the true token's probability, RMS", "points", 0.0),
    "probability_change_p01": FigureKind("change of the true token's probability, 1 % quantile", "points", 0.0, "near"),
    "probability_change_p05": FigureKind("change of the true token's probability, 5 % quantile", "points", 0.0, "near"),
    "probability_change_p50": FigureKind("change of the true token's probability, median", "points", 0.0, "near"),
    "probability_change_p95": FigureKind(
        "change of the true token's probability, 95 % quantile", "points", 0.0, "near"
    ),
    "probability_change_p99": FigureKind(
        "change of the true token's probability, 99 % quantile", "points", 0.0, "near"
    ),
    "rtn_mean_kl": FigureKind("mean KL divergence of round-to-nearest", "nats"),
    "kl_over_rtn": FigureKind("KL divergence against round-to-nearest's, relative", "ratio"),
    "adapter_effect": FigureKind("mean KL divergence of the base without the adapter", "nats"),
    "kl_over_base": FigureKind("KL divergence from the reference against that from the base, relative", "ratio"),
    "adapter_strength_predictions": FigureKind("share of the adapter in the predictions", "ratio", 1.0, "near"),
    "adapter_strength_weights": FigureKind(
        "share of the adapter in the weights", "ratio", 1.0, "near", teacher_forced=False
    ),
    "adapter_survival": FigureKind(
        "share of the adapter's change that is left after rounding", "share", 1.0, "higher", teacher_forced=False
    ),
    "merge_kl": FigureKind(
        "mean KL divergence of the merge from the adapter in PEFT", "nats", 0.0, teacher_forced=False
    ),
    "merge_error": FigureKind(
        "error of the unrounded merge, relative to the adapter's effect", "share", 0.0, teacher_forced=False
    ),
    "baseline_mean_kl": FigureKind("mean KL divergence, artifact - release", "nats"),
    "baseline_perplexity_ratio": FigureKind("perplexity ratio, artifact / release", "ratio", 1.0, "near"),
    "baseline_top1_agreement": FigureKind("same likeliest token, artifact - release", "points", None, "higher"),
    "baseline_decisive_flips": FigureKind("decisive flips, artifact - release", "points"),
    "identical_generations": _generated("equal continuations", "share", 1.0, "higher"),
    "first_divergence": _generated("share of a continuation before the first difference", "share", 1.0, "higher"),
    "generation_flips": _generated("decisive flips along the reference's continuations", "share", 0.0, "lower"),
    "edit_distance": _generated("token edit distance of the continuations", "share", 0.0, "lower"),
    "chrf": _generated("chrF of the continuations", "number", 100.0, "higher"),
    "rouge_l": _generated("ROUGE-L of the continuations", "share", 1.0, "higher"),
    "repetition_change": _generated("change of the repetition rate", "points", 0.0, "near"),
    "length_limit_change": _generated("change of the share that hits the length limit", "points", 0.0, "near"),
    "length_ratio": _generated("length, artifact / reference", "ratio", 1.0, "near"),
    "style_sensitivity": _generated("edit distance, messy - clean prompts", "points", 0.0, "near"),
    "sampled_chrf": _generated("chrF of sampled continuations", "number", 100.0, "higher"),
    "speed_ratio": _generated("tokens per second, artifact / reference", "ratio", 1.0, "near"),
    "first_token_ratio": _generated("time to first token, artifact / reference", "ratio", 1.0, "near"),
    "format_validity_change": _generated("valid formats, artifact - reference", "points", 0.0, "higher"),
    "format_kl": _generated("mean KL divergence along formatted answers", "nats", 0.0, "lower"),
    "format_top1_agreement": _generated("same likeliest token along formatted answers", "share", 1.0, "higher"),
    "refusal_change": _generated("refusals, artifact - reference", "points", 0.0, "near"),
    "length_kl": _generated("mean KL divergence, by length", "nats", 0.0, "lower"),
    "length_perplexity_ratio": _generated("perplexity, artifact / reference, by length", "ratio", 1.0, "near"),
    "length_top1_agreement": _generated("same likeliest token, by length", "share", 1.0, "higher"),
    "position_kl": _generated("mean KL divergence, by position in the longest windows", "nats", 0.0, "lower"),
    "late_kl_over_early": _generated("KL divergence late against early in a window, relative", "ratio", 0.0, "near"),
    "recall_change": _generated("facts recalled, artifact - reference", "points", 0.0, "higher"),
    "accuracy_change": _generated("accuracy, artifact - reference", "points", 0.0, "near"),
    "fidelity_kl": _served("mean KL divergence of the runtime from our float32 reading", "nats", 0.0, "lower"),
    "fidelity_top1": _served("same likeliest token as in our float32 reading", "share", 1.0, "higher"),
    "fidelity_flips": _served("decisive flips from our float32 reading", "share", 0.0, "lower"),
    "fidelity_continuations": _served(
        "continuations equal to our float32 reading's, up to ties", "share", 1.0, "higher"
    ),
    "kl_over_reading": _served(
        "KL divergence of the runtime against our float32 reading's, relative", "ratio", None, "lower"
    ),
}
"""By name. docs/verification.md has each one's formula and source."""

DECISIVE_MARGIN: Final = 0.5
"""In nats. If the reference's two likeliest tokens are closer than this, a swap of the two says little."""

QUANTILES: Final[Mapping[str, float]] = {
    "median_kl": 0.5,
    "kl_p90": 0.9,
    "kl_p95": 0.95,
    "kl_p99": 0.99,
    "kl_p999": 0.999,
}
"""The quantiles of the KL divergence over tokens."""

PROBABILITY_QUANTILES: Final[Mapping[str, float]] = {
    "probability_change_p01": 0.01,
    "probability_change_p05": 0.05,
    "probability_change_p50": 0.5,
    "probability_change_p95": 0.95,
    "probability_change_p99": 0.99,
}
"""The quantiles over tokens of the change of the true token's probability."""


Verdict = Literal["pass", "fail", "undecided"]

Unit = Literal["document", "window", "prompt", "pair", "item", "repeat", "row"]
"""What was sampled independently; the tokens of one document were not."""


class Figure(Record):
    """One figure, over all text or over one domain of it. `qexport.artifact.figures` says what each name means."""

    name: str

    domain: str | None = None
    """The domain, or the task; None for all text."""

    value: float

    low: float | None = None
    """Lower end of the 95 % confidence interval for the number of units that were measured."""

    high: float | None = None
    """Upper end of it. Both are None if no interval can be given."""

    sequence_low: float | None = None
    """Lower end of the 95 % confidence sequence, which holds however often it is evaluated. Gates use it."""

    sequence_high: float | None = None
    """Upper end of it."""

    n: int
    """How many units it was measured on."""

    unit: Unit

    tokens: int | None = None
    """Predicted tokens in those units."""

    noise_floor: float | None = None
    """The same figure between the reference and itself computed in a wider dtype."""

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The ends of the interval that people are shown: the one that gates use, wherever there is one."""
        if self.sequence_low is None and self.sequence_high is None:
            return self.low, self.high
        return self.sequence_low, self.sequence_high


class GateResult(Record):
    """A gate and its decision."""

    name: str
    """The figure, with its domain, if any, in brackets; or the name of a check."""

    figure: str | None = None
    """The figure that it limits; None for a check that passes or fails as a whole."""

    domain: str | None = None

    bound: Literal["at_most", "at_least"] | None = None
    limit: float | None = None

    value: float | None = None
    """The measured value; None if nothing was measured, and then the gate does not pass."""

    low: float | None = None
    """Lower end of the interval that decided."""

    high: float | None = None
    """Upper end of it."""

    n: int = 0
    unit: Unit | None = None
    verdict: Verdict

    reason: str
    """One sentence for people."""

    source: str | None = added()
    """Who sets the limit: a profile, or the user; None for a gate that is built in."""

    room: float | None = added()
    """How far the artifact is from failing: the distance between the limit and the worse end of the interval, as a
    share of what the limit allows, that is of its distance from the value of an artifact that equals its reference
    (from 0 where there is none). Below 0 the gate has not passed."""

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"


class CheckResult(Record):
    """A check without statistics."""

    gate: str
    """The gate that it belongs to: `config`, `files`, `tokenizer`, `weights` or `graph`."""

    name: str

    passed: bool | None
    """None if there was nothing to check."""

    detail: str
    """What was found."""


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """`fail` if any is `fail`, else `undecided` if any is `undecided`, else `pass`."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "undecided" if "undecided" in found else "pass"


def find_figure(figures: Iterable[Figure], name: str, domain: str | None = None) -> Figure | None:
    """The figure with this name and domain, or None if it was not measured."""
    return next((figure for figure in figures if (figure.name, figure.domain) == (name, domain)), None)
