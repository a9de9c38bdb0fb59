"""Greedy continuations against transformers on a model that it loaded itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PretrainedConfig

import factories
from qexport.architectures.runner import BlockRunner
from qexport.text.prompts import Prompt
from qexport.verifying.generation import compare_generations, continue_all, first_difference, greedy_settings
from qexport.verifying.memory import available_memory, needed_memory
from quantized_models import QuantizedModel, Tensors

CPU = torch.device("cpu")
TOKENIZER = factories.tokenizer()
CONFIGS = [factories.llama_config(), factories.qwen2_config(), factories.mistral_config(), factories.falcon_config()]


def runner_of(model: QuantizedModel, dtype: torch.dtype = torch.float32) -> BlockRunner:
    return BlockRunner(model.checkpoint.config, model.checkpoint.weights, dtype=dtype, device=CPU)


def by_hand(folder: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest token of a fresh forward over everything so far, again and again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.model_type))
def test_continuations_are_the_likeliest_tokens_one_by_one(config: PretrainedConfig, tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(config))
    factories.save(model.model, tmp_path / "model")
    inputs = [TOKENIZER(text)["input_ids"] for text in ("The miller", "Total: 12 boxes")]
    settings = greedy_settings(model.checkpoint, TOKENIZER, max_new_tokens=6)
    continued = continue_all(runner_of(model), inputs, settings, lambda: None)
    assert continued == [by_hand(tmp_path / "model", ids, 6) for ids in inputs]


def test_a_continuation_ends_with_any_end_token_that_the_models_files_name() -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    ids = TOKENIZER(factories.TEXT[0])["input_ids"]
    settings = greedy_settings(model.checkpoint, TOKENIZER, max_new_tokens=8)
    assert settings.eos_token_id == [0]
    third = continue_all(runner_of(model), [ids], settings, lambda: None)[0][2]
    files = {"generation_config.json": json.dumps({"eos_token_id": [third, 380]}).encode()}
    ending = greedy_settings(replace(model.checkpoint, files=files), TOKENIZER, max_new_tokens=8)
    assert ending.eos_token_id == sorted({0, third, 380})
    continued = continue_all(runner_of(model), [ids], ending, lambda: None)[0]
    assert continued[-1] == third
    assert len(continued) <= 3


def test_sampling_and_penalties_of_the_models_own_config_do_not_enter() -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    ours = dict(model.checkpoint.config)
    files = {"generation_config.json": b'{"do_sample": true, "temperature": 9.0, "repetition_penalty": 5.0}'}
    inputs = [TOKENIZER(factories.TEXT[0])["input_ids"]]
    plain, changed = (
        continue_all(
            BlockRunner(config, model.checkpoint.weights, dtype=torch.float32, device=CPU),
            inputs,
            greedy_settings(replace(model.checkpoint, files=given), TOKENIZER, max_new_tokens=12),
            lambda: None,
        )
        for config, given in ((ours, {}), (ours | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2}, files))
    )
    assert plain == changed


def test_both_texts_and_the_first_difference_are_told() -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    changed = dict(model.model.state_dict())
    changed["lm_head.weight"] = changed["lm_head.weight"].roll(1, 0)
    prompts = [Prompt("a", "The miller"), Prompt("b", "Total: 12")]
    settings = greedy_settings(model.checkpoint, TOKENIZER, max_new_tokens=4)
    other = BlockRunner(model.checkpoint.config, Tensors(changed), dtype=torch.float32, device=CPU)
    told: list[int] = []
    found = compare_generations(runner_of(model), other, prompts, TOKENIZER, settings, lambda: told.append(1))
    assert len(told) == 4
    assert (found.prompts, found.identical, found.max_new_tokens) == (2, 0, 4)
    assert [each.id for each in found.comparisons] == ["a", "b"]
    assert all(each.first_difference == 0 and each.reference != each.artifact for each in found.comparisons)
    rendered = TOKENIZER("<|start|>user\nThe miller<|end|>\n<|start|>assistant\n")["input_ids"]
    expected = continue_all(runner_of(model), [rendered], settings, lambda: None)[0]
    assert found.comparisons[0].reference == TOKENIZER.decode(expected, skip_special_tokens=True)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_the_first_difference_is_the_length_of_what_both_share(ours: list[int], theirs: list[int]) -> None:
    found = first_difference(ours, theirs)
    if ours == theirs:
        assert found is None
    else:
        assert found is not None
        assert ours[:found] == theirs[:found]
        assert ours[: found + 1] != theirs[: found + 1]


@pytest.mark.parametrize("tied", [True, False])
def test_the_memory_of_a_whole_model_is_estimated_from_its_shapes(tied: bool) -> None:
    model = QuantizedModel(factories.build(factories.llama_config(tie_word_embeddings=tied)))
    parameters, head = sum(p.numel() for p in model.model.parameters()), factories.VOCABULARY * 64
    assert needed_memory(runner_of(model, torch.bfloat16)) == int((2 * parameters + 4 * head) * 1.25)


def test_the_memory_available_is_that_of_the_system_or_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    monkeypatch.setattr("qexport.verifying.memory._MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("qexport.verifying.memory._CGROUP", tmp_path)
    assert available_memory(CPU) == 4000 * 1024
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(CPU) == 4000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert available_memory(CPU) == 800000
