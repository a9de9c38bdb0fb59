"""Whose tokenizer a merged model gets, and a whole run with tokens that an adapter added."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import adapters
import factories
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import InputError
from qexport.loading.adapter_tokenizer import TokenizerChoice, choose_tokenizer
from qexport.loading.small_files import read_sidecars
from qexport.pipeline import run
from qexport.recipe import load_recipe
from qexport.tensors import Origin

N = factories.VOCABULARY
Change = Callable[[PreTrainedTokenizerFast], object]


def files(folder: Path, *changes: Change) -> Mapping[str, bytes]:
    """The files of the usual tokenizer, changed."""
    tokenizer = factories.tokenizer()
    for change in changes:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    return read_sidecars(folder)


def turn_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})


def other_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})


def other_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"


def no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None


GENERATION = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "temperature": 0.5}


def model(folder: Path, *, rows: int = N + 8, **generation: int) -> Checkpoint:
    """A merged model with the base's tokenizer."""
    own = {**files(folder), "generation_config.json": json.dumps(GENERATION | generation).encode()}
    config = factories.llama_config(vocab_size=rows).to_dict()
    return Checkpoint(Architecture(config), adapters.Headers(adapters_model()), own, Origin("folder", "b"))


def adapters_model() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(factories.llama_config())


def chosen(merged: Checkpoint, beside: Mapping[str, bytes], *trained: int, rows_before: int = N) -> TokenizerChoice:
    return choose_tokenizer(merged, beside, set(trained), rows_before=rows_before)


def refusal(merged: Checkpoint, beside: Mapping[str, bytes], *trained: int, rows_before: int = N) -> str:
    with pytest.raises(InputError) as caught:
        chosen(merged, beside, *trained, rows_before=rows_before)
    return str(caught.value)


def test_a_tokenizer_with_further_tokens_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    merged, beside = model(tmp_path / "base"), files(tmp_path / "adapter", turn_token)
    found = chosen(merged, beside)
    assert found.files == {**beside, "generation_config.json": merged.files["generation_config.json"]}
    assert found.config == merged.config
    assert found.notes == (f"the adapter's tokenizer is used: it has {N + 1} tokens, the base's {N}",)


def test_rows_that_the_base_had_to_spare_need_no_resizing(tmp_path: Path) -> None:
    found = chosen(model(tmp_path / "base"), files(tmp_path / "adapter", turn_token), rows_before=N + 8)
    assert "the adapter's tokenizer is used" in found.notes[0]


def test_a_new_end_of_text_is_added_to_the_ends(tmp_path: Path) -> None:
    found = chosen(model(tmp_path / "base"), files(tmp_path / "adapter", turn_token, other_end))
    stop = N + 1
    assert json.loads(found.files["generation_config.json"]) == GENERATION | {"eos_token_id": [stop, 0]}
    assert found.config["eos_token_id"] == [stop, 0]
    assert found.config["bos_token_id"] == 0
    assert found.of(model(tmp_path / "again")).config["eos_token_id"] == [stop, 0]


def test_a_new_padding_token_replaces_the_old_one_only(tmp_path: Path) -> None:
    def pad(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})

    merged = model(tmp_path / "base")
    found = chosen(merged, files(tmp_path / "adapter", pad))
    assert json.loads(found.files["generation_config.json"]) == GENERATION | {"pad_token_id": N}
    kept = chosen(model(tmp_path / "base", pad_token_id=7), files(tmp_path / "adapter", pad))
    assert json.loads(kept.files["generation_config.json"])["pad_token_id"] == 7


def test_other_files_without_further_tokens_are_noted_and_left_out(tmp_path: Path) -> None:
    merged = model(tmp_path / "base", rows=N)
    found = chosen(merged, files(tmp_path / "adapter", other_template))
    assert found.files is merged.files
    assert found.notes == (
        "the adapter's folder has another chat_template.jinja than the base; the base's is used",
    )  # fmt: skip


def test_a_template_that_only_the_base_has_is_noted(tmp_path: Path) -> None:
    found = chosen(model(tmp_path / "base"), files(tmp_path / "adapter", turn_token, no_template))
    assert "chat_template.jinja" not in found.files
    assert "has no chat template, and the base's has one" in found.notes[1]


def test_more_rows_than_tokens_are_nothing_to_say_where_no_token_was_added(tmp_path: Path) -> None:
    """pad_to_multiple_of: rows without tokens."""
    merged = model(tmp_path / "base")
    assert chosen(merged, merged.files, rows_before=N + 8).notes == ()
    assert "if tokens were added, copy the tokenizer" in chosen(merged, {}).notes[0]


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    merged, beside = model(tmp_path / "base", rows=N), files(tmp_path / "adapter", turn_token)
    assert f"has {N + 1} tokens, and the merged model only {N}" in refusal(merged, beside)


def test_trained_tokens_that_no_tokenizer_has_are_refused(tmp_path: Path) -> None:
    text = refusal(model(tmp_path / "base"), {}, 3, N, N + 1)
    assert f"trains the tokens [{N}, {N + 1}], it brings no tokenizer, and the base's has {N} tokens" in text
    assert "tokenizer.save_pretrained" in text


def test_a_smaller_model_needs_a_smaller_tokenizer(tmp_path: Path) -> None:
    assert "has 380 tokens in its embedding" in refusal(model(tmp_path / "base", rows=380), {})
    smaller = factories.tokenizer()
    content = json.loads(smaller.backend_tokenizer.to_str())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    del content["model"]["vocab"][last]
    content["model"]["merges"] = content["model"]["merges"][:-1]
    beside = {**files(tmp_path / "adapter"), "tokenizer.json": json.dumps(content).encode()}
    found = chosen(model(tmp_path / "again", rows=N - 1), beside)
    assert found.notes == (f"the adapter's tokenizer is used: it has {N - 1} tokens, the base's {N}",)


def test_a_base_without_a_tokenizer_gets_the_adapters(tmp_path: Path) -> None:
    merged = Checkpoint(
        model(tmp_path / "base").architecture, adapters.Headers(adapters_model()), {}, Origin("folder", "b")
    )
    found = chosen(merged, files(tmp_path / "adapter", turn_token))
    assert found.notes == (f"the adapter's tokenizer is used: it has {N + 1} tokens",)


def test_a_tokenizer_that_cannot_be_read_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    text = refusal(model(tmp_path / "base"), {**files(tmp_path / "adapter"), "tokenizer.json": b'{"version": 1}'})
    assert "the tokenizer beside the adapter cannot be used: transformers cannot read" in text
    assert "or remove its files from the adapter's folder" in text


def test_added_tokens_reach_every_kind_of_folder(tmp_path: Path) -> None:
    base = factories.build(factories.llama_config(tie_word_embeddings=True, num_hidden_layers=1))
    factories.save(base, tmp_path / "base")
    resized = copy.deepcopy(base)
    tokenizer = factories.tokenizer()
    turn_token(tokenizer)
    other_end(tokenizer)
    resized.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    resized.name_or_path = str(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapters.save_adapter(resized, config, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    factories.write_text(tmp_path / "held-out.jsonl", seed=2)
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "<|turn|>The miller"}\n')
    recipe: dict[str, Any] = {
        "load": {"base": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")},
        "quantize": {"method": "none"},
        "export": [{"layout": layout} for layout in ("safetensors", "tgi", "vllm", "gguf")],
        "verify": {
            "text": str(tmp_path / "held-out.jsonl"), "prompts": str(tmp_path / "prompts.jsonl"), "windows": 4,
            "sequence_length": 32, "max_new_tokens": 4, "profile": "off",
        },
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = run(load_recipe(tmp_path / "recipe.yaml"), device="cpu")
    assert result.verdict == "pass"
    oracle = adapters.merge_with_peft(resized, tmp_path / "adapter")
    for layout in ("safetensors", "tgi", "vllm"):
        folder = tmp_path / "out" / layout
        served = AutoModelForCausalLM.from_pretrained(folder)
        assert served.config.vocab_size == 392
        assert served.generation_config.eos_token_id == [385, 0]
        assert all(torch.equal(tensor, oracle[name].bfloat16()) for name, tensor in served.state_dict().items())
        read = AutoTokenizer.from_pretrained(folder)
        assert (read("<|turn|>").input_ids, read.eos_token) == ([384], "<|stop|>")
    gguf = json.loads((tmp_path / "out" / "gguf" / "config.json").read_text())
    assert gguf["vocab_size"] == 392
    assert {check.name for check in result.reports["gguf"].checks if check.passed is False} == set()
