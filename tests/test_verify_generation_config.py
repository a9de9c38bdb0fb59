"""generation_config.json key by key, with transformers' own reading of both files as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig

from qexport.verifying.generation_config import GenerationSide, generation_differences

CONFIG = LlamaConfig(eos_token_id=2, bos_token_id=1, pad_token_id=None)
BASE: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9}


def differences(base: dict[str, Any] | None, artifact: dict[str, Any] | None, config: PretrainedConfig = CONFIG) -> str:
    return "; ".join(generation_differences(GenerationSide(base, CONFIG), GenerationSide(artifact, config)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"repetition_penalty": 1.3}, "repetition_penalty is 1.3, not missing"),
        ({"temperature": 1.2}, "temperature is 1.2, not 0.7"),
        ({"suppress_tokens": [5, 7]}, "suppress_tokens is [5, 7], not missing"),
        ({"max_new_tokens": 8}, "max_new_tokens is 8, not missing"),
        ({"max_length": 64}, "max_length is 64, not missing"),
        ({"eos_token_id": [2, 5]}, "eos_token_id is [2, 5], not 2"),
        ({"pad_token_id": 0}, "pad_token_id is 0, not missing"),
        ({"do_sample": False}, "do_sample is False, not True"),
        ({"stop_strings": ["a"]}, "stop_strings is ['a'], not missing"),
        ({"min_p": 0.05}, "min_p is 0.05, not missing"),
        ({"of_another_runtime": 3}, "of_another_runtime is 3, not missing"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}, not 2"),
    ],
)
def test_a_changed_key_is_named_with_both_values(changes: dict[str, Any], told: str) -> None:
    assert differences(BASE, {**BASE, **changes}) == told


def test_a_key_that_only_the_reference_has_is_named() -> None:
    assert (
        differences(BASE, {key: value for key, value in BASE.items() if key != "top_p"}) == "top_p is missing, not 0.9"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": [2]},
        {"transformers_version": "4.51.3", "_from_model_config": True},
        {"repetition_penalty": 1.0, "max_length": 20, "num_beams": 1, "top_k": 50, "suppress_tokens": None},
        {"output_attentions": False, "begin_suppress_tokens": []},
    ],
)
def test_the_same_in_another_form_is_equal(changes: dict[str, Any]) -> None:
    assert differences(BASE, {**BASE, **changes}) == ""


def test_without_a_file_config_json_says_what_is_generated() -> None:
    derived = GenerationConfig.from_model_config(CONFIG).to_dict()
    assert differences(None, None) == ""
    assert differences(None, derived) == differences(derived, None) == ""
    assert differences(BASE, None) == (
        "do_sample is missing, not True; temperature is missing, not 0.7; top_p is missing, not 0.9"
    )
    assert differences(None, None, LlamaConfig(eos_token_id=[2, 3], bos_token_id=1)) == "eos_token_id is [2, 3], not 2"


KEYS = {
    "temperature": st.floats(0.1, 2), "repetition_penalty": st.floats(1, 2), "top_k": st.integers(1, 99),
    "max_new_tokens": st.integers(1, 99), "min_length": st.integers(0, 9), "use_cache": st.booleans(),
    "num_beams": st.integers(1, 4), "no_repeat_ngram_size": st.integers(0, 5), "eos_token_id": st.integers(0, 9),
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional=KEYS), st.fixed_dictionaries({}, optional=KEYS))
def test_files_are_equal_exactly_if_transformers_generates_with_equal_settings(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    def settings(file: dict[str, Any]) -> dict[str, Any]:
        """The settings of `generate`: those of the file, and the defaults where it has none."""
        config = GenerationConfig.from_dict(file)
        config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
        return config.to_dict()

    assert (differences(one, other) == "") == (settings(one) == settings(other))
