from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import factories
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.errors import CompatibilityError, QexportError
from qexport.export import SafetensorsSettings
from qexport.export.layouts import SafetensorsLayout
from qexport.export.model_files import model_files, write_files
from qexport.formats import GptqFormat, Outputs
from qexport.formats.gptq import tensors as gptq
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, Origin, OutputSpec, TensorRecord
from qexport.tensors.safetensors_index import INDEX_NAME
from quantized_models import FILES, QuantizedModel, Tensors, gptq_method

SETTINGS = SafetensorsSettings(layout="safetensors")
Q0, DOWN0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"


def llama(**changes: Any) -> QuantizedModel:
    return QuantizedModel(factories.build(factories.llama_config()), **changes)


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_the_folder_holds_what_readers_look_for(tmp_path: Path) -> None:
    llama().write(tmp_path)
    expected = {"model.safetensors", "config.json", "quantize_config.json", *FILES}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for name, content in FILES.items():
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    "method", [gptq_method(), gptq_method(sym=False), gptq_method(bits=3), gptq_method(desc_act=True, group_size=16)]
)
def test_codes_and_dense_weights_come_back_as_they_were(tmp_path: Path, method: GptqFormat) -> None:
    quantized = llama(method=method)
    quantized.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for record in quantized.records():
        if isinstance(record.value, torch.Tensor):
            assert torch.equal(tensors.pop(record.name), record.value)
            continue
        assert isinstance(record.value, GroupQuantized)
        module = record.name.removesuffix(".weight")
        parts = {part: tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        again = gptq.unpack(
            parts, bits=method.bits, group_size=method.group_size, sym=method.sym, desc_act=method.desc_act
        )
        assert torch.equal(again.dequantize(), record.value.dequantize())
    assert not tensors


def test_both_configs_tell_readers_the_same(tmp_path: Path) -> None:
    llama().write(tmp_path)
    quantization = read_json(tmp_path / "config.json")["quantization_config"]
    assert quantization == read_json(tmp_path / "quantize_config.json")
    expected = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "lm_head": False}
    assert quantization.items() >= expected.items()
    assert quantization["meta"] == {"quantizer": ["qexport:0.2.0"]}
    assert not {"dynamic", "modules_in_block_to_quantize"} & quantization.keys()


def test_the_base_config_is_kept(tmp_path: Path) -> None:
    quantized = llama()
    quantized.write(tmp_path)
    config = read_json(tmp_path / "config.json")
    added = {"quantization_config": config["quantization_config"], "architectures": ["LlamaForCausalLM"]}
    assert config == dict(quantized.checkpoint.config) | added | {"dtype": "bfloat16"}


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_dtype_is_told_under_the_keys_that_the_base_had(tmp_path: Path, keys: tuple[str, ...]) -> None:
    config = {"model_type": "llama", "_name_or_path": "/secret/folder"} | dict.fromkeys(keys, "float32")
    checkpoint = Checkpoint(Architecture(config), Tensors({}), {}, Origin("folder", "tiny"))
    write_files(tmp_path, model_files(checkpoint, {"quant_method": "gptq"}, torch.float16))
    written = read_json(tmp_path / "config.json")
    assert {key: value for key, value in written.items() if "dtype" in key} == dict.fromkeys(
        keys or ["dtype"], "float16"
    )
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "_name_or_path" not in written


def test_the_order_of_the_records_and_the_run_do_not_change_a_byte(tmp_path: Path) -> None:
    quantized = llama()
    quantized.write(tmp_path / "a", max_shard_size="50KB")
    layout = SafetensorsLayout(
        SafetensorsSettings(layout="safetensors", max_shard_size="50KB"), quantized.outputs, quantized.structure
    )
    (tmp_path / "b").mkdir()
    writer = layout.weights.writer(tmp_path / "b")
    for record in reversed(quantized.records()):
        writer.write(record)
    writer.finish()
    layout.write_files(tmp_path / "b", quantized.checkpoint)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert len(first) > 8
    assert first == second


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    """All layers dense, because plain transformers has no reader for GPTQ."""
    quantized = llama()
    linears = [linear.name for block in quantized.structure.linears.values() for linear in block]
    quantized = replace(quantized, special=dict.fromkeys(linears))
    quantized.write(tmp_path, max_shard_size="50KB")
    assert (tmp_path / INDEX_NAME).exists()
    config = read_json(tmp_path / "config.json")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    model, info = loaded
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    for name, tensor in quantized.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_sizes_are_those_of_the_model(tmp_path: Path) -> None:
    quantized = llama()
    written = quantized.write(tmp_path)
    assert quantized.files().parameters == sum(parameter.numel() for parameter in quantized.model.parameters())
    stored = load_file(tmp_path / "model.safetensors").values()
    assert written.total_bytes == quantized.files().total_bytes == sum(tensor.nbytes for tensor in stored)


def test_a_tied_multi_query_falcon_is_written_whole(tmp_path: Path) -> None:
    config = factories.falcon_config(hidden_size=568, num_attention_heads=71)
    QuantizedModel(factories.build(config), method=gptq_method(group_size=-1)).write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.self_attention.query_key_value.qweight"].shape == (71, 584)
    assert tensors["transformer.h.0.self_attention.query_key_value.qzeros"].shape == (1, 73)
    assert "lm_head.weight" not in tensors


def matches(dynamic: dict[str, Any], module: str) -> list[str]:
    """The rules that hold for a module, as gptqmodel and vLLM match them: from the start of the name."""
    return [rule for rule in dynamic if re.match(rule.removeprefix("-:"), module)]


def test_modules_that_differ_are_named_in_gptqmodels_and_in_transformers_words() -> None:
    quantized = llama(special={DOWN0: None, DOWN1: (8, 32), Q0: (4, -1)})
    config = quantized.method.quantization_config(quantized.specs, quantized.structure)
    linears = [linear.name for block in quantized.structure.linears.values() for linear in block]
    rules = {module: found for module in linears if (found := matches(config["dynamic"], module))}
    assert rules.keys() == {DOWN0, DOWN1, Q0}
    assert all(len(found) == 1 for found in rules.values())
    assert rules[DOWN0][0].startswith("-:")
    assert config["dynamic"][rules[DOWN1][0]] == {"bits": 8}
    assert config["dynamic"][rules[Q0][0]] == {"group_size": -1}
    assert config["modules_in_block_to_quantize"] == [[name for name in linears if name != DOWN0]]


def test_layers_with_the_same_difference_share_a_rule_that_matches_no_other_layer() -> None:
    model = factories.build(factories.llama_config(num_hidden_layers=12))
    special = {f"model.layers.{index}.mlp.up_proj": (8, 32) for index in (1, 11)}
    quantized = QuantizedModel(model, special=special)
    dynamic = quantized.method.quantization_config(quantized.specs, quantized.structure)["dynamic"]
    assert len(dynamic) == 1
    linears = [linear.name for block in quantized.structure.linears.values() for linear in block]
    assert {name for name in linears if matches(dynamic, name)} == special.keys()
    assert not matches(dynamic, "model.layers.1.mlp.up_proj_2")
    assert not matches(dynamic, "vision.model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_size_of_minus_one_needs_no_rule(bits: int) -> None:
    quantized = llama(method=gptq_method(bits=bits, group_size=-1))
    config = quantized.method.quantization_config(quantized.specs, quantized.structure)
    assert config["group_size"] == -1
    assert "dynamic" not in config


def test_a_quantized_head_is_told() -> None:
    quantized = llama(special={"lm_head": (4, 32)})
    assert quantized.method.quantization_config(quantized.specs, quantized.structure)["lm_head"] is True


def test_layers_that_cannot_be_packed_are_all_listed_before_anything_is_written() -> None:
    quantized = llama()
    specs: dict[str, OutputSpec] = dict(quantized.specs)
    for name in (Q0, DOWN0):
        specs[f"{name}.weight"] = GroupQuantizedSpec(64, 68, 4, 68, True, False)
    with pytest.raises(CompatibilityError, match="2 layers") as caught:
        SafetensorsLayout(SETTINGS, Outputs(quantized.method, specs), quantized.structure)
    assert Q0 in str(caught.value.where)
    assert DOWN0 in str(caught.value.where)


def test_a_layer_with_other_bits_than_planned_is_refused(tmp_path: Path) -> None:
    quantized = llama()
    writer = SafetensorsLayout(SETTINGS, quantized.outputs, quantized.structure).weights.writer(tmp_path)
    [record] = [record for record in llama(method=gptq_method(bits=8)).records() if record.name == f"{Q0}.weight"]
    assert isinstance(record.value, GroupQuantized)
    with pytest.raises(QexportError, match="was planned"):
        writer.write(record)


def test_a_missing_and_a_repeated_record_are_noticed(tmp_path: Path) -> None:
    quantized = llama()
    writer = SafetensorsLayout(SETTINGS, quantized.outputs, quantized.structure).weights.writer(tmp_path)
    records = quantized.records()
    for record in records[1:]:
        writer.write(record)
    with pytest.raises(QexportError, match="twice"):
        writer.write(TensorRecord(records[-1].name, records[-1].value))
    with pytest.raises(QexportError, match="never reached"):
        writer.finish()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "sub/../../evil", "config.json", "README.md"])
def test_a_file_of_the_base_cannot_leave_the_folder_or_replace_ours(tmp_path: Path, name: str) -> None:
    quantized = llama()
    checkpoint = replace(quantized.checkpoint, files={name: b"x"})
    with pytest.raises(QexportError, match=r"outside|same name") as caught:
        write_files(tmp_path, model_files(checkpoint, {"quant_method": "gptq"}, torch.bfloat16))
    assert caught.value.where == name


def test_a_rule_matches_the_layer_that_servers_make_of_siblings_which_are_alike() -> None:
    siblings = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj")
    joined = "model.layers.1.self_attn.qkv_proj"
    for special, found in ((dict.fromkeys(siblings, (4, 64)), 1), ({siblings[0]: (4, 64)}, 0)):
        quantized = QuantizedModel(factories.build(factories.llama_config()), special=special)
        dynamic = quantized.method.quantization_config(quantized.specs, quantized.structure)["dynamic"]
        assert len(matches(dynamic, joined)) == found
        assert all(len(matches(dynamic, name)) == 1 for name in special)
