"""What a folder claims against what it holds, for each way of storing weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import factories
import stored_models
from bitsandbytes_oracle import own_values, reads_right, values
from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats import reader_of
from qexport.formats.bitsandbytes import four_bit_tensors as bitsandbytes_4bit
from qexport.formats.compressed_tensors.reading import CompressedTensorsRules
from qexport.formats.stored_weight import Scheme, SkipList
from qexport.reading.safetensors_weights import SafetensorsWeights
from quantized_models import QuantizedModel
from stored_models import FP4, FP8, FP8_BLOCKS, NF4, NF4_DOUBLE, QUANTIZATIONS, W4A16

UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


_KEPT: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One folder in each format, copied by the tests that change it."""
    model = factories.build(factories.llama_config())
    for name, quantization in QUANTIZATIONS.items():
        _KEPT[name] = stored_models.write(model, tmp_path_factory.mktemp("kept") / "a", quantization)


def written(folder: Path, name: str) -> Path:
    shutil.copytree(_KEPT[name], folder)
    return folder


def structure(folder: Path) -> Structure:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    return Architecture(config).structure


def read_all(folder: Path) -> None:
    """What verification and `qexport.load` do."""
    with SafetensorsWeights(folder, dtype=torch.float32) as source:
        source.check_complete(structure(folder))
        for name in source.specs():
            source.read(name)


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    QuantizedModel(factories.build(factories.llama_config())).write(tmp_path / "gptq")
    return tmp_path / "gptq"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return factories.save(factories.build(factories.llama_config()), tmp_path / "dense")


def test_a_folder_that_claims_a_method_and_holds_no_quantized_layer_is_refused(gptq: Path, dense: Path) -> None:
    quantization = json.loads((gptq / "config.json").read_text())["quantization_config"]
    edit_config(dense, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(InputError, match="claims quant_method 'gptq', but no layer is quantized"):
        SafetensorsWeights(dense, dtype=torch.float32)


def test_quantized_tensors_without_a_quantization_config_are_refused(gptq: Path) -> None:
    edit_config(gptq, lambda config: config.pop("quantization_config"))
    with pytest.raises(InputError, match="14 tensors belong to quantized layers"):
        SafetensorsWeights(gptq, dtype=torch.float32)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ([], "must be an object"),
        ("gptq", "must be an object"),
        ({}, "quant_method is None"),
        ({"quant_method": "hqq"}, "quant_method is 'hqq'"),
        ({"quant_method": ["gptq"]}, r"quant_method is \['gptq'\]"),
    ],
)
def test_a_method_that_no_reader_knows_is_refused(gptq: Path, quantization: Any, message: str) -> None:
    edit_config(gptq, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(InputError, match=message):
        SafetensorsWeights(gptq, dtype=torch.float32)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [("scales", torch.ones(8, dtype=torch.float16)), ("g_idx", torch.zeros(1, 64, dtype=torch.int32))],
)
def test_a_part_with_other_dimensions_is_refused(gptq: Path, part: str, tensor: torch.Tensor) -> None:
    module = "model.layers.0.mlp.up_proj"
    save_file(load_file(gptq / "model.safetensors") | {f"{module}.{part}": tensor}, gptq / "model.safetensors")
    with pytest.raises(InputError, match=r"do not have the shapes \[groups, out\] and \[in\]") as caught:
        SafetensorsWeights(gptq, dtype=torch.float32)
    assert caught.value.where == module


@pytest.mark.parametrize("quantization", [NF4, NF4_DOUBLE, FP4], ids=["nf4", "nf4 double", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_bits_mean_what_bitsandbytes_says(
    tmp_path: Path, quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    model = factories.build(factories.llama_config(), dtype=torch.bfloat16)
    weight = model.get_parameter(f"{UP}.weight")
    codes, state = functional.quantize_4bit(
        weight,
        quant_type=quantization["bnb_4bit_quant_type"],
        compress_statistics=quantization["bnb_4bit_use_double_quant"],
    )
    stored_models.write(model, tmp_path / "a", quantization)
    with SafetensorsWeights(tmp_path / "a", dtype=dtype) as source:
        source.check_complete(structure(tmp_path / "a"))
        assert len(source.quantized) == 14
        assert source.specs()[f"{UP}.weight"].dtype == dtype
        assert torch.equal(source.read(f"{UP}.weight"), values(codes, state).to(dtype))
        assert reads_right(weight.shape, state.blocksize)
        assert torch.equal(source.read(f"{UP}.weight"), own_values(codes, state).to(dtype))


def test_int8_means_codes_times_absmax_over_127(tmp_path: Path) -> None:
    written(tmp_path / "a", "int8")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    exact = tensors[f"{UP}.weight"].double() * tensors[f"{UP}.SCB"].double()[:, None] / 127
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        read = source.read(f"{UP}.weight")
    assert torch.allclose(read.double(), exact, rtol=2**-22, atol=0)


def test_w8a8_means_codes_times_scale(tmp_path: Path) -> None:
    written(tmp_path / "a", "w8a8")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        expected = tensors[f"{UP}.weight"].float() * tensors[f"{UP}.weight_scale"]
        assert torch.equal(source.read(f"{UP}.weight"), expected)


def test_fp8_means_codes_times_scale(tmp_path: Path) -> None:
    """Scales in 16 bits are read as they are; int8 codes of other programs reach to -128."""
    written(tmp_path / "a", "fp8")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].bfloat16()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        expected = tensors[f"{UP}.weight"].float() * tensors[f"{UP}.weight_scale"].float()
        assert torch.equal(source.read(f"{UP}.weight"), expected)
        assert source.rounds_activations


def test_blocks_of_fp8_mean_codes_times_the_blocks_scale(tmp_path: Path) -> None:
    model = factories.build(factories.llama_config(hidden_size=192, num_attention_heads=4, intermediate_size=320))
    stored_models.write(model, tmp_path / "a", FP8_BLOCKS)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    scales = tensors[f"{UP}.weight_scale_inv"]
    assert scales.shape == (3, 2)
    each = scales.repeat_interleave(128, 0)[:320].repeat_interleave(128, 1)[:, :192]
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        assert torch.equal(source.read(f"{UP}.weight"), tensors[f"{UP}.weight"].float() * each)
        assert source.rounds_activations


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_four_bit_floating_point_means_values_times_scale(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a", name)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    packed, scales = tensors[f"{UP}.weight_packed"], tensors[f"{UP}.weight_scale"].float()
    numbers = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(numbers & 7).long()] * torch.where(numbers >= 8, -1, 1)
    each = scales / tensors[f"{UP}.weight_global_scale"] if name == "nvfp4" else 2 ** (scales - 127)
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        expected = values * each.repeat_interleave(values.shape[1] // scales.shape[1], 1)
        assert torch.equal(source.read(f"{UP}.weight"), expected)
        assert not source.rounds_activations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_sixteen_bits_and_codes_of_minus_128(tmp_path: Path, dtype: torch.dtype) -> None:
    """llm-compressor rounds a row's least value to -128, and stores scales in the model's dtype."""
    written(tmp_path / "a", "w8a8")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].to(dtype)
    tensors[f"{UP}.weight"][0, 0] = -128
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        expected = tensors[f"{UP}.weight"].float() * tensors[f"{UP}.weight_scale"].float()
        assert torch.equal(source.read(f"{UP}.weight"), expected)


def test_w4a16_means_codes_less_eight_times_scale(tmp_path: Path) -> None:
    written(tmp_path / "a", "w4a16")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    words = tensors[f"{UP}.weight_packed"].long() & 0xFFFFFFFF
    codes = ((words[:, :, None] >> torch.arange(0, 32, 4)) & 15).flatten(1)
    scale = tensors[f"{UP}.weight_scale"].float().repeat_interleave(32, dim=1)
    with SafetensorsWeights(tmp_path / "a", dtype=torch.float32) as source:
        assert torch.equal(source.read(f"{UP}.weight"), (codes - 8) * scale)


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.layers.0.mlp", "q_proj", "lm_head"]),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4 double", "fp4 with skips", "int8"],
)
def test_what_transformers_and_bitsandbytes_save_is_read(tmp_path: Path, quantization: BitsAndBytesConfig) -> None:
    factories.build(factories.llama_config()).save_pretrained(tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    stock.save_pretrained(tmp_path / "a")
    read_all(tmp_path / "a")


def change_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Changes the JSON text of one layer; None takes a key out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[:1].copy_(torch.tensor(value))


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def cut(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


FAULTS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("nf4", change_state(shape=[64, 128]), "not the model"),
    ("nf4", change_state(shape=[127, 64]), "not the model"),
    ("nf4", change_state(shape="64"), "shape"),
    ("nf4", change_state(blocksize=128), "expected torch"),
    ("nf4", change_state(blocksize=63), "blocksize"),
    ("nf4", change_state(dtype="int8"), "dtype"),
    ("nf4", change_state(quant_type="fp4"), "quant_type"),
    ("nf4", change_state(dtype=None), "must have the keys"),
    ("nf4", change_state(extra=1), "must have the keys"),
    ("nf4", put(STATE, torch.tensor(list(b'{"a": 1, "a": 1}'), dtype=torch.uint8)), "appears twice"),
    ("nf4", put(STATE, torch.tensor(list(b"{"), dtype=torch.uint8)), "not valid JSON"),
    ("nf4", put(STATE, torch.zeros(4)), "not valid JSON"),
    ("nf4", fill(f"{UP}.weight.absmax", torch.nan), "NaN"),
    ("nf4", fill(f"{UP}.weight.absmax", torch.inf), "NaN or Inf"),
    ("nf4", fill(f"{UP}.weight.absmax", -1.0), "negative"),
    ("nf4", fill(f"{UP}.weight.quant_map", 0.5), "code book"),
    ("nf4", cut(f"{UP}.weight.absmax"), "expected torch"),
    ("nf4", cut(f"{UP}.weight"), "expected torch"),
    ("nf4", drop(f"{UP}.weight.absmax"), "lacks weight.absmax"),
    ("nf4", put(f"{UP}.weight.nested_absmax", torch.zeros(1)), "not the model"),
    ("nf4", drop(STATE), "not the model"),
    ("nf4 double", fill(f"{UP}.weight.nested_absmax", torch.nan), "NaN"),
    ("nf4 double", drop(f"{UP}.weight.nested_quant_map"), "lacks weight.nested_quant_map"),
    ("nf4 double", change_state(nested_offset="x"), "nested_offset"),
    ("nf4 double", change_state(nested_offset=None), "must have the keys"),
    ("int8", fill(f"{UP}.SCB", torch.nan), "NaN"),
    ("int8", fill(f"{UP}.SCB", -1.0), "negative"),
    ("int8", fill(f"{UP}.weight", -128), "-128"),
    ("int8", cut(f"{UP}.SCB"), "not the tensors of an int8 layer"),
    ("int8", drop(f"{UP}.SCB"), "not the model"),
    ("int8", drop(f"{UP}.weight_format"), "lacks weight_format"),
    ("int8", put(f"{UP}.weight_format", torch.tensor(1, dtype=torch.uint8)), "row-major"),
    ("int8", put(f"{UP}.weight", torch.zeros(128, 64)), "is not an int8 matrix"),
    ("w8a8", fill(f"{UP}.weight_scale", torch.nan), "NaN"),
    ("w8a8", fill(f"{UP}.weight_scale", -1.0), "scale"),
    ("w8a8", drop(f"{UP}.weight"), "lacks weight"),
    ("w8a8", put(f"{UP}.weight", torch.zeros(128, 64)), "is not an int8 matrix"),
    ("w8a8", cut(f"{UP}.weight_scale"), "expected torch"),
    ("fp8", fill(f"{UP}.weight", torch.nan), "NaN"),
    ("fp8", fill(f"{UP}.weight_scale", torch.nan), "NaN"),
    ("fp8", fill(f"{UP}.weight_scale", -1.0), "a scale is negative"),
    ("fp8", put(f"{UP}.weight", torch.zeros(128, 64)), "is not a matrix in e4m3"),
    ("fp8", cut(f"{UP}.weight_scale"), "expected torch"),
    ("fp8 blocks", drop(f"{UP}.weight"), "lacks weight"),
    ("fp8 blocks", fill(f"{UP}.weight_scale_inv", -1.0), "a scale is negative"),
    ("fp8 blocks", put(f"{UP}.weight_scale_inv", torch.ones(2, 2)), "expected torch"),
    ("nvfp4", drop(f"{UP}.weight_global_scale"), "lacks weight_global_scale"),
    ("nvfp4", drop(f"{UP}.weight_scale"), "lacks weight_scale"),
    ("nvfp4", fill(f"{UP}.weight_global_scale", 0.0), "not a positive number"),
    ("nvfp4", fill(f"{UP}.weight_global_scale", torch.inf), "NaN or Inf"),
    ("nvfp4", fill(f"{UP}.weight_scale", -1.0), "a scale is negative"),
    ("nvfp4", fill(f"{UP}.weight_scale", torch.nan), "NaN"),
    ("nvfp4", put(f"{UP}.weight_scale", torch.ones(128, 4)), "expected torch"),
    ("nvfp4", cut(f"{UP}.weight_scale"), "expected torch"),
    ("nvfp4", put(f"{UP}.weight_packed", torch.zeros(128, 32)), "not a matrix of packed codes"),
    ("nvfp4", put(f"{UP}.weight_packed", torch.zeros(128, 12, dtype=torch.uint8)), "not a matrix of packed codes"),
    ("nvfp4", put(f"{UP}.weight", torch.zeros(128, 64)), "both unquantized and quantized"),
    ("mxfp4", drop(f"{UP}.weight_scale"), "lacks weight_scale"),
    ("mxfp4", fill(f"{UP}.weight_scale", 253), "gives infinite weights"),
    ("mxfp4", put(f"{UP}.weight_scale", torch.ones(128, 2)), "expected torch"),
    ("mxfp4", put(f"{UP}.weight_global_scale", torch.ones(1)), "not the model"),
    ("w8a8", put(f"{UP}.weight_zero_point", torch.zeros(1)), "not the model"),
    ("w4a16", put(f"{UP}.weight_shape", torch.tensor([64, 128])), "not the model"),
    ("w4a16", put(f"{UP}.weight_shape", torch.tensor([0, 64])), "is not a shape"),
    ("w4a16", put(f"{UP}.weight_shape", torch.zeros(2)), "must be int64"),
    ("w4a16", fill(f"{UP}.weight_scale", torch.inf), "NaN or Inf"),
    ("w4a16", cut(f"{UP}.weight_packed"), "expected torch"),
    ("w4a16", drop(f"{UP}.weight_scale"), "lacks weight_scale"),
    ("w4a16", put(f"{UP}.weight", torch.zeros(128, 64)), "both unquantized and quantized"),
]


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS, ids=[f"{each[0]}-{each[2]}" for each in FAULTS])
def test_a_planted_fault_is_refused(
    tmp_path: Path, name: str, fault: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    written(tmp_path / "a", name)
    edit_tensors(tmp_path / "a", fault)
    with pytest.raises(InputError, match=message):
        read_all(tmp_path / "a")


def quantization(change: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(change)


def weights_scheme(**changes: Any) -> dict[str, Any]:
    group = W4A16["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


def float_scheme(**changes: Any) -> dict[str, Any]:
    group = FP8["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


def float4_scheme(name: str, **changes: Any) -> dict[str, Any]:
    group = QUANTIZATIONS[name]["config_groups"]["group_0"]
    activations = {key: changes.pop(key) for key in ("input_activations",) if key in changes}
    return {"config_groups": {"group_0": group | activations | {"weights": group["weights"] | changes}}}


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("nf4", {"load_in_4bit": False, "load_in_8bit": True}, "no layer is quantized"),
    ("nf4", {"load_in_8bit": True}, "exactly one"),
    ("nf4", {"load_in_4bit": "yes"}, "exactly one"),
    ("nf4", {"bnb_4bit_quant_type": "fp4"}, "is nf4, but the quantization config says fp4"),
    ("nf4", {"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type must be nf4 or fp4"),
    ("nf4", {"bnb_4bit_use_double_quant": True}, "says nf4 with double quantization"),
    ("nf4", {"llm_int8_skip_modules": "lm_head"}, "list of strings"),
    ("nf4", {"llm_int8_skip_modules": ["(a+)+b"]}, "repeats"),
    ("nf4", {"llm_int8_skip_modules": ["("]}, "not a regular expression"),
    (
        "nf4",
        {"llm_int8_skip_modules": ["lm_head", "up_proj"]},
        f"{UP}: quantized, but unquantized according to the config",
    ),
    ("nf4", {"llm_int8_skip_modules": []}, "lm_head: unquantized, but quantized according to the config"),
    ("w8a8", {"format": "naive-quantized"}, "format is 'naive-quantized'"),
    ("w8a8", {"format": "pack-quantized"}, "no layer is quantized"),
    ("w8a8", {"kv_cache_scheme": {}}, "cache"),
    ("w8a8", {"config_groups": {}}, "config_groups must map"),
    ("w8a8", {"config_groups": {"a": {"targets": ["Linear"]}}}, "targets and weights"),
    ("w8a8", weights_scheme(), "only symmetric int8 rows"),
    ("w8a8", {"ignore": []}, "lm_head: unquantized, but quantized according to the config"),
    ("w8a8", {"ignore": ["lm_head", UP]}, f"{UP}: quantized, but unquantized according to the config"),
    ("w8a8", {"ignore": ["lm_head", "re:.*up_proj"]}, f"{UP}: quantized, but unquantized according to the config"),
    ("w8a8", {"ignore": ["re:(a+)+b"]}, "repeats"),
    ("w8a8", {"ignore": [1]}, "list of strings"),
    ("fp8", {"ignore": ["lm_head", UP]}, f"{UP}: quantized, but unquantized according to the config"),
    ("fp8", float_scheme(strategy="group"), "strategy"),
    ("fp8", float_scheme(num_bits=4), "num_bits"),
    ("fp8", float_scheme(symmetric=False), "symmetric"),
    ("fp8", float_scheme(strategy="block", block_structure=[128]), "block_structure"),
    ("fp8", float_scheme(dynamic=True), "dynamic"),
    ("nvfp4", {"ignore": ["lm_head", UP]}, f"{UP}: quantized, but unquantized according to the config"),
    ("nvfp4", float4_scheme("nvfp4", strategy="group"), "strategy"),
    ("nvfp4", float4_scheme("nvfp4", group_size=32), "group_size"),
    ("nvfp4", float4_scheme("nvfp4", num_bits=8), "num_bits"),
    ("nvfp4", float4_scheme("nvfp4", symmetric=False), "symmetric"),
    ("nvfp4", float4_scheme("nvfp4", dynamic=True), "dynamic"),
    ("nvfp4", float4_scheme("nvfp4", input_activations={"num_bits": 4}), "input_activations of NVFP4"),
    ("nvfp4", {"format": "mxfp4-pack-quantized"}, "strategy, group_size"),
    ("mxfp4", float4_scheme("mxfp4", type="int"), "type"),
    ("mxfp4", {"format": "nvfp4-pack-quantized"}, "strategy, group_size"),
    ("mxfp4", {"format": "pack-quantized"}, "num_bits, strategy"),
    ("fp8 blocks", {"weight_block_size": None}, "weight_block_size is None"),
    ("fp8 blocks", {"weight_block_size": [128, 0]}, "weight_block_size"),
    ("fp8 blocks", {"activation_scheme": "static"}, "activation_scheme 'static'"),
    ("fp8 blocks", {"fmt": "e5m2"}, "fmt 'e5m2'"),
    ("fp8 blocks", {"modules_to_not_convert": [UP]}, f"{UP}: quantized, but unquantized according to the config"),
    ("w4a16", weights_scheme(num_bits=8), "expected torch"),
    ("w4a16", weights_scheme(num_bits=3), "num_bits"),
    ("w4a16", weights_scheme(num_bits=True), "num_bits"),
    ("w4a16", weights_scheme(type="uint"), "type"),
    ("w4a16", weights_scheme(type="float"), "num_bits, strategy"),
    ("w4a16", weights_scheme(group_size=16), "expected torch"),
    ("w4a16", weights_scheme(group_size=0), "group_size"),
    ("w4a16", weights_scheme(strategy="tensor"), "strategy"),
    ("w4a16", weights_scheme(symmetric=False), "lacks weight_zero_point"),
    ("w4a16", weights_scheme(symmetric=None), "symmetric"),
    ("w4a16", weights_scheme(actorder="group"), "lacks weight_g_idx"),
    ("w4a16", weights_scheme(actorder="x"), "actorder"),
    ("w4a16", weights_scheme(dynamic=True), "dynamic"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONTRADICTIONS)
def test_a_config_that_cannot_be_followed_or_contradicts_the_tensors_is_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    written(tmp_path / "a", name)
    edit_config(tmp_path / "a", quantization(change))
    with pytest.raises(InputError) as caught:
        read_all(tmp_path / "a")
    assert message in str(caught.value)


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS.keys())
def test_a_dense_model_that_claims_a_method_is_refused(dense: Path, quantization: dict[str, Any]) -> None:
    edit_config(dense, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(InputError, match="no layer is quantized"):
        SafetensorsWeights(dense, dtype=torch.float32)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_tensors_of_each_format_are_noticed_where_nothing_claims_them(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a", name)
    edit_config(tmp_path / "a", lambda config: config.pop("quantization_config"))
    with pytest.raises(InputError, match="belong to quantized layers"):
        SafetensorsWeights(tmp_path / "a", dtype=torch.float32)


NAMES = st.lists(st.sampled_from(["model", "layers", "1", "11", "mlp", "gate", "gate_proj", "fc1"]), min_size=1).map(
    ".".join
)


@given(module=NAMES, patterns=st.lists(NAMES | st.sampled_from(["model.layers.*", "layers.1|mlp", "proj", "fc1."])))
def test_skip_lists_match_as_those_of_transformers(module: str, patterns: list[str]) -> None:
    assert SkipList(patterns, "here").matches(module) is not should_convert_module(module, patterns)


def test_compressed_tensors_names_modules_by_path_expression_or_class() -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {
        "a": {"targets": ["m.0.q", r"re:m\.1\..*"], "weights": weights},
        "b": {"targets": ["Linear"], "weights": weights | {"num_bits": 8, "strategy": "channel", "group_size": None}},
    }
    rules = CompressedTensorsRules(
        {"format": "pack-quantized", "config_groups": groups, "ignore": [r"re:.*\.k$", "head"]}
    )
    four, eight = Scheme(4, 64, sym=True, desc_act=False), Scheme(8, -1, sym=True, desc_act=False)
    found = {module: rules.scheme(module) for module in ("m.0.q", "m.1.v", "m.1.k", "m.2.q", "head")}
    assert found == {"m.0.q": four, "m.1.v": four, "m.1.k": None, "m.2.q": eight, "head": None}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**40) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
LLAMA = Architecture(json.loads(factories.llama_config().to_json_string())).structure


@given(name=st.sampled_from(sorted(QUANTIZATIONS)), value=JSON, data=st.data())
def test_a_config_with_any_other_value_is_followed_or_refused(name: str, value: Any, data: st.DataObject) -> None:
    config = copy.deepcopy(QUANTIZATIONS[name])
    places = [config, *(group["weights"] for group in config.get("config_groups", {}).values())]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    with suppress(InputError):
        reader_of(config).claimed(LLAMA)


@given(changes=st.dictionaries(st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_offset"]), JSON))
def test_a_quant_state_with_any_other_value_is_followed_or_refused(changes: dict[str, Any]) -> None:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64]} | changes
    content = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with suppress(InputError):
        spec = bitsandbytes_4bit.state_spec(content, "nf4")
        assert (spec.block_size, list(spec.shape)) == (state["blocksize"], state["shape"])
