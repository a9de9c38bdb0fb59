"""The methods nvfp4 and mxfp4: which layers share a global scale, what is refused, and the real scales of a pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

import factories
from qexport.architectures.architecture import Checkpoint
from qexport.errors import CompatibilityError
from qexport.export import SafetensorsSettings
from qexport.export.layouts import make_layout
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.quantizing.float4 import global_scale_of, nvfp4
from qexport.quantizing.method import PassInputs, ResumePoint, RoundingMethod
from qexport.quantizing.mxfp4 import Mxfp4
from qexport.quantizing.nvfp4 import Nvfp4
from qexport.tensors import Float4Quantized, TensorRecord

NEIGHBOURS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})


def model(config: PretrainedConfig, folder: Path) -> Checkpoint:
    """A checkpoint whose matrices all have another largest weight."""
    made = factories.build(config)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.mul_(1 + number / 8)
            if parameter.dim() == 3:
                parameter.mul_(1 + torch.arange(parameter.shape[1])[None, :, None] / 8)
    factories.save(made, folder)
    return load_checkpoint(LoadSettings(base=str(folder)))


def quantized(method: RoundingMethod, checkpoint: Checkpoint, folder: Path, units: int = 0) -> dict[str, TensorRecord]:
    """The records of a pass that begins behind so many units."""
    resume = ResumePoint(units, folder, lambda _: None) if units else None
    inputs = PassInputs(
        checkpoint, method.plan(checkpoint), None, torch.bfloat16, torch.device("cpu"), folder, resume=resume
    )
    return {record.name: record for record in method.quantize(inputs)}


def sharing(name: str, names: set[str]) -> set[str]:
    """The weights whose largest magnitude decides on the global scale of this one."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    found = next((each for each in NEIGHBOURS if leaf in each), {leaf})
    return {f"{parent}.{each}.weight" for each in found} & names


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3 moe", "phi 3", "falcon 40b"])
def test_layers_that_servers_join_share_their_global_scale(family: str, tmp_path: Path) -> None:
    checkpoint = model(factories.FAMILIES[family], tmp_path)
    found = quantized(Nvfp4(), checkpoint, tmp_path)
    names = {name for name, record in found.items() if isinstance(record.value, Float4Quantized)}
    scales = set[float]()
    for name in names:
        weight, value = checkpoint.weights.read(name), found[name].value
        largest = max(float(checkpoint.weights.read(each).abs().max()) for each in sharing(name, names))
        assert isinstance(value, Float4Quantized)
        assert value.equals(nvfp4(weight, global_scale_of(largest))), name
        scales.add(largest)
    assert len(scales) > len(names) / 4, "not one scale for all"


def test_a_layer_that_is_skipped_has_no_part_in_the_global_scale(tmp_path: Path) -> None:
    checkpoint = model(factories.llama_config(), tmp_path)
    found = quantized(Nvfp4(skip_modules=["*.up_proj"]), checkpoint, tmp_path)
    name = "model.layers.0.mlp.gate_proj.weight"
    value, weight = found[name].value, checkpoint.weights.read(name)
    assert isinstance(value, Float4Quantized)
    assert value.equals(nvfp4(weight, global_scale_of(float(weight.abs().max()))))


def test_a_pass_that_goes_on_finds_the_same_scales(tmp_path: Path) -> None:
    checkpoint = model(factories.llama_config(), tmp_path)
    whole = quantized(Nvfp4(), checkpoint, tmp_path)
    rest = quantized(Nvfp4(), checkpoint, tmp_path, units=2)
    assert 0 < len(rest) < len(whole)
    for name, record in rest.items():
        expected = whole[name].value
        if isinstance(expected, Float4Quantized):
            assert isinstance(record.value, Float4Quantized)
            assert record.value.equals(expected)


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        (Nvfp4(), factories.gpt2_config(), r"nvfp4 does not fit layers whose weights are stored \[in, out\]"),
        (Mxfp4(), factories.gpt2_config(), r"mxfp4 does not fit layers whose weights are stored \[in, out\]"),
        (Nvfp4(), factories.llama_config(intermediate_size=120), "groups of 16 inputs, and model.layers.0.mlp.down"),
        (Mxfp4(), factories.llama_config(intermediate_size=112), "groups of 32 inputs, and model.layers.0.mlp.down"),
    ],
)
def test_layers_that_do_not_fit_are_refused_with_a_way_out(
    method: RoundingMethod, config: PretrainedConfig, words: str, tmp_path: Path
) -> None:
    checkpoint = model(config, tmp_path)
    with pytest.raises(CompatibilityError, match=words):
        method.plan(checkpoint)


def test_a_layer_named_in_the_refusal_can_be_skipped(tmp_path: Path) -> None:
    checkpoint = model(factories.llama_config(intermediate_size=112), tmp_path)
    outputs = Mxfp4(skip_modules=["*.down_proj"]).plan(checkpoint)
    layout = make_layout(SafetensorsSettings(), outputs, checkpoint.architecture.structure, checkpoint)
    assert layout.quantization is not None
    assert "model.layers.0.mlp.down_proj" in layout.quantization["ignore"]
