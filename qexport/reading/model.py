"""`qexport.load`: a finished artifact as a model of transformers, whose linear layers keep their codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qexport.architectures.buffers import compute_buffers
from qexport.architectures.config_keys import without_code_keys
from qexport.architectures.devices import find_device
from qexport.architectures.naming import Part, name_parameters
from qexport.architectures.structure import Structure, build_on_meta, describe_model, parse_config
from qexport.errors import CompatibilityError, InputError, QexportError, RecipeError, listed
from qexport.formats.dequantization import dequantize
from qexport.formats.stored_weight import StoredWeight, Tensors
from qexport.reading.artifact_source import ArtifactSource, model_folder
from qexport.reading.stored_model import holds_graph
from qexport.tensors import WeightSource
from qexport.tensors.strict_files import contained_path, read_json_object


class QuantizedLinear(nn.Module):
    """Takes the place of a linear layer; holds the tensors of the file and dequantizes them in each forward.

    The product is the one of the class that it replaces (`nn.Linear`, `FalconLinear`, GPT-2's `Conv1D`), so that the
    outputs are those of the dense layer with the dequantized weight, bit for bit.

    Args:
        linear: the layer to replace, on any device.
        weight: how the weight is stored.
        tensors: the weight, as `weight.parts` names it.
        bias: [out], or None.

    Raises:
        InputError: the tensors contradict each other or the config, or a value is out of range.
    """

    def __init__(self, linear: nn.Module, weight: StoredWeight, tensors: Tensors, bias: Tensor | None) -> None:
        super().__init__()
        weight.quantized(tensors)
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._transposed = isinstance(linear, Conv1D)
        self._product: Callable[..., Tensor] = type(linear).forward
        for part in weight.parts:
            self.register_buffer(_attribute(part), tensors[part])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's outputs [..., out] for inputs [..., in], with the weight in the dtype of the inputs."""
        with torch.no_grad():
            weight = self.dequantized(inputs.dtype)
            weight = weight.t().contiguous() if self._transposed else weight
        return self._product(SimpleNamespace(weight=weight, bias=self.bias, nf=self.out_features), inputs)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""
        tensors = {part: getattr(self, _attribute(part)) for part in self._weight.parts}
        return dequantize(self._weight.quantized(tensors), dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {type(self._weight).__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Codes and scales follow to another device; `model.half()` and its like change the bias only."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        raise CompatibilityError(
            "a loaded artifact cannot be saved again: readers would take its codes for weights",
            mend="copy the artifact's folder",
        )


def _attribute(part: str) -> str:
    """A buffer's name has no dots."""
    return part.replace(".", "_")


_GENERATION_NAME: Final = "generation_config.json"
_GENERATION_LIMIT: Final = 1 << 20


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a finished folder, ready for `generate`.

    Quantized layers keep the tensors of the file, so the model takes the memory of the artifact; each forward
    dequantizes one weight after the other. The experts of a mixture are the exception: transformers holds them in one
    parameter, so they are dequantized here and take the memory of a dense model. Neither bitsandbytes nor gptqmodel is
    needed, and nothing from the folder is executed.

    Args:
        path: an artifact of qexport (of several layouts, the folder of one of them), or a folder of another maker in
            one of the formats: dense, AutoGPTQ v1, bitsandbytes, compressed-tensors; or an ONNX graph, which ONNX
            Runtime computes.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`.
        dtype: to compute in; the dtype of the artifact's dense weights where None. A graph has its own.

    Raises:
        RecipeError: the device is not there, the extra `onnx` is not installed, or a graph computes in another dtype.
        InputError: a file is missing or malformed, or the tensors are not those of the model.
        CompatibilityError: transformers does not know the family.
    """
    folder, where = model_folder(Path(path)), find_device(device)
    if holds_graph(folder):
        return _open_graph(folder, where, dtype)
    with torch.no_grad(), ArtifactSource(folder, dtype=torch.float32) as source:
        model = _build(source, dtype)
        source.check_complete(describe_model(model))
        compute_buffers(model, where)
        _fill(model, source, where)
    model.tie_weights()
    _refuse_empty(model)
    if (generation := contained_path(folder, _GENERATION_NAME)).is_file():
        model.generation_config = GenerationConfig.from_dict(read_json_object(generation, limit=_GENERATION_LIMIT))
    model.eval()
    return model


def dense_model(
    config: Mapping[str, Any], weights: WeightSource, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model from any source of dense weights, as transformers would hold it, ready for `generate`.

    Args:
        config: the content of config.json.
        weights: named as in files; every one of them is read, once.
        dtype: of the floating weights.
        device: where to put it.

    Raises:
        CompatibilityError: transformers does not know the family.
    """
    parsed = parse_config(config)
    parsed.dtype = dtype
    with torch.no_grad():
        model = build_on_meta(parsed)
        compute_buffers(model, device)
        for name, part in name_parameters(model).parts.items():
            _put(model, part, weights.read(name), device)
    model.tie_weights()
    _refuse_empty(model)
    model.eval()
    return model


def _open_graph(folder: Path, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    from qexport.reading.onnx.model import open_model

    model = open_model(folder, device=device)
    if dtype not in (None, model.dtype):
        raise RecipeError(
            f"the graph computes in {model.dtype}, not in {dtype}",
            where=str(folder),
            mend="leave `dtype` out, or export the model with other `activations`",
        )
    return model


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


def _fill(model: PreTrainedModel, source: ArtifactSource, device: torch.device) -> None:
    """Loads what is dense, biases among it, then puts quantized layers in the place of linears."""
    parts = name_parameters(model).parts
    layers = {name for name, part in parts.items() if _is_layer(name, part, source)}
    for name, part in parts.items():
        if name not in layers:
            _put(model, part, source.read(name), device)
    for name in layers:
        module, path = name.removesuffix(".weight"), parts[name].parameter.rpartition(".")[0]
        linear = model.get_submodule(path)
        assert linear.bias is None or isinstance(linear.bias, torch.Tensor)
        layer = QuantizedLinear(linear, source.quantized[module], source.tensors(module), linear.bias)
        model.set_submodule(path, layer.to(device))


def _is_layer(name: str, part: Part, source: ArtifactSource) -> bool:
    return name.removesuffix(".weight") in source.quantized and part.expert is None


def _put(model: PreTrainedModel, part: Part, tensor: torch.Tensor, device: torch.device) -> None:
    """A dense parameter or persistent buffer, floating ones in the model's dtype; or an expert's share of one."""
    path, _, leaf = part.parameter.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(device=device, dtype=model.dtype if tensor.is_floating_point() else tensor.dtype)
    if part.expert is not None:
        whole = module.get_parameter(leaf).data
        if whole.is_meta:
            whole = torch.full(whole.shape, torch.nan, dtype=model.dtype, device=device)
        part.of(whole).copy_(tensor)
        tensor = whole
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _refuse_empty(model: PreTrainedModel) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise QexportError("parts of the model were never loaded", where=listed(empty))
