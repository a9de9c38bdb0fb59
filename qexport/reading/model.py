"""`qexport.load`: a finished artifact as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from qexport.architectures.buffers import compute_buffers
from qexport.architectures.code_keys import without_code_keys
from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure, build_on_meta, describe_model, parse_config
from qexport.errors import InputError, QexportError, listed
from qexport.reading.artifact_source import ArtifactSource
from qexport.reading.quantized_linear import QuantizedLinear
from qexport.tensors.contained_path import contained_path
from qexport.tensors.strict_json import read_json_object

_GENERATION_NAME: Final = "generation_config.json"
_GENERATION_LIMIT: Final = 1 << 20


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a finished folder, ready for `generate`.

    Quantized layers keep the tensors of the file, so the model takes the memory of the artifact; each forward
    dequantizes one weight after the other. Neither bitsandbytes nor gptqmodel is needed, and nothing from the folder is
    executed.

    Args:
        path: an artifact of qexport (of several layouts, the folder of one of them), or a folder of another maker in
            one of the formats: dense, AutoGPTQ v1, bitsandbytes, compressed-tensors.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`.
        dtype: to compute in; the dtype of the artifact's dense weights where None.

    Raises:
        RecipeError: the device is not there.
        InputError: a file is missing or malformed, or the tensors are not those of the model.
        CompatibilityError: transformers does not know the family.
    """
    folder, where = _model_folder(Path(path)), find_device(device)
    with torch.no_grad(), ArtifactSource(folder, dtype=torch.float32) as source:
        model = _build(source, dtype)
        structure = describe_model(model)
        source.check_complete(structure)
        for name in structure.parameters:
            if name.removesuffix(".weight") not in source.quantized:
                _put(model, name, source.read(name), where)
        for module in source.quantized:
            _quantize(model, module, source, where)
        compute_buffers(model, where)
    model.tie_weights()
    _refuse_empty(model)
    if (generation := contained_path(folder, _GENERATION_NAME)).is_file():
        model.generation_config = GenerationConfig.from_dict(read_json_object(generation, limit=_GENERATION_LIMIT))
    model.eval()
    return model


def _model_folder(path: Path) -> Path:
    """Refuses the folder above several layouts."""
    if not (path / "config.json").is_file():
        layouts = sorted(str(found.parent) for found in path.glob("*/config.json"))
        mend = f"load one of its layouts: {', '.join(layouts)}" if layouts else "name the folder of an artifact"
        raise InputError("the folder holds no config.json", where=str(path), mend=mend)
    return path


def _build(source: ArtifactSource, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model on the meta device, in the dtype to compute in."""
    config = parse_config(without_code_keys(source.config)[0])
    config.dtype = dtype or _dense_dtype(source, describe_model(build_on_meta(config)))
    return build_on_meta(config)


def _dense_dtype(source: ArtifactSource, structure: Structure) -> torch.dtype:
    embedding = f"{structure.embedding}.weight"
    if embedding not in source.specs():
        raise InputError("the artifact has no input embedding", where=embedding)
    return source.specs()[embedding].dtype


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A dense parameter or persistent buffer, floating ones in the model's dtype."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(device=device, dtype=model.dtype if tensor.is_floating_point() else tensor.dtype)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _quantize(model: PreTrainedModel, module: str, source: ArtifactSource, device: torch.device) -> None:
    """Replaces a linear whose bias is loaded."""
    linear = model.get_submodule(module)
    bias = linear.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    layer = QuantizedLinear(linear, source.quantized[module], source.tensors(module), bias)
    model.set_submodule(module, layer.to(device))


def _refuse_empty(model: PreTrainedModel) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise QexportError("parts of the model were never loaded", where=listed(empty))
