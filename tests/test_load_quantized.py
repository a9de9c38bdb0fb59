"""Bases that are quantized already, read as what they dequantize to, against the libraries that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Int8Params, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

import adapters
import factories
import stored_models
from qexport.artifact.manifest import Manifest
from qexport.errors import CompatibilityError, InputError
from qexport.formats.gptq.tensors import pack, unpack
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings, TrainedOn
from qexport.merge.merging import merge
from qexport.pipeline import plan, run
from qexport.recipe import load_recipe
from qexport.tensors import GroupQuantized

WANTED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double quantization": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "o_proj", r"model.layers.1.mlp", "c_fc"],
    },
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": factories.llama_config(),
    "llama tied": factories.llama_config(tie_word_embeddings=True),
    "gpt2": factories.gpt2_config(),
}


def live_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Each parameter as transformers and bitsandbytes load and dequantize it, in the layout of unquantized files."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = {}
    for name, value in model.named_parameters():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if isinstance(value, Params4bit):
            found[name] = functional.dequantize_4bit(value.data, value.quant_state)
        elif isinstance(value, Int8Params):
            found[name] = functional.int8_vectorwise_dequant(value.data, module.state.SCB or value.SCB)
        else:
            found[name] = value.detach()
            continue
        found[name] = found[name].t() if module.source_cls is Conv1D else found[name]
    return found


def quantized_by_transformers(config: PretrainedConfig, wanted: dict[str, Any], folder: Path) -> Path:
    factories.save(factories.build(config), folder / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=BitsAndBytesConfig(**wanted), dtype="auto"
    )
    loaded.save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_of_bitsandbytes_is_what_transformers_loads(tmp_path: Path, config: str, wanted: str) -> None:
    folder = quantized_by_transformers(CONFIGS[config], WANTED[wanted], tmp_path)
    told: list[Any] = []
    base = load_checkpoint(LoadSettings(base=str(folder)), progress=told.append)
    rounded = 0
    for path, value in live_weights(folder).items():
        name = base.architecture.naming.files[path]
        if name not in base.weights.specs():
            continue  # a tied head
        found = base.weights.read(name)
        assert base.weights.specs()[name].dtype == found.dtype == value.dtype
        assert torch.equal(found, value), path
        rounded += found.dtype == torch.float32 or found.unique().numel() < found.numel() / 4
    assert rounded
    assert "quantization_config" not in base.config
    assert base.origin.read_as is not None
    assert base.origin.read_as.endswith(", dequantized")
    assert any("the base is quantized" in event.text for event in told)


def unpacked(tensors: dict[str, torch.Tensor], bits: int, less_one: int) -> torch.Tensor:
    """The matrix [out, in], bit by bit from one long integer per column: shares no code with qexport's unpacking."""

    def numbers(words: list[int]) -> list[int]:
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        return [(stream >> (bits * index)) & ((1 << bits) - 1) for index in range(32 * len(words) // bits)]

    codes = [numbers(column) for column in tensors["qweight"].t().tolist()]
    zeros = [[(zero + less_one) % (1 << bits) for zero in numbers(row)] for row in tensors["qzeros"].tolist()]
    groups, scales = tensors["g_idx"].tolist(), tensors["scales"].double()
    return torch.tensor(
        [
            [(code - zeros[group][out]) * float(scales[group, out]) for code, group in zip(row, groups, strict=True)]
            for out, row in enumerate(codes)
        ],
        dtype=torch.float64,
    )


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_both_versions_of_gptq_s_format_against_an_unpacker_of_single_bits(
    bits: int, less_one: bool, desc_act: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns, groups = 32, 64, 2
    g_idx = torch.arange(columns) // 32
    codes = GroupQuantized(
        torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.rand(groups, rows, generator=generator).add_(0.01).half(),
        torch.randint(1, 2**bits, (groups, rows), generator=generator, dtype=torch.uint8),
        (g_idx[torch.randperm(columns, generator=generator)] if desc_act else g_idx).to(torch.int32),
        bits,
        32,
        sym=False,
        desc_act=desc_act,
    )
    stored = pack(codes)
    found = unpack(stored, bits=bits, group_size=32, sym=False, desc_act=desc_act, less_one=less_one)
    assert torch.equal(found.dequantize().double(), unpacked(stored, bits, int(less_one)))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None], ids=str)
def test_a_folder_of_gptq(tmp_path: Path, version: str | None) -> None:
    config = stored_models.GPTQ | {"checkpoint_format": version}
    if version is None:
        del config["checkpoint_format"]
    folder = stored_models.write(factories.build(factories.llama_config()), tmp_path / "base", stored_models.GPTQ)
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    base, stored = load_checkpoint(LoadSettings(base=str(folder))), load_file(folder / "model.safetensors")
    for module in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        parts = {part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        found = base.weights.read(f"{module}.weight")
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), unpacked(parts, 4, 0 if version == "gptq_v2" else 1))
    assert torch.equal(base.weights.read("model.norm.weight"), stored["model.norm.weight"])
    assert base.origin.read_as == "GPTQ, 4 bits, group_size 32, asymmetric, dequantized"


DOWN = "model.layers.1.mlp.down_proj"


def folder_of(
    name: str, folder: Path, *, config: PretrainedConfig | None = None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder, and its tensors as they are stored."""
    model = factories.build(config or factories.llama_config())
    stored_models.write(model, folder, stored_models.QUANTIZATIONS[name])
    return folder, load_file(folder / "model.safetensors")


def four_bits(words: torch.Tensor) -> torch.Tensor:
    """The codes in words along the inputs, without an offset."""
    return torch.tensor(
        [[(word >> 4 * place & 15) - 8 for word in row for place in range(8)] for row in words.tolist()]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w8a8", "compressed-tensors, int-quantized"),
        ("w4a16", "compressed-tensors, pack-quantized"),
        ("fp8", "compressed-tensors, float-quantized"),
    ],
)
def test_a_folder_of_compressed_tensors(tmp_path: Path, name: str, words: str, dtype: torch.dtype) -> None:
    """llm-compressor stores scales in the model's dtype, and int8 codes down to -128."""
    folder, tensors = folder_of(name, tmp_path / "base")
    for scale in [each for each in tensors if each.endswith("weight_scale")]:
        tensors[scale] = tensors[scale].to(dtype)
    if name == "w8a8":
        tensors[f"{DOWN}.weight"][5, 7] = -128
    save_file(tensors, folder / "model.safetensors")
    told: list[Any] = []
    base = load_checkpoint(LoadSettings(base=str(folder)), progress=told.append)
    scales = tensors[f"{DOWN}.weight_scale"].double()
    codes = four_bits(tensors[f"{DOWN}.weight_packed"]) if name == "w4a16" else tensors[f"{DOWN}.weight"]
    expected = codes.double() * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    found = base.weights.read(f"{DOWN}.weight")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
    assert base.origin.read_as == f"{words}, dequantized"
    assert "quantization_config" not in base.config
    assert any(f"the base is quantized ({words})" in event.text for event in told)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_folder_in_four_bit_floating_point(tmp_path: Path, name: str) -> None:
    folder, tensors = folder_of(name, tmp_path / "base")
    base = load_checkpoint(LoadSettings(base=str(folder)))
    packed, scales = tensors[f"{DOWN}.weight_packed"], tensors[f"{DOWN}.weight_scale"].double()
    scales = scales / tensors[f"{DOWN}.weight_global_scale"].double() if name == "nvfp4" else 2 ** (scales - 127)
    numbers = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(numbers & 7).long()] * torch.where(numbers >= 8, -1, 1)
    expected = values.double() * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)
    found = base.weights.read(f"{DOWN}.weight")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=2**-22, atol=0)
    assert base.origin.read_as == f"compressed-tensors, {name}-pack-quantized, dequantized"


@pytest.mark.parametrize("strategy", ["tensor", "block"])
def test_other_scales_of_fp8_in_compressed_tensors(tmp_path: Path, strategy: str) -> None:
    folder, tensors = folder_of("fp8 blocks" if strategy == "block" else "fp8", tmp_path / "base")
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "block_structure": [128, 128]}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = stored_models.FP8 | {"config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))
    for scale in [each for each in tensors if "weight_scale" in each]:
        found = tensors.pop(scale)
        tensors[scale.removesuffix("_inv")] = torch.tensor([0.25]) if strategy == "tensor" else found
    save_file(tensors, folder / "model.safetensors")
    base = load_checkpoint(LoadSettings(base=str(folder)))
    expected = tensors[f"{DOWN}.weight"].float() * tensors[f"{DOWN}.weight_scale"].reshape(-1, 1)
    assert torch.equal(base.weights.read(f"{DOWN}.weight"), expected)


def test_a_folder_of_deepseeks_fp8_is_what_transformers_loads(tmp_path: Path) -> None:
    """transformers dequantizes it to bfloat16 where there is no GPU, and asks for whole blocks of one size."""
    config = factories.llama_config(hidden_size=256, intermediate_size=384, num_key_value_heads=2)
    folder, _ = folder_of("fp8 blocks", tmp_path / "base", config=config)
    base = load_checkpoint(LoadSettings(base=str(folder)))
    live = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, value in live.named_parameters():
        found = base.weights.read(name)
        assert found.dtype == (torch.float32 if "_proj" in name else torch.bfloat16)
        assert torch.equal(found.bfloat16(), value), name
    assert base.origin.read_as == "FP8, blocks of 128 x 128, dequantized"


def test_blocks_of_fp8_may_end_early(tmp_path: Path) -> None:
    folder, tensors = folder_of("fp8 blocks", tmp_path, config=factories.llama_config(intermediate_size=320))
    scales = tensors[f"{DOWN}.weight_scale_inv"]
    assert scales.shape == (1, 3)
    found = load_checkpoint(LoadSettings(base=str(folder))).weights.read(f"{DOWN}.weight")
    assert torch.equal(found, tensors[f"{DOWN}.weight"].float() * scales.repeat_interleave(128, 1)[:, :320])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "fp8"}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "no module of it holds codes"),
        (stored_models.W8A8, "no module of it holds codes"),
        (stored_models.W8A8 | {"format": "mixed-precision"}, "format is 'mixed-precision'"),
        ({"quant_method": "modelopt"}, "bitsandbytes, gptq, compressed-tensors and fp8"),
        ({"bits": 4}, "quant_method None"),
        (stored_models.NF4, "no module of it holds codes"),
        (stored_models.GPTQ | {"bits": 5}, "5 bits"),
        (stored_models.GPTQ | {"checkpoint_format": "marlin"}, "'marlin'"),
        (stored_models.NF4 | {"load_in_8bit": True}, "exactly one of load_in_4bit and load_in_8bit"),
    ],
    ids=[
        "awq",
        "fp8",
        "fp8 blocks",
        "w8a8",
        "mixed",
        "modelopt",
        "no method",
        "no codes",
        "5 bits",
        "marlin",
        "two sizes",
    ],
)
def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    factories.save(factories.build(factories.llama_config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(InputError, match=message):
        load_checkpoint(LoadSettings(base=str(tmp_path)))


@pytest.mark.parametrize("fault", ["unquantized", "twice", "NaN", "cut"])
def test_tensors_that_contradict_the_config(tmp_path: Path, fault: str) -> None:
    folder = stored_models.write(factories.build(factories.llama_config()), tmp_path / "base", stored_models.GPTQ)
    tensors, module = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj"
    match fault:
        case "unquantized":
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{module}.{part}"]
            tensors[f"{module}.weight"] = torch.zeros(128, 64)
        case "twice":
            tensors[f"{module}.weight"] = torch.zeros(128, 64)
        case "NaN":
            tensors[f"{module}.scales"][0, 0] = torch.nan
        case _:
            tensors[f"{module}.qweight"] = tensors[f"{module}.qweight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"contradict config.json|NaN or Inf|expected torch.int32") as caught:
        load_checkpoint(LoadSettings(base=str(folder))).weights.read(f"{module}.weight")
    assert module in str(caught.value.where)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """An NF4 base, an adapter that is small beside its steps, and a recipe."""
    model = factories.build(factories.llama_config())
    stored_models.write(model, tmp_path / "base", stored_models.NF4)
    factories.tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    adapters.save_adapter(model, config, tmp_path / "adapter", spread=0.01)
    recipe = {
        "load": {"base": "./base", "adapter": "./adapter"},
        "quantize": {"method": "none"},
        "export": [{"layout": "safetensors"}],
        "output": "./out",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_an_adapter_is_merged_into_what_the_base_dequantizes_to(job: Path) -> None:
    result = run(load_recipe(job / "recipe.yaml"), device="cpu")
    assert result.folder is not None
    plain = factories.build(factories.llama_config())
    plain.load_state_dict(live_weights(job / "base"))
    found = load_file(result.folder / "model.safetensors")
    for name, value in adapters.merge_with_peft(plain, job / "adapter").items():
        assert torch.equal(found[name], value), name
    assert "quantization_config" not in json.loads((result.folder / "config.json").read_text())
    assert Manifest.read(result.folder).base.read_as == "NF4, dequantized"


@pytest.mark.parametrize(
    ("method", "lost"),
    [("{method: nf4}", True), ("{method: nf4, quant_type: fp4}", False), ("{method: int8}", False)],
    ids=["nf4", "fp4", "int8"],
)
def test_a_base_is_not_rounded_to_its_own_grid_again(job: Path, method: str, lost: bool) -> None:
    recipe = load_recipe(job / "recipe.yaml", [f"quantize={method}"])
    if not lost:
        assert any("NF4, dequantized" in line for line in plan(recipe).lines())
        return
    with pytest.raises(CompatibilityError, match="the base lies on the grid of NF4") as caught:
        plan(recipe)
    assert "16-bit model" in str(caught.value.mend)


def test_a_quantized_base_is_what_training_saw(job: Path) -> None:
    base = load_checkpoint(LoadSettings(base=str(job / "base")))
    how = MergeSettings(base="as_trained", trained_on=TrainedOn(quant_type="nf4", double_quant=False))
    with pytest.raises(CompatibilityError, match="the base is quantized already"):
        merge(base, job / "adapter", how, adapter_origin=adapters.ORIGIN)
    adapters.edit_config(job / "adapter", base_model_name_or_path="org/base-bnb-4bit")
    found = merge(base, job / "adapter", MergeSettings(), adapter_origin=adapters.ORIGIN).adapter
    assert found is not None
    assert found.notes == ()
