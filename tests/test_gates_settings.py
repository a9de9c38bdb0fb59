from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qexport.artifact.figures import CATALOGUE
from qexport.errors import RecipeError
from qexport.gates import Bounds, DomainBounds, GatesFile, read_gates
from qexport.verifying import VerifySettings

DOCS = Path(__file__).parent.parent / "docs" / "gates.md"


def read(folder: Path, text: str) -> GatesFile:
    path = folder / "g.yaml"
    path.write_text(text, encoding="utf-8")
    return read_gates(path)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    return [line.strip().removeprefix(f"{folder}/") for line in caught.value.what.splitlines()[1:]]


def test_a_file_of_gates_is_read_as_it_stands(tmp_path: Path) -> None:
    text = """\
profile: nf4
gates:
  mean_kl: {at_most: 0.3, domains: {code: {at_most: 0.4}}}
  perplexity_ratio: {at_most: 1.1, at_least: 0.9}
  decisive_flips: null
"""
    assert read(tmp_path, text) == GatesFile(
        profile="nf4",
        gates={
            "mean_kl": Bounds(at_most=0.3, domains={"code": DomainBounds(at_most=0.4)}),
            "perplexity_ratio": Bounds(at_most=1.1, at_least=0.9),
            "decisive_flips": None,
        },
    )


def test_every_problem_is_told_with_its_line(tmp_path: Path) -> None:
    text = """\
profile: gptq4bit
gates:
  mean_kll: {at_most: 0.3}
  max_kl:
    at_most: 1
  top1_agreement:
    at_least: .nan
  kl_p99: {}
  decisive_flips: {at_most: 1, domains: {code: {at_mst: 1}}}
  edit_distance: {at_most: 0.2, at_least: 0.3}
  chrf: 5
limits: 1
"""
    found = problems(tmp_path, text)
    assert found.pop(0).endswith("not 'gptq4bit'; did you mean gptq-4bit?")
    assert found == [
        "g.yaml:3: gates.mean_kll: unknown figure; did you mean mean_kl?",
        "g.yaml:4: gates.max_kl: max_kl has no confidence interval, so no gate on it can be decided; "
        "limit kl_p999 instead",
        "g.yaml:7: gates.top1_agreement.at_least: must be a finite number, not nan",
        "g.yaml:8: gates.kl_p99: give at_most, at_least or both",
        "g.yaml:9: gates.decisive_flips.domains.code.at_mst: unknown key; did you mean at_most?",
        "g.yaml:10: gates.edit_distance: at_most 0.2 is below at_least 0.3: nothing can pass",
        "g.yaml:11: gates.chrf: must be a mapping of keys to values, not 5",
        "g.yaml:12: limits: unknown key; known keys are profile, gates",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("mean_kl: {at_least: 0.3}", "mean_kl is better the lower it is: give at_most, not at_least"),
        ("top1_agreement: {at_most: 0.3}", "top1_agreement is better the higher it is: give at_least, not at_most"),
        ("top1_agreement: {at_least: 75}", "top1_agreement is a share between 0 and 1, so 75 cannot be a limit"),
        ("decisive_flips: {at_most: 5}", "decisive_flips is a share between 0 and 1, so 5 cannot be a limit"),
        ("mean_kl: {at_most: -0.1}", "mean_kl is 0 when the artifact equals its reference, so -0.1 can never pass"),
        ("chrf: {at_least: 101}", "chrf is 100 when the artifact equals its reference, so 101 can never pass"),
        (
            "mean_kl: {domains: {code: {at_least: 1}}}",
            "mean_kl[code] is better the lower it is: give at_most, not at_least",
        ),
        (
            "speed_ratio: {at_least: 0.5, domains: {code: {at_least: 0.4}}}",
            "speed_ratio is measured as a whole, not by domain",
        ),
        ("kl_over_rtn: {domains: {code: {at_most: 0}}}", "kl_over_rtn is measured as a whole, not by domain"),
        ("accuracy_change: {at_least: -0.02}", "accuracy_change is measured by task: give the limit under domains"),
    ],
)
def test_a_limit_that_cannot_do_what_it_says_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    (found,) = problems(tmp_path, f"gates:\n  perplexity_ratio: {{at_most: 1.1}}\n  {line}\n")
    assert found.startswith(f"g.yaml:3: gates.{line.partition(':')[0]}: {problem}")


def test_problems_of_several_figures_are_told_each_at_its_place(tmp_path: Path) -> None:
    text = "gates:\n  mean_kl: {at_least: 1}\n  top1_agreement: {at_least: 75}\n"
    assert [line.split(": ")[:2] for line in problems(tmp_path, text)] == [
        ["g.yaml:2", "gates.mean_kl"],
        ["g.yaml:3", "gates.top1_agreement"],
    ]


@pytest.mark.parametrize(("text", "what"), [("", "is empty"), ("- a", "is not a mapping"), ("a: [", "not valid YAML")])
def test_what_is_no_file_of_gates_is_told_plainly(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        read(tmp_path, text)


def test_a_missing_file_is_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the file of gates cannot be read: No such file"):
        read_gates(tmp_path / "nothing.yaml")


def test_every_file_of_gates_in_the_documents_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        assert read(tmp_path, block).gates


def test_a_recipe_takes_the_same_gates() -> None:
    gates: dict[str, Any] = {"mean_kl": {"at_most": 0.3}, "chrf": None}
    settings = VerifySettings.model_validate({"text": "t.txt", "gates": gates})
    assert settings.profile == "auto"
    assert settings.gates == GatesFile.model_validate({"gates": gates}).gates
    with pytest.raises(ValidationError, match="unknown figure"):
        VerifySettings.model_validate({"text": "t.txt", "gates": {"kl": {"at_most": 0.3}}})


limits = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-3, 200)


@given(st.sampled_from(sorted(CATALOGUE)), st.none() | limits, st.none() | limits)
def test_what_is_accepted_points_the_right_way_and_can_be_kept(name: str, at_most: float, at_least: float) -> None:
    try:
        settings = GatesFile.model_validate({"gates": {name: {"at_most": at_most, "at_least": at_least}}})
    except ValidationError:
        return
    kind, bounds = CATALOGUE[name], settings.gates[name]
    assert kind.gated
    assert bounds is not None
    assert (bounds.at_most, bounds.at_least) != (None, None)
    assert kind.better != "lower" or bounds.at_least is None
    assert kind.better != "higher" or bounds.at_most is None
    if kind.ideal is not None and kind.better != "near":
        assert bounds.at_most is None or bounds.at_most >= kind.ideal
        assert bounds.at_least is None or bounds.at_least <= kind.ideal
