"""The gates of one artifact: which limits hold, and which checks are expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.artifact.figures import Figure, GateResult
from qexport.artifact.manifest import LayerRecord
from qexport.artifact.report import Check
from qexport.gates.deciding import BuiltIn, decide
from qexport.gates.limits import Limit, above_floor, limits_of
from qexport.gates.profiles import auto_profile
from qexport.gates.settings import HasGates, ProfileName
from qexport.quantize.settings import GptqSettings, QuantizeSettings
from qexport.verifying.preparation import Preparation

COARSE_BITS = 4
"""With more, rounding to nearest is so near that calibration can hardly be better by more than noise."""


@dataclass(frozen=True)
class Gates:
    """Decides what it was made for.

    Attributes:
        limits: on figures.
        expected: the built-in gates that apply.
        notes: limits of a profile that had to be moved.
    """

    limits: Sequence[Limit]
    expected: Sequence[BuiltIn]
    notes: Sequence[str]

    def __call__(self, figures: Sequence[Figure], checks: Sequence[Check]) -> list[GateResult]:
        """The decisions on what is known."""
        return decide(self.limits, figures, checks, self.expected)


def make_gates(
    settings: HasGates, profile: ProfileName, prepared: Preparation, *, adapter: bool, rounded: bool
) -> Gates:
    """The gates of an artifact.

    Args:
        settings: the user's.
        profile: what `auto` means for this artifact.
        prepared: what was measured of the reference.
        adapter: whether the base without the adapter can be run.
        rounded: whether round-to-nearest is a rival.

    Raises:
        RecipeError: a limit is tighter than three times the noise floor.
    """
    chosen = profile if settings.profile == "auto" else settings.profile
    limits, notes = above_floor(limits_of(settings, chosen), prepared.noise_floor)
    expected: list[BuiltIn] = ["config", "tokenizer"]
    expected += ["merge"] if prepared.figures else []
    expected += ["adapter"] if adapter else []
    expected += ["better_than_rtn"] if rounded else []
    return Gates(limits, expected, notes)


def profile_of(settings: QuantizeSettings, parameters: int) -> ProfileName:
    """What `profile: auto` means for a recipe's method.

    Args:
        settings: the recipe's `quantize`.
        parameters: of the merged model.
    """
    match settings:
        case GptqSettings():
            return auto_profile("gptq", settings.bits, parameters)
        case _:
            return auto_profile(_METHODS[settings.method], 0, parameters)


def has_rounded_rival(bits: Sequence[int]) -> bool:
    """Whether an artifact with these bits, of layers quantized in groups, is held against round-to-nearest."""
    return bool(bits) and min(bits) <= COARSE_BITS
