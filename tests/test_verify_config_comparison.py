"""The artifact's config.json against the reference's: the same model, also in the words of older readers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPTNeoXConfig, PretrainedConfig

import factories
from qexport.architectures.architecture import Architecture
from qexport.errors import InputError
from qexport.verifying.config_comparison import refuse_other_config

LLAMA = factories.llama_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
SCALED = factories.llama_config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
FALCON, FALCON_40B = factories.falcon_config(), factories.falcon_40b_config()
RW = factories.falcon_config(alibi=True, multi_query=False)
NEOX = GPTNeoXConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
SLIDING = Gemma3TextConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
GEMMA = Gemma3TextConfig(num_hidden_layers=8, hidden_size=64, num_attention_heads=4)


def content(config: PretrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string())
    return values


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (LLAMA, {"rope_theta": 5e5, "torch_dtype": "float16", "dtype": "bfloat16"}),
        (LLAMA, {"rope_scaling": None, "partial_rotary_factor": 1.0, "is_encoder_decoder": False}),
        (SCALED, {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (FALCON, {"num_kv_heads": 1, "rope_theta": 10000.0}),
        (FALCON_40B, {"num_kv_heads": 2, "num_ln_in_parallel_attn": 2}),
        (RW, {"num_kv_heads": 4}),
        (NEOX, {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
        (SLIDING, {"sliding_window_pattern": 6}),
        (GEMMA, {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}),
    ],
)
def test_what_follows_from_the_reference_may_be_added(config: PretrainedConfig, added: dict[str, Any]) -> None:
    refuse_other_config(Architecture(content(config)), content(config) | added)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (LLAMA, {"rope_theta": 10000.0}),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (LLAMA, {"partial_rotary_factor": 0.5}),
        (LLAMA, {"rms_norm_eps": 1e-3}),
        (LLAMA, {"tie_word_embeddings": True}),
        (LLAMA, {"architectures": ["MistralForCausalLM"]}),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        (LLAMA, {"_attn_implementation": "org/kernel"}),
        (LLAMA, {"a_new_key": 1}),
        (SCALED, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (SCALED, {"rope_scaling": None}),
        (FALCON, {"num_kv_heads": 3}),
        (FALCON_40B, {"num_kv_heads": 1}),
        (FALCON_40B, {"num_ln_in_parallel_attn": 1}),
        (RW, {"num_kv_heads": 1}),
        (NEOX, {"rotary_pct": 1.0}),
        (GEMMA, {"rope_local_base_freq": 1e6}),
        (GEMMA, {"sliding_window_pattern": 2}),
    ],
)
def test_what_means_something_else_is_refused(config: PretrainedConfig, changed: dict[str, Any]) -> None:
    reference = content(config) | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(InputError, match="not the reference's") as caught:
        refuse_other_config(Architecture(reference), reference | changed)
    assert next(iter(changed)) in str(caught.value)


def test_a_default_may_be_spelled_out_and_no_other_value() -> None:
    short = {key: value for key, value in content(LLAMA).items() if key != "rms_norm_eps"}
    refuse_other_config(Architecture(short), content(LLAMA))
    with pytest.raises(InputError, match="rms_norm_eps"):
        refuse_other_config(Architecture(short), content(LLAMA) | {"rms_norm_eps": 0.5})


def test_a_missing_key_is_refused() -> None:
    values = content(LLAMA)
    for key in ("hidden_size", "rope_parameters"):
        with pytest.raises(InputError, match=f"{key} is missing"):
            refuse_other_config(Architecture(values), {name: value for name, value in values.items() if name != key})


def test_the_name_of_the_class_may_be_added() -> None:
    reference = {key: value for key, value in content(LLAMA).items() if key != "architectures"}
    refuse_other_config(Architecture(reference), reference | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(InputError, match="architectures"):
        refuse_other_config(Architecture(reference), reference | {"architectures": ["FalconForCausalLM"]})
