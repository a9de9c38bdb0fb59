"""Gates: the recipe's `verify.profile` and `verify.gates`, and the file of gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

from pydantic import AfterValidator, Field, ValidationError, model_validator

from qexport.artifact.figures import CATALOGUE, FigureKind
from qexport.settings import Settings
from qexport.yaml.parsing import FileKind
from qexport.yaml.problems import combination, plain, problems_of, suggestion

ProfileName = Literal[
    "auto", "strict", "16bit", "gptq-8bit", "int8", "w8a8", "fp8", "gptq-4bit", "gptq-4bit-3b", "gptq-4bit-30b",
    "nf4", "nf4-3b", "nf4-30b", "gptq-3bit", "gptq-2bit", "tiny", "tiny-nf4", "tiny-mxfp4", "tiny-3bit", "off",
]  # fmt: skip

WITHOUT_DOMAINS: Final = (
    "rtn_mean_kl", "kl_over_rtn", "adapter_effect", "kl_over_base", "adapter_strength_weights",
    "adapter_strength_predictions", "adapter_survival",
    "merge_kl", "merge_error", "style_sensitivity", "sampled_chrf", "speed_ratio", "first_token_ratio",
    "fidelity_kl", "fidelity_top1", "fidelity_flips", "fidelity_continuations", "kl_over_reading",
)  # fmt: skip
"""Measured only over everything; a limit for one domain would never be decided."""

ONLY_DOMAINS: Final[Mapping[str, str]] = {
    "accuracy_change": "task",
    "refusal_change": "kind",
    "length_kl": "length",
    "length_perplexity_ratio": "length",
    "length_top1_agreement": "length",
    "late_kl_over_early": "length",
    "position_kl": "position",
}
"""Measured only by task, kind of request and so on; a limit over all of them would never be decided."""


def _check_figure(name: str) -> str:
    if name not in CATALOGUE:
        hint = suggestion(name, list(CATALOGUE)) or "; docs/gates.md lists them"
        raise ValueError(f"unknown figure{hint}")
    if not CATALOGUE[name].gated:
        raise ValueError(f"{name} has no confidence interval, so no gate on it can be decided; limit kl_p999 instead")
    return name


FigureName = Annotated[
    str,
    AfterValidator(_check_figure),
    Field(json_schema_extra={"enum": [name for name, kind in CATALOGUE.items() if kind.gated]}),
]


class DomainBounds(Settings):
    """The limits of a figure in one domain of the text."""

    at_most: float | None = None
    """The largest value that passes."""

    at_least: float | None = None
    """The smallest value that passes."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> DomainBounds:
        if self.at_most is not None and self.at_least is not None and self.at_most < self.at_least:
            raise ValueError(f"at_most {self.at_most:g} is below at_least {self.at_least:g}: nothing can pass")
        if self.says_nothing:
            raise ValueError("give at_most, at_least or both")
        return self

    @property
    def says_nothing(self) -> bool:
        """Whether no limit is given, which is an error."""
        return self.at_most is None and self.at_least is None


class Bounds(DomainBounds):
    """The limits of a figure over all text, and in single domains. Those over all text replace the profile's."""

    domains: dict[str, DomainBounds] = {}
    """Limits by domain of the text or the prompts, or by task. They apply in addition to those over all text."""

    @property
    def says_nothing(self) -> bool:
        """Whether no limit is given, which is an error."""
        return super().says_nothing and not self.domains


def _check_limits(gates: dict[str, Bounds | None]) -> dict[str, Bounds | None]:
    found = {name: "; ".join(_problems(name, bounds)) for name, bounds in gates.items() if bounds is not None}
    if problems := {name: message for name, message in found.items() if message}:
        raise combination(problems)
    return gates


def _problems(name: str, bounds: Bounds) -> Iterator[str]:
    kind = CATALOGUE[name]
    yield from _limit_problems(name, kind, bounds)
    for domain, inner in bounds.domains.items():
        yield from _limit_problems(f"{name}[{domain}]", kind, inner)
    if bounds.domains and name in WITHOUT_DOMAINS:
        yield f"{name} is measured as a whole, not by domain"
    if name in ONLY_DOMAINS and (bounds.at_most is not None or bounds.at_least is not None):
        part = ONLY_DOMAINS[name]
        yield f"{name} is measured by {part}: give the limit under domains, with the {part}'s name"


def _limit_problems(name: str, kind: FigureKind, bounds: DomainBounds) -> Iterator[str]:
    if kind.better == "lower" and bounds.at_least is not None:
        yield f"{name} is better the lower it is: give at_most, not at_least"
    if kind.better == "higher" and bounds.at_most is not None:
        yield f"{name} is better the higher it is: give at_least, not at_most"
    for limit in (bounds.at_most, bounds.at_least):
        if limit is not None and kind.form == "share" and not 0 <= limit <= 1:
            yield f"{name} is a share between 0 and 1, so {limit:g} cannot be a limit (half of all is 0.5)"
        elif limit is not None and kind.ideal is not None and _out_of_reach(limit, kind, kind.ideal):
            yield f"{name} is {kind.ideal:g} when the artifact equals its reference, so {limit:g} can never pass"


def _out_of_reach(limit: float, kind: FigureKind, ideal: float) -> bool:
    return (kind.better == "lower" and limit < ideal) or (kind.better == "higher" and limit > ideal)


GateSettings = Annotated[dict[FigureName, Bounds | None], AfterValidator(_check_limits)]
"""Limits by the name of their figure; null removes the profile's."""


class HasGates(Protocol):
    """Settings with a profile and gates: a recipe's `verify`, or a file of gates."""

    @property
    def profile(self) -> ProfileName: ...  # noqa: D102

    @property
    def gates(self) -> Mapping[str, Bounds | None]: ...  # noqa: D102


class GatesFile(Settings):
    """A file of gates, for artifacts that are verified, or whose gates are decided, without a recipe's `verify`."""

    profile: ProfileName = "auto"
    """The limits to start from: `auto` chooses by method and size, `strict` allows half as much, `off` sets none."""

    gates: GateSettings = {}
    """Limits on figures, in place of the profile's; null removes one of the profile's."""


_GATES: Final = FileKind(
    "file of gates", needs="give profile, gates or both", reference="docs/gates.md describes every field"
)


def read_gates(path: Path) -> GatesFile:
    """Reads a YAML file with `profile` and `gates`.

    Raises:
        RecipeError: with every problem that was found, each as `file:line: field: message`.
    """
    root, problems = _GATES.read(path)
    try:
        settings = GatesFile.model_validate(plain(root))
    except ValidationError as error:
        problems += problems_of(error, root, GatesFile)
    if problems:
        raise _GATES.error(path, problems)
    return settings
