"""What a folder claims against what it holds, for each way of storing weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import factories
from qexport.errors import InputError
from qexport.reading.artifact_source import ArtifactSource
from quantized_models import QuantizedModel


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


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
        ArtifactSource(dense, dtype=torch.float32)


def test_quantized_tensors_without_a_quantization_config_are_refused(gptq: Path) -> None:
    edit_config(gptq, lambda config: config.pop("quantization_config"))
    with pytest.raises(InputError, match="14 tensors belong to quantized layers"):
        ArtifactSource(gptq, dtype=torch.float32)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ([], "must be an object"),
        ("gptq", "must be an object"),
        ({}, "quant_method is None"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"quant_method": ["gptq"]}, r"quant_method is \['gptq'\]"),
    ],
)
def test_a_method_that_no_reader_knows_is_refused(gptq: Path, quantization: Any, message: str) -> None:
    edit_config(gptq, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(InputError, match=message):
        ArtifactSource(gptq, dtype=torch.float32)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [("scales", torch.ones(8, dtype=torch.float16)), ("g_idx", torch.zeros(1, 64, dtype=torch.int32))],
)
def test_a_part_with_other_dimensions_is_refused(gptq: Path, part: str, tensor: torch.Tensor) -> None:
    module = "model.layers.0.mlp.up_proj"
    save_file(load_file(gptq / "model.safetensors") | {f"{module}.{part}": tensor}, gptq / "model.safetensors")
    with pytest.raises(InputError, match=r"are no \[groups, out\] and \[in\]") as caught:
        ArtifactSource(gptq, dtype=torch.float32)
    assert caught.value.where == module
