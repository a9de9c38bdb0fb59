"""genai_config.json against a small schema, the names of the graph, and the families; `make test-genai` runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

import factories
from qexport.architectures.structure import build_on_meta, parse_config
from qexport.export.onnx.genai import TYPES, Generation, genai_config, genai_notes
from qexport.export.onnx.traced_cache import cache_tensors
from qexport.export.onnx.tracing import Cache, past_name, present_name

GENERATION = Generation((0,), 0, 0, {})
FAMILIES = {name: config for name, config in factories.FAMILIES.items() if config.model_type in TYPES}
NUMBER = int
SCHEMA: dict[str, Any] = {
    "model": {
        "bos_token_id": NUMBER,
        "context_length": NUMBER,
        "decoder": {
            "filename": str,
            "head_size": NUMBER,
            "hidden_size": NUMBER,
            "inputs": dict,
            "num_attention_heads": NUMBER,
            "num_hidden_layers": NUMBER,
            "num_key_value_heads": NUMBER,
            "outputs": dict,
            "session_options": {"log_id": str, "provider_options": list},
        },
        "eos_token_id": NUMBER,
        "pad_token_id": NUMBER,
        "type": str,
        "vocab_size": NUMBER,
    },
    "search": {"do_sample": bool, "max_length": NUMBER, "num_beams": NUMBER, "past_present_share_buffer": bool},
}


def mapping(config: PretrainedConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def cache_of(config: PretrainedConfig) -> Cache:
    model = build_on_meta(parse_config(mapping(config)))
    assert isinstance(model, PreTrainedModel)
    return cache_tensors(torch.nn.Module.to(model, dtype=torch.float32))


def made(config: PretrainedConfig, generation: Generation = GENERATION) -> dict[str, Any]:
    content = genai_config(mapping(config), cache_of(config), generation)
    assert content is not None
    return content


def shape_of(content: Any, schema: Any) -> Any:
    if isinstance(schema, dict) and isinstance(content, dict):
        return {key: shape_of(value, schema.get(key)) for key, value in content.items()}
    return type(content)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_content_follows_the_schema(family: str) -> None:
    assert shape_of(made(FAMILIES[family]), SCHEMA) == SCHEMA


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_are_the_graphs(family: str) -> None:
    config = FAMILIES[family]
    decoder, cache = made(config)["model"]["decoder"], cache_of(config)
    for part, fixed, name_of in (
        ("inputs", {"input_ids", "attention_mask", "position_ids"}, past_name),
        ("outputs", {"logits"}, present_name),
    ):
        named = {
            name % layer if "%" in name else name for name in decoder[part].values() for layer in range(len(cache))
        }
        assert named == fixed | {name_of(layer, tensor) for layer, tensors in enumerate(cache) for tensor in tensors}
    assert (decoder["num_hidden_layers"], decoder["hidden_size"]) == (len(cache), 64)


def test_the_names_of_states_are_where_the_runtime_looks() -> None:
    decoder = made(factories.falcon_h1_config())["model"]["decoder"]
    assert decoder["inputs"]["past_conv_names"] == "past_key_values.%d.conv_state"
    assert decoder["inputs"]["past_recurrent_names"] == "past_key_values.%d.recurrent_state"
    assert decoder["outputs"]["present_conv_names"] == "present.%d.conv_state"
    assert decoder["outputs"]["present_recurrent_names"] == "present.%d.recurrent_state"


def test_sizes_are_those_of_the_graph() -> None:
    for config, heads, size in (
        (factories.falcon_config(), 1, 16),
        (factories.falcon_40b_config(), 4, 16),
        (factories.llama_config(head_dim=32), 2, 32),
    ):
        decoder = made(config)["model"]["decoder"]
        assert (decoder["num_key_value_heads"], decoder["head_size"]) == (heads, size)
    assert made(factories.gpt2_config())["model"]["context_length"] == 256
    assert made(factories.falcon_config())["search"]["max_length"] == 2048


def test_every_family_of_the_graph_has_a_type_and_others_have_none() -> None:
    without = {config.model_type for config in factories.FAMILIES.values()} - set(TYPES)
    assert without == {"mixtral", "qwen3_moe"}
    for model_type in ("mixtral", "bert", "", None):
        config = mapping(factories.llama_config()) | {"model_type": model_type}
        assert genai_config(config, [], GENERATION) is None
        assert genai_notes(config, []) == []


def test_tokens_and_sampling_are_the_models() -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20}
    content = made(factories.llama_config(), Generation((3, 9), None, None, sampling))
    assert content["model"]["eos_token_id"] == [3, 9]
    assert content["model"]["pad_token_id"] == 3
    assert "bos_token_id" not in content["model"]
    assert content["search"].items() >= sampling.items()
    assert content["search"]["max_length"] == 256
    content = made(factories.llama_config(), Generation((), None, None, {}))
    assert "eos_token_id" not in content["model"]
    assert content["model"]["pad_token_id"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_warned_of_where_padding_on_the_right_is_seen(family: str) -> None:
    notes = genai_notes(mapping(FAMILIES[family]), cache_of(FAMILIES[family]))
    words = {"falcon h1": "mamba", "mistral": "16 tokens", "gemma 2": "16 tokens", "gemma 3": "16 tokens"}
    assert len(notes) == (family in words)
    assert all(words[family] in note for note in notes)


def test_a_window_that_no_layer_has_is_not_warned_of() -> None:
    config = factories.mistral_config(sliding_window=None)
    assert genai_notes(mapping(config), cache_of(config)) == []
    for window_layers, count in ((2, 0), (1, 1)):
        qwen = factories.qwen2_config(sliding_window=8, use_sliding_window=True, max_window_layers=window_layers)
        assert len(genai_notes(mapping(qwen), cache_of(qwen))) == count


def test_the_documentation_has_the_same_table() -> None:
    page = (Path(__file__).parent.parent / "docs/onnx.md").read_text()
    section = page.partition("\n## onnxruntime-genai\n")[2]
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", section, flags=re.MULTILINE)) == TYPES
