"""The table of loaders against what is known, and against the loaders that are installed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, PreTrainedModel

import factories
import qexport
import stored_models
from qexport.export import SafetensorsSettings
from qexport.export.layouts import SafetensorsLayout
from qexport.export.loaders import Folder, loaders, loading_section, python_lines, warnings
from quantized_models import QuantizedModel

GPTQ = stored_models.GPTQ | {"sym": True}
UP, HEAD = "model.layers.0.mlp.up_proj", "lm_head"


def folder(quantization: dict[str, Any] | None, **changes: Any) -> Folder:
    shapes = {} if quantization is None else {UP: (128, 64)}
    values: dict[str, Any] = dict(model_type="llama", head=HEAD, layout="safetensors", shapes=shapes)
    return Folder(quantization=quantization, **(values | changes))


def packed(**changes: Any) -> dict[str, Any]:
    """Of two groups of layers, the second with other settings."""
    first = next(iter(stored_models.W4A16["config_groups"].values()))
    second = first | {"weights": first["weights"] | changes}
    return stored_models.W4A16 | {"config_groups": {"group_0": first, "group_1": second}}


def verdicts(found: Folder) -> dict[str, str]:
    return {loader.name: loader.verdict for loader in loaders(found)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (folder(None), {"transformers": "yes", "qexport.load": "yes", "vLLM": "untried", "TGI": "no"}),
        (folder(None, layout="tgi"), {"transformers": "yes", "TGI": "yes"}),
        (folder(None, layout="vllm"), {"vLLM": "yes", "TGI": "no"}),
        (folder(GPTQ), {"transformers + gptqmodel": "yes", "gptqmodel": "yes", "vLLM": "untried"}),
        (folder(GPTQ, layout=None), {"gptqmodel": "yes", "qexport.load": "yes"}),
        (folder(GPTQ, model_type="falcon"), {"transformers + gptqmodel": "wrong", "gptqmodel": "yes"}),
        (folder(GPTQ, shapes={HEAD: (384, 64)}), {"transformers + gptqmodel": "wrong", "gptqmodel": "yes"}),
        (folder(GPTQ | {"sym": False}), {"transformers + gptqmodel": "yes", "gptqmodel": "no", "vLLM": "no"}),
        (folder(GPTQ | {"sym": False}, layout="tgi"), {"gptqmodel": "no", "TGI": "yes"}),
        (folder(GPTQ | {"desc_act": True}), {"transformers + gptqmodel": "yes", "vLLM": "no"}),
        (folder(GPTQ | {"dynamic": {"-:^a$": {}}}), {"transformers + gptqmodel": "yes"}),
        (folder(GPTQ | {"dynamic": {"^a$": {"bits": 8}}}), {"transformers + gptqmodel": "no", "gptqmodel": "yes"}),
        (folder(GPTQ, shapes={UP: (72, 64)}), {"transformers + gptqmodel": "no", "gptqmodel": "yes"}),
        (folder(GPTQ | {"bits": 8}, shapes={UP: (72, 64)}), {"transformers + gptqmodel": "yes"}),
        (folder(GPTQ, shapes={"m.experts.0.w1": (64, 64)}), {"gptqmodel": "untried", "qexport.load": "yes"}),
        (folder(stored_models.NF4), {"transformers + bitsandbytes": "yes", "vLLM": "no", "TGI": "no"}),
        (folder(stored_models.NF4, model_type="falcon"), {"transformers + bitsandbytes": "no", "qexport.load": "yes"}),
        (folder(stored_models.NF4, block_sizes={UP: 64}), {"transformers + bitsandbytes": "yes"}),
        (folder(stored_models.NF4, block_sizes={UP: 128}), {"transformers + bitsandbytes": "wrong"}),
        (folder(stored_models.NF4, block_sizes={UP: 4096}), {"transformers + bitsandbytes": "yes"}),
        (folder(stored_models.W8A8), {"transformers + compressed-tensors": "yes", "qexport.load": "yes"}),
        (folder(stored_models.W8A8, layout="vllm"), {"vLLM": "yes"}),
        (folder(stored_models.NVFP4), {"transformers + compressed-tensors": "yes", "qexport.load": "yes"}),
        (folder(stored_models.NVFP4, model_type="falcon"), {"transformers + compressed-tensors": "no"}),
        (folder(stored_models.MXFP4, layout="vllm"), {"transformers + compressed-tensors": "yes", "vLLM": "untried"}),
        (folder(stored_models.FP8), {"transformers + compressed-tensors": "yes", "qexport.load": "yes"}),
        (folder(stored_models.W4A16), {"transformers + compressed-tensors": "yes", "qexport.load": "yes"}),
        (folder(packed(symmetric=False)), {"transformers + compressed-tensors": "no", "qexport.load": "yes"}),
        (folder(packed(actorder="group")), {"transformers + compressed-tensors": "untried"}),
        (folder(stored_models.W4A16, model_type="falcon"), {"transformers + compressed-tensors": "no"}),
        (
            folder(stored_models.W4A16, shapes={"m.experts.0.w1": (64, 64)}),
            {"transformers + compressed-tensors": "untried"},
        ),
        (folder(stored_models.FP8_BLOCKS), {"transformers": "yes", "qexport.load": "yes", "vLLM": "untried"}),
        (folder(stored_models.FP8_BLOCKS, shapes={UP: (256, 384)}), {"transformers": "yes"}),
        (folder(stored_models.FP8_BLOCKS, shapes={UP: (576, 384)}), {"transformers": "no"}),
        (folder(stored_models.FP8_BLOCKS, shapes={UP: (192, 384)}), {"transformers": "wrong"}),
        (folder(stored_models.FP8_BLOCKS, model_type="falcon"), {"transformers": "untried"}),
        (
            folder(None, gguf_files=1, layout="gguf"),
            {"llama.cpp": "yes", "transformers": "yes", "vLLM": "untried", "TGI": "no"},
        ),
        (folder(None, gguf_files=1, layout=None, model_type="qwen3"), {"llama.cpp": "yes", "transformers": "untried"}),
    ],
)
def test_the_first_row_that_holds_decides(found: Folder, expected: dict[str, str]) -> None:
    assert expected.items() <= verdicts(found).items()


def test_a_loader_that_has_nothing_to_do_with_the_format_is_not_named() -> None:
    assert "transformers + gptqmodel" not in verdicts(folder(stored_models.NF4))
    assert "transformers + bitsandbytes" not in verdicts(folder(None))


def test_two_lines_of_python_name_transformers_only_where_it_takes_the_artifact() -> None:
    assert "AutoModelForCausalLM" in python_lines(folder(GPTQ), "x")[1]
    assert python_lines(folder(None, gguf_files=1), "x")[0] == "from llama_cpp import Llama"
    for other in (folder(GPTQ, model_type="falcon"), folder(stored_models.NF4, model_type="falcon")):
        assert python_lines(other, "x") == ("import qexport", 'model = qexport.load("x")')


@pytest.mark.parametrize(
    ("shape", "block_size", "verdict", "words"),
    [
        ((128, 64), 64, "yes", ""),
        ((576, 576), 128, "wrong", "takes the scales of other blocks"),
        ((576, 1536), 128, "yes", ""),
        ((576, 1536), 1024, "wrong", "takes the scales of other blocks"),
        ((576, 1536), 2048, "yes", "asks for inputs in multiples of the block size"),
        ((64, 40), 64, "yes", "asks for inputs in multiples of the block size"),
        ((1, 576), 128, "yes", "asks for inputs in multiples of the block size"),
        ((40, 64), 64, "yes", "requires outputs in multiples of 32"),
    ],
)
def test_what_bitsandbytes_makes_of_a_block_size_depends_on_the_shapes(
    shape: tuple[int, int], block_size: int, verdict: str, words: str
) -> None:
    found = folder(stored_models.NF4, shapes={UP: shape}, block_sizes={UP: block_size})
    [loader] = [loader for loader in loaders(found) if loader.name == "transformers + bitsandbytes"]
    assert loader.verdict == verdict
    assert words in loader.reason
    assert bool(words) == bool(loader.reason)
    assert bool(warnings(found)) == (verdict == "wrong" or "block size" in words)


def test_silent_faults_are_warned_of_and_stand_in_the_model_card() -> None:
    assert warnings(folder(GPTQ)) == []
    [warning] = warnings(folder(GPTQ, model_type="falcon"))
    assert "qexport.load(path)" in warning
    assert loading_section(folder(GPTQ, model_type="falcon")).splitlines()[3:6] == [
        "import qexport", 'model = qexport.load("FOLDER")', "```",
    ]  # fmt: skip
    quantized = QuantizedModel(factories.build(factories.falcon_config()))
    layout = SafetensorsLayout(SafetensorsSettings(), quantized.outputs, quantized.structure)
    assert 'model = qexport.load("FOLDER")' in layout.card.loading
    assert "**Silently wrong** with: transformers + gptqmodel (it fills" in layout.card.loading


MIXTRAL = MixtralConfig(
    vocab_size=factories.VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4,
)  # fmt: skip


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found = model(input_ids=torch.arange(20)[None]).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(
    "config", [factories.llama_config(), factories.qwen2_config(), MIXTRAL], ids=lambda c: c.model_type
)
def test_transformers_with_bitsandbytes_computes_the_same_from_nf4(config: PretrainedConfig, tmp_path: Path) -> None:
    stored_models.write(factories.build(config), tmp_path / "a", stored_models.NF4_DOUBLE)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="cpu", dtype=torch.bfloat16)
    for module in stock.modules():
        if type(module).__name__ == "Linear4bit":
            vars(module)["support_avx512bf16_for_cpu"] = False  # it would repack the weights, and asks for 32 outputs
    assert torch.equal(logits(stock), logits(qexport.load(tmp_path / "a", device="cpu")))


@pytest.mark.parametrize("quantization", [stored_models.NF4, stored_models.INT8], ids=["nf4", "int8"])
def test_transformers_with_bitsandbytes_fails_on_falcon_with_an_error(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    stored_models.write(factories.build(factories.falcon_config()), tmp_path / "a", quantization)
    with pytest.raises(RuntimeError, match=r"mismatched|same dtype"):
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="cpu", dtype=torch.bfloat16))
