"""`qexport.load`: the artifact as a model of transformers, for every way of storing weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

import factories
import qexport
import stored_models
from qexport.errors import CompatibilityError, InputError, RecipeError
from qexport.reading.quantized_linear import QuantizedLinear
from qexport.reading.safetensors_weights import SafetensorsWeights
from quantized_models import QuantizedModel, gptq_method

IDS = torch.randint(factories.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))

CONFIGS = {
    "llama": factories.llama_config(),
    "llama biases": factories.llama_config(attention_bias=True, mlp_bias=True),
    "qwen2 tied": factories.qwen2_config(),
    "falcon 7b": factories.falcon_config(),
    "falcon 7b biases": factories.falcon_config(bias=True),
    "falcon 40b": factories.falcon_40b_config(),
    "falcon rw": factories.falcon_config(
        alibi=True, multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False
    ),
}

TINY: dict[str, Any] = dict(vocab_size=factories.VOCABULARY, bos_token_id=0, eos_token_id=0)
LAYERS: dict[str, Any] = TINY | dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
FAMILIES = {
    "llama biases": CONFIGS["llama biases"],
    "falcon 40b": CONFIGS["falcon 40b"],
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **TINY),
    "gpt_neox": GPTNeoXConfig(intermediate_size=128, **LAYERS),
    "mixtral": MixtralConfig(intermediate_size=96, num_local_experts=4, num_key_value_heads=2, **LAYERS),
    "falcon_h1": FalconH1Config(
        intermediate_size=128, num_key_value_heads=2, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16, **LAYERS,
    ),
}  # fmt: skip


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found = model(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    return found


def stock(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The class of transformers, with what our reader dequantizes."""
    dense = folder.parent / "dense"
    dense.mkdir(exist_ok=True)
    with SafetensorsWeights(folder, dtype=dtype) as source:
        save_file({name: source.read(name).to(dtype) for name in source.specs()}, dense / "model.safetensors")
        (dense / "config.json").write_text(json.dumps(source.config))
    loaded: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype, output_loading_info=True)
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    QuantizedModel(factories.build(factories.llama_config())).write(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 0}')
    return tmp_path / "a"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gptq_artifact_computes_what_the_stock_class_does_with_its_dequantized_weights(
    config: PretrainedConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    QuantizedModel(factories.build(config), method=gptq_method(bits=8)).write(tmp_path / "a")
    model = qexport.load(tmp_path / "a", dtype=dtype, device="cpu")
    assert type(model) is type(stock(tmp_path / "a", dtype))
    assert torch.equal(logits(model), logits(stock(tmp_path / "a", dtype)))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) > 7


@pytest.mark.parametrize("quantization", stored_models.QUANTIZATIONS.values(), ids=stored_models.QUANTIZATIONS.keys())
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_stored_format_computes_what_the_stock_class_does_with_its_dequantized_weights(
    config: PretrainedConfig, quantization: dict[str, Any], tmp_path: Path
) -> None:
    stored_models.write(factories.build(config), tmp_path / "a", quantization)
    model = qexport.load(tmp_path / "a", dtype=torch.float32, device="cpu")
    assert torch.equal(logits(model), logits(stock(tmp_path / "a", torch.float32)))


def distance(model: PreTrainedModel, reference: PreTrainedModel) -> float:
    """Mean KL divergence in nats a token."""
    ours, theirs = logits(model).float().log_softmax(-1), logits(reference).float().log_softmax(-1)
    return float(nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())


FALCONS = {name: config for name, config in CONFIGS.items() if name.startswith("falcon")}


@pytest.mark.parametrize("config", FALCONS.values(), ids=FALCONS.keys())
def test_a_falcon_gives_the_references_logits_within_the_methods_error(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    """A Falcon with weights of another seed is at 0.3 and more."""
    reference = factories.build(config, dtype=torch.float32)
    stored_models.write(factories.build(config), tmp_path / "nf4", stored_models.NF4)
    QuantizedModel(factories.build(config)).write(tmp_path / "gptq")
    for method in ("nf4", "gptq"):
        model = qexport.load(tmp_path / method, dtype=torch.float32, device="cpu")
        assert 0.0001 < distance(model, reference) < 0.05
    assert distance(factories.build(config, seed=1, dtype=torch.float32), reference) > 0.3


@pytest.mark.parametrize(
    "quantize",
    [
        "{method: nf4}",
        "{method: gptq, group_size: 32, calibration: {source: c.jsonl, samples: 8, sequence_length: 32}}",
    ],
    ids=["nf4", "gptq"],
)
def test_what_a_run_publishes_of_a_falcon_is_loaded(tmp_path: Path, quantize: str) -> None:
    factories.save(factories.build(factories.falcon_40b_config()), tmp_path / "model")
    factories.write_text(tmp_path / "c.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""{{load: {{base: ./model}}, quantize: {quantize}, export: [layout: safetensors], output: out}}"""
    )
    result = qexport.run(qexport.load_recipe(recipe), device="cpu")
    model = qexport.load(result.artifact_path, device="cpu")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 8
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert 0.0001 < distance(model, reference) < 0.05


def test_a_quantized_head_and_dense_layers_among_quantized_ones_are_loaded(tmp_path: Path) -> None:
    config = factories.llama_config()
    special = {"lm_head": (4, 32), "model.layers.0.mlp.up_proj": None}
    QuantizedModel(factories.build(config), special=special).write(tmp_path / "a")
    model = qexport.load(tmp_path / "a", dtype=torch.float32, device="cpu")
    assert isinstance(model.get_submodule("lm_head"), QuantizedLinear)
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert torch.equal(logits(model), logits(stock(tmp_path / "a", torch.float32)))


def test_a_dense_folder_is_the_model_of_transformers(tmp_path: Path) -> None:
    factories.save(factories.build(factories.llama_config()), tmp_path / "a")
    model = qexport.load(tmp_path / "a", device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(expected))


def test_the_model_takes_the_memory_of_the_artifact(folder: Path) -> None:
    model = qexport.load(folder, device="cpu")
    stored = load_file(folder / "model.safetensors")
    held = [*model.parameters(), *(tensor for name, tensor in model.named_buffers() if "proj" in name)]
    assert sum(tensor.nbytes for tensor in held) == sum(tensor.nbytes for tensor in stored.values())


def test_it_generates_with_the_artifacts_own_generation_config(folder: Path) -> None:
    model = qexport.load(folder, device="cpu")
    assert not model.training
    assert model.generation_config.max_new_tokens == 3
    assert model.generate(IDS, do_sample=False).shape == (2, 27)  # type: ignore[operator]


def test_codes_survive_a_change_of_dtype_and_the_model_computes_in_it(folder: Path) -> None:
    model = qexport.load(folder, device="cpu")
    nn.Module.to(model, dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert {name: tensor.dtype for name, tensor in layer.named_buffers()} == {
        "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32,
    }  # fmt: skip
    assert torch.equal(logits(model), logits(qexport.load(folder, device="cpu", dtype=torch.float32)))


def test_a_loaded_artifact_is_not_saved_as_if_codes_were_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="cannot be saved again"):
        qexport.load(folder, device="cpu").save_pretrained(tmp_path / "b")


def test_the_folder_above_several_layouts_names_them(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        qexport.load(folder.parent)
    assert f"load one of its layouts: {folder}" in str(caught.value)


def test_a_folder_without_a_model_and_a_device_that_is_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        qexport.load(tmp_path / "empty")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device"):
            qexport.load(folder, device="cuda:0")
    with pytest.raises(RecipeError, match="'gpu' is not a device"):
        qexport.load(folder, device="gpu")


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "wide"), ("num_attention_heads", 0), ("hidden_act", "nope")]
)
def test_a_config_that_no_model_can_be_built_from_is_an_input_error(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=r"transformers cannot build a model from it|a number that no model has"):
        qexport.load(folder)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.scales"]
)
def test_a_missing_tensor_is_refused(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks|no input embedding|not the model"):
        qexport.load(folder, device="cpu")


def test_an_unexpected_tensor_is_refused(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="not the model") as caught:
        qexport.load(folder, device="cpu")
    assert "extra: unexpected" in str(caught.value)


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_nothing_from_the_folder_is_executed(folder: Path, key: str) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config[key] = {"AutoModelForCausalLM": "evil.py--Model"} if key == "auto_map" else "org/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    model = qexport.load(folder, device="cpu")
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "auto_map")
