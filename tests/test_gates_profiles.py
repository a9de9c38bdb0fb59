from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.artifact.figures import CATALOGUE
from qexport.artifact.manifest import Sizes
from qexport.errors import RecipeError
from qexport.gates import Bounds, GatesFile, ProfileName
from qexport.gates.limits import Limit, above_floor, limits_of
from qexport.gates.profiles import PROFILES, profile_for, profile_of_layers, profile_record, stricter
from qexport.quantizing import profile_of_layer
from qexport.quantizing.none import NoQuantization
from reports import layer

DOCS = Path(__file__).parent.parent / "docs"

MEASURED = {
    ("gptq", 4): (0.161, 1.147, 0.787),
    ("nf4", 4): (0.348, None, None),
    ("nvfp4", 4): (0.2425, 1.237, 0.721),
    ("mxfp4", 4): (0.449, 1.449, 0.645),
    ("int8", 8): (0.0055, None, None),
    ("w8a8", 8): (0.0332, 1.0167, 0.8896),
    ("fp8", 8): (0.0300, 1.0317, 0.8975),
    ("gptq", 8): (0.0022, None, None),
}
"""Mean KL divergence, perplexity ratio and top-1 agreement of SmolLM2-135M, by method and bits."""


def test_the_page_shows_the_limits_that_hold() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page(), flags=re.MULTILINE)
    shown = {name: tuple(map(float, values)) for name, *values in rows}
    assert shown == {
        name: (
            profile.limits["mean_kl"].at_most,
            profile.limits["perplexity_ratio"].at_most,
            profile.limits["top1_agreement"].at_least,
            profile.limits["decisive_flips"].at_most,
        )
        for name, profile in PROFILES.items()
        if name != "off"
    }


def test_there_is_a_profile_for_every_name_and_each_limits_the_same_figures() -> None:
    assert set(PROFILES) == set(get_args(ProfileName)) - {"auto", "strict"}
    assert {frozenset(profile.limits) for name, profile in PROFILES.items() if name != "off"} == {
        frozenset({"mean_kl", "perplexity_ratio", "top1_agreement", "decisive_flips"})
    }
    for profile in PROFILES.values():
        GatesFile(gates=dict(profile.limits))


def test_more_bits_and_more_parameters_are_never_allowed_more() -> None:
    falling: list[list[ProfileName]] = [
        ["gptq-2bit", "gptq-3bit", "gptq-4bit", "gptq-4bit-3b", "gptq-4bit-30b", "gptq-8bit", "16bit"],
        ["tiny-nf4", "nf4", "nf4-3b", "nf4-30b", "int8"],
        ["tiny-3bit", "tiny", "gptq-4bit"],
        ["nf4", "gptq-4bit"],
        ["nf4-3b", "gptq-4bit-3b"],
        ["nf4-30b", "gptq-4bit-30b"],
    ]
    for names in falling:
        for looser, tighter in itertools.pairwise(names):
            for figure in PROFILES["16bit"].limits:
                assert allowed(figure, PROFILES[looser].limits) > allowed(figure, PROFILES[tighter].limits), looser


def allowed(figure: str, limits: Mapping[str, Bounds]) -> float:
    """How far a limit is from the value of an artifact that equals its reference."""
    limit = limits[figure].at_most if limits[figure].at_least is None else limits[figure].at_least
    assert limit is not None
    return abs(limit - (CATALOGUE[figure].ideal or 0.0))


def test_strict_leaves_half_of_what_a_profile_allows() -> None:
    found = stricter(PROFILES["gptq-4bit-3b"].limits)
    assert {name: bounds.at_most or bounds.at_least for name, bounds in found.items()} == {
        "mean_kl": 0.03, "perplexity_ratio": 1.03, "top1_agreement": 0.916, "decisive_flips": 0.0125,
    }  # fmt: skip
    settings = GatesFile.model_validate({"profile": "strict", "gates": {"mean_kl": {"at_most": 0.07}}})
    assert profile_for(settings, [layer("a")], LARGE, profile_of_layer) == "gptq-4bit-3b"
    limits = {limit.name: (limit.value, limit.source) for limit in limits_of(settings, "gptq-4bit-3b")}
    assert limits["mean_kl"] == (0.07, "the user's gates")
    assert limits["decisive_flips"] == (0.0125, "the profile gptq-4bit-3b, strict")


def test_the_record_of_a_profile_says_how_it_was_chosen() -> None:
    found = [profile_record(GatesFile(profile=name), "tiny") for name in ("auto", "strict", "tiny")]
    assert [(each.name, each.strict, each.chosen) for each in found] == [
        ("tiny", False, "by method and size"), ("tiny", True, "by method and size"), ("tiny", False, "by name"),
    ]  # fmt: skip
    assert found[0].reason == PROFILES["tiny"].reason


def page() -> str:
    return (DOCS / "gates.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "bits", "parameters", "profile"),
    [
        ("gptq", 8, 135_000_000, "gptq-8bit"),
        ("int8", 8, 135_000_000, "int8"),
        ("w8a8", 8, 7_000_000_000, "w8a8"),
        ("fp8", 8, 135_000_000, "fp8"),
        ("gptq", 4, 499_999_999, "tiny"),
        ("gptq", 4, 500_000_000, "gptq-4bit"),
        ("gptq", 4, 2_999_999_999, "gptq-4bit"),
        ("gptq", 4, 3_000_000_000, "gptq-4bit-3b"),
        ("gptq", 4, 30_000_000_000, "gptq-4bit-30b"),
        ("round_to_nearest", 4, 7_000_000_000, "gptq-4bit-3b"),
        ("gptq", 3, 7_000_000_000, "gptq-3bit"),
        ("gptq", 2, 7_000_000_000, "gptq-2bit"),
        ("gptq", 2, 135_000_000, "tiny-3bit"),
        ("gptq", 3, 135_000_000, "tiny-3bit"),
        ("nvfp4", 4, 135_000_000, "tiny-nf4"),
        ("nvfp4", 4, 7_000_000_000, "nf4-3b"),
        ("mxfp4", 4, 135_000_000, "tiny-mxfp4"),
        ("mxfp4", 4, 500_000_000, "gptq-3bit"),
        ("mxfp4", 4, 7_000_000_000, "nf4"),
        ("mxfp4", 4, 40_000_000_000, "nf4-3b"),
        ("nf4", 4, 135_000_000, "tiny-nf4"),
        ("nf4", 4, 500_000_000, "nf4"),
        ("fp4", 4, 7_000_000_000, "nf4-3b"),
        ("nf4", 4, 40_000_000_000, "nf4-30b"),
    ],
)
def test_auto_chooses_by_method_bits_and_size(method: str, bits: int, parameters: int, profile: str) -> None:
    assert profile_of_layer(method, bits, parameters) == profile


def test_auto_chooses_for_merged_weights_what_16_bits_can_keep() -> None:
    assert NoQuantization().profile(16, 135_000_000) == "16bit"


def test_what_was_measured_passes_its_profile_and_a_broken_artifact_passes_none() -> None:
    for (method, bits), (kl, ratio, agreement) in MEASURED.items():
        profile = profile_of_layer(method, bits, 134_515_008)
        assert profile is not None
        limits = PROFILES[profile].limits
        assert limits["mean_kl"].at_most is not None
        assert limits["mean_kl"].at_most >= 1.5 * kl
        assert ratio is None or ratio < (limits["perplexity_ratio"].at_most or 0)
        assert agreement is None or agreement > (limits["top1_agreement"].at_least or 1)
    assert all((each.limits["mean_kl"].at_most or 9) < 1 for name, each in PROFILES.items() if name != "off")


LARGE = Sizes(parameters=7_000_000_000, total_bytes=4_000_000_000, bits_per_weight=4.6)
SMALL = Sizes(parameters=135_000_000, total_bytes=119_000_000, bits_per_weight=7.08)


def test_of_a_report_the_profile_is_that_of_most_layers() -> None:
    layers = [layer("a"), layer("b"), layer("c", bits=8)]
    assert profile_of_layers(layers, SMALL, profile_of_layer) == "tiny"
    assert (
        profile_of_layers(layers, SMALL.model_copy(update={"parameters": 7_000_000_000}), profile_of_layer)
        == "gptq-4bit-3b"
    )
    assert profile_of_layers([], SMALL.model_copy(update={"bits_per_weight": 16.0}), profile_of_layer) == "16bit"


def test_an_artifact_of_an_unknown_method_needs_a_named_profile() -> None:
    with pytest.raises(RecipeError, match="the method of the layers is unknown") as caught:
        profile_of_layers([], SMALL, profile_of_layer)
    assert caught.value.mend == "name the profile in the file of gates, for example gptq-4bit"
    with pytest.raises(RecipeError, match="the method of the layers is unknown"):
        profile_of_layers([layer("a").model_copy(update={"method": "of-another-maker"})], SMALL, profile_of_layer)


# Which limits hold


def held(text: Mapping[str, object], profile: ProfileName = "tiny") -> dict[str, tuple[str, float, bool]]:
    limits = limits_of(GatesFile.model_validate({"gates": text}), profile)
    assert len({limit.name for limit in limits}) == len(limits)
    return {limit.name: (limit.bound, limit.value, limit.by_user) for limit in limits}


TINY = {
    "perplexity_ratio": ("at_most", 1.25, False),
    "mean_kl": ("at_most", 0.25, False),
    "top1_agreement": ("at_least", 0.72, False),
    "decisive_flips": ("at_most", 0.1, False),
}


def test_the_profile_holds_where_nothing_is_said() -> None:
    assert held({}) == TINY
    assert held({}, "off") == {}


def test_bounds_replace_the_profile_on_both_sides_and_null_removes_them() -> None:
    gates = {"perplexity_ratio": {"at_least": 0.9}, "mean_kl": {"at_most": 0.3}, "decisive_flips": None}
    assert held(gates) == {
        "perplexity_ratio": ("at_least", 0.9, True),
        "mean_kl": ("at_most", 0.3, True),
        "top1_agreement": ("at_least", 0.72, False),
    }


def test_domains_alone_leave_the_profile_and_two_bounds_have_names_of_their_own() -> None:
    gates = {"mean_kl": {"domains": {"code": {"at_most": 0.4}}}, "length_ratio": {"at_most": 1.2, "at_least": 0.8}}
    assert held(gates) == TINY | {
        "mean_kl[code]": ("at_most", 0.4, True),
        "length_ratio at_most": ("at_most", 1.2, True),
        "length_ratio at_least": ("at_least", 0.8, True),
    }


def test_null_for_a_figure_that_the_profile_does_not_limit_changes_nothing() -> None:
    assert held({"chrf": None}) == TINY


# The noise floor


def limit(figure: str, value: float, *, by_user: bool = True, domain: str | None = None) -> Limit:
    return Limit(figure, domain, "at_least" if figure == "top1_agreement" else "at_most", value, by_user)


def test_a_users_limit_below_three_times_the_noise_floor_is_refused_with_the_tightest_one() -> None:
    limits = [
        limit("mean_kl", 0.0029),
        limit("mean_kl", 0.002, domain="code"),
        limit("top1_agreement", 0.95),
        limit("perplexity_ratio", 1.001),
        limit("kl_p99", 0.2),
    ]
    floors = {"mean_kl": 0.001, "top1_agreement": 0.969, "perplexity_ratio": 0.9995, "kl_p99": 0.01}
    with pytest.raises(RecipeError) as caught:
        above_floor(limits, floors)
    assert caught.value.exit_code == 2
    assert caught.value.where is not None
    assert [line.strip() for line in caught.value.where.splitlines()] == [
        "mean_kl: at most 0.0029, where at most 0.003 is the tightest that can be distinguished from noise",
        "mean_kl[code]: at most 0.002, where at most 0.003 is the tightest that can be distinguished from noise",
        "top1_agreement: at least 0.95, where at least 0.907 is the tightest that can be distinguished from noise",
        "perplexity_ratio: at most 1.001, where at most 1.0015 is the tightest that can be distinguished from noise",
    ]


@given(st.floats(1e-6, 10), st.sampled_from(["mean_kl", "perplexity_ratio"]))
def test_the_tightest_limit_that_an_error_names_is_accepted(floor: float, figure: str) -> None:
    ideal = 1.0 if figure == "perplexity_ratio" else 0.0
    floors = {figure: ideal + floor}
    with pytest.raises(RecipeError) as caught:
        above_floor([limit(figure, ideal)], floors)
    named = re.findall(r"at most ([\d.e+-]+) is the tightest", caught.value.where or "")
    accepted = [limit(figure, float(named[0]))]
    assert above_floor(accepted, floors) == (accepted, [])


def test_the_tightest_limit_has_three_digits() -> None:
    with pytest.raises(RecipeError) as caught:
        above_floor([limit("mean_kl", 0.001)], {"mean_kl": 0.00123456})
    assert "where at most 0.00371 is the tightest" in (caught.value.where or "")


def test_three_times_the_noise_floor_itself_is_allowed() -> None:
    limits = [limit("mean_kl", 0.3), limit("reference_perplexity", 1.0), limit("kl_p99", 1e-9)]
    assert above_floor(limits, {"mean_kl": 0.1, "reference_perplexity": 30.0}) == (limits, [])


def test_a_profiles_limit_is_moved_and_a_note_says_so() -> None:
    limits, notes = above_floor(
        [limit("mean_kl", 0.003, by_user=False), limit("top1_agreement", 0.95, by_user=False)],
        {"mean_kl": 0.002, "top1_agreement": 0.99},
    )
    assert [each.value for each in limits] == [pytest.approx(0.006), 0.95]
    assert notes == ["the limit of mean_kl is 0.006, not the profile's 0.003: three times the noise floor"]


@pytest.mark.parametrize(("figure", "value", "floor"), [("mean_kl", 0.12, 0.31), ("top1_agreement", 0.82, 0.84)])
def test_no_profiles_limit_is_moved_to_where_a_broken_artifact_would_pass(
    figure: str, value: float, floor: float
) -> None:
    with pytest.raises(RecipeError, match="noise floor"):
        above_floor([limit(figure, value, by_user=False)], {figure: floor})
