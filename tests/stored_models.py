"""Folders in the formats of other libraries, their tensors computed by those libraries or by plain rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.formats.gptq import tensors as gptq
from qexport.tensors import GroupQuantizedSpec
from quantized_models import round_off

NF4: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": None,
}
NF4_DOUBLE = NF4 | {"bnb_4bit_use_double_quant": True}
FP4 = NF4 | {"bnb_4bit_quant_type": "fp4"}
INT8 = NF4 | {"load_in_4bit": False, "load_in_8bit": True}
W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
    "ignore": ["lm_head"],
}
W4A16: dict[str, Any] = W8A8 | {
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
FP8: dict[str, Any] = W8A8 | {
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
NVFP4: dict[str, Any] = W8A8 | {
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "symmetric": True,
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
            },
        }
    },
}
MXFP4: dict[str, Any] = W8A8 | {
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": None,
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "desc_act": False,
}
QUANTIZATIONS = {
    "gptq": GPTQ,
    "nf4": NF4,
    "nf4 double": NF4_DOUBLE,
    "fp4": FP4,
    "int8": INT8,
    "w8a8": W8A8,
    "w4a16": W4A16,
    "fp8": FP8,
    "fp8 blocks": FP8_BLOCKS,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
}


def write(model: PreTrainedModel, folder: Path, quantization: dict[str, Any]) -> Path:
    """The model with every linear of its blocks quantized as the `quantization_config` says."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    structure = Architecture(config).structure
    if "ignore" in quantization:
        quantization = quantization | {"ignore": [structure.head]}
    for block in structure.linears.values():
        for linear in block:
            if linear.expert and quantization["quant_method"] == "bitsandbytes":
                continue
            weight = tensors.pop(f"{linear.name}.weight")
            weight = weight.t().contiguous() if linear.transposed else weight
            tensors |= {f"{linear.name}.{part}": tensor for part, tensor in _parts(weight, quantization).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def _parts(weight: Tensor, quantization: dict[str, Any]) -> dict[str, Tensor]:
    if quantization.get("load_in_4bit"):
        codes, state = functional.quantize_4bit(
            weight,
            quant_type=quantization["bnb_4bit_quant_type"],
            compress_statistics=quantization["bnb_4bit_use_double_quant"],
        )
        return {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    if quantization.get("load_in_8bit"):
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    if quantization["quant_method"] == "gptq":
        return gptq.pack(
            round_off(weight, GroupQuantizedSpec(len(weight), weight.shape[1], 4, 32, sym=False, desc_act=False))
        )
    if quantization["quant_method"] == "fp8":
        return _blocks(weight.float())
    if quantization["format"] == "float-quantized":
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    if quantization["format"] == "int-quantized":
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        return {"weight": (weight.float() / scale).round().to(torch.int8), "weight_scale": scale}
    if quantization["format"] == "nvfp4-pack-quantized":
        return _nvfp4(weight.float())
    if quantization["format"] == "mxfp4-pack-quantized":
        return _mxfp4(weight.float())
    return _groups_of_4_bits(weight.float())


def _nvfp4(weight: Tensor) -> dict[str, Tensor]:
    shared = (448 * 6 / weight.abs().max()).reshape(1)
    scale = (weight.reshape(len(weight), -1, 16).abs().amax(2) / 6 * shared).to(torch.float8_e4m3fn)
    packed = _packed_float4(weight, scale.float() / shared)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": shared}


def _mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """With the scales of the OCP's specification: the power of two below the absmax, over 4."""
    exponents = weight.reshape(len(weight), -1, 32).abs().amax(2).log2().floor() - 2
    return {"weight_packed": _packed_float4(weight, 2**exponents), "weight_scale": (exponents + 127).to(torch.uint8)}


def _packed_float4(weight: Tensor, scales: Tensor) -> Tensor:
    """Each weight as the number of the nearest of the sixteen values, the first of two in the low bits."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    quotients = weight / scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    codes = (quotients[:, :, None] - values).abs().argmin(2)
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def _blocks(weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's scale for each block of 128 x 128, block by block."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = slice(row * 128, (row + 1) * 128), slice(column * 128, (column + 1) * 128)
            scales[row, column] = weight[place].abs().amax() / 448
            codes[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}


def _groups_of_4_bits(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.reshape(len(weight), -1, 32)
    scale = (groups.abs().amax(2) / 7).half()
    codes = ((groups / scale[:, :, None]).round().clamp(-8, 7) + 8).to(torch.int64).reshape(len(weight), -1, 8)
    words = (codes << torch.arange(0, 32, 4)).sum(2)
    return {
        "weight_packed": (words - (words >> 31 << 32)).to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
