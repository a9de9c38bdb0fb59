"""Which modules an adapter means, held against PEFT, and regular expressions that would hang."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import adapters
import factories
from qexport.errors import InputError
from qexport.merge import targets
from qexport.merge.adapter import AdapterOptions
from qexport.merge.targets import BaseModel, describe_base, full_matches, suffix_matches, targeted

LLAMA: BaseModel = describe_base(adapters.headers_of(factories.build(factories.llama_config(num_hidden_layers=3))))
NAMES = list(LLAMA.modules)


def by_peft(config: PeftConfig) -> list[str]:
    # An excluded module is told by a falsy object of its own type.
    return [name for name in NAMES if check_target_module_exists(config, name)]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r".*layers\.[02].*proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.[12].*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["self_attn"]},
        {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1"]},
    ],
    ids=str,
)
def test_the_targeted_modules_are_pefts(options: dict[str, Any]) -> None:
    expected = by_peft(LoraConfig(**options))
    options = {"peft_type": "LORA", **options}
    if expected:
        assert targeted(AdapterOptions.model_validate(options), LLAMA) == expected
    else:
        with pytest.raises(InputError, match="no module of the base matches"):
            targeted(AdapterOptions.model_validate(options), LLAMA)


def test_all_linear_leaves_the_head_out() -> None:
    found = targeted(AdapterOptions(peft_type="LORA", target_modules="all-linear"), LLAMA)
    assert len(found) == 3 * 7
    assert "lm_head" not in found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 40), st.booleans())
def test_keys_of_a_rank_pattern_match_as_pefts(name: str, start: int, anchored: bool) -> None:
    key = ("^" if anchored else "") + name[start:]
    found = suffix_matches(key, NAMES, field="rank_pattern")
    assert found == {other for other in NAMES if get_pattern_key([key], other) == key and key}


@pytest.mark.parametrize("key", [r".*q_proj", r"layers\.(0|2)\.mlp\.up_proj", "^model.layers.[01].*", "q_proj|v_proj"])
def test_keys_that_are_regular_expressions_match_as_pefts(key: str) -> None:
    found = suffix_matches(key, NAMES, field="rank_pattern")
    assert found == {name for name in NAMES if get_pattern_key([key], name) == key}
    assert found


def test_a_pattern_that_backtracks_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TIME_LIMIT", 0.5)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"takes longer than 0.5 s over") as caught:
        full_matches(r"(([a-z_.0-9])*)*X", NAMES, field="target_modules")
    assert time.monotonic() - start < 5
    assert "adapter_config.json: target_modules" in str(caught.value)


@pytest.mark.parametrize("pattern", ["(", "[a", "*a", "a{2,1}", "(?P<n>a)(?P<n>b)"])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="is not a regular expression"):
        full_matches(pattern, NAMES, field="target_modules")


def test_plain_names_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_match_in_child", None)
    assert len(suffix_matches("self_attn.q_proj", NAMES, field="alpha_pattern")) == 3


@pytest.mark.parametrize(
    "pattern", [".*q_proj", "q_proj|v_proj", "(q)_proj", "[qv]_proj", "q+_proj", "q?_proj", "q{1}"]
)
def test_whatever_repeats_or_branches_is_not_plain(pattern: str) -> None:
    """Only what is plain may be matched where it cannot be stopped."""
    assert not targets.is_plain(pattern)
    assert targets.is_plain("model.layers.0.self_attn.q_proj-1")
