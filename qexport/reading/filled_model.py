"""transformers models, filled with unquantized weights or with the codes of an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.lazy_model import compute_buffers
from qexport.architectures.naming import Part
from qexport.errors import QexportError, listed
from qexport.formats.stored_weight import StoredWeight, Tensors
from qexport.reading import int4_kernel
from qexport.reading.computing import Computing, WeightBudget
from qexport.reading.quantized_linear import QuantizedLinear, dequantize
from qexport.tensors import Quantized, WeightSource
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object


def as_parameter(stored: torch.Tensor | Quantized, dtype: torch.dtype, *, transposed: bool) -> torch.Tensor:
    """A parameter as files without codes hold it.

    Args:
        stored: the tensor, which stays as it is, or codes [out, in].
        dtype: of dequantized codes.
        transposed: whether a weight of this module is [in, out] if it is not quantized.
    """
    if isinstance(stored, torch.Tensor):
        return stored
    weight = dequantize(stored, dtype)
    return weight.t().contiguous() if transposed else weight


_GENERATION_NAME: Final = "generation_config.json"


class QuantizedWeights(WeightSource, Protocol):
    """Weights, some of which are stored as codes."""

    @property
    def quantized(self) -> Mapping[str, StoredWeight]:
        """How each quantized module is stored, by its path."""
        ...

    def tensors(self, module: str) -> Tensors:
        """The tensors of a quantized module as they are stored, by their names inside the module.

        Raises:
            InputError: one is cut short, or holds NaN or Inf.
        """
        ...


def unquantized_model(
    architecture: Architecture, weights: WeightSource, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A transformers model from any source of unquantized weights, ready for `generate`.

    Args:
        architecture: the model's.
        weights: named as in files; each is read once.
        dtype: of the floating weights.
        device: where to put it.

    Raises:
        CompatibilityError: transformers does not know the family.
    """
    with torch.no_grad():
        model = architecture.in_dtype(dtype).empty_model()
        compute_buffers(model, device)
        for name, part in architecture.naming.parts.items():
            _put(model, part, weights.read(name), device)
    return _finished(model)


def quantized_model(
    architecture: Architecture,
    weights: QuantizedWeights,
    *,
    dtype: torch.dtype,
    device: torch.device,
    computing: Computing,
) -> PreTrainedModel:
    """A model whose linear layers keep their codes, ready for `generate`.

    Args:
        architecture: the model's.
        weights: all parameters, quantized and unquantized.
        dtype: to compute in.
        device: where to put it.
        computing: how the layers compute with the codes.

    Raises:
        CompatibilityError: the kernel cannot serve the device, the dtype or a layer; all layers are named.
    """
    if computing.kernel == "int4":
        int4_kernel.refuse_device(device, dtype)
    with torch.no_grad():
        model = architecture.in_dtype(dtype).empty_model()
        compute_buffers(model, device)
        _fill(model, architecture.naming.parts, weights, device, computing)
    return _finished(model)


def read_generation(folder: Path) -> dict[str, Any] | None:
    """The content of generation_config.json; None if there is no such file.

    Raises:
        InputError: it is malformed.
    """
    path = contained_path(folder, _GENERATION_NAME)
    return read_json_object(path, limit=CONFIG_BYTES) if path.is_file() else None


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    model.tie_weights()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise QexportError("parts of the model were never loaded", where=listed(empty))
    model.eval()
    return model


def _fill(
    model: PreTrainedModel,
    parts: Mapping[str, Part],
    source: QuantizedWeights,
    device: torch.device,
    computing: Computing,
) -> None:
    """Loads the unquantized parameters, including biases, then replaces linears by quantized layers."""
    layers = {name for name, part in parts.items() if _is_layer(name, part, source)}
    for name, part in parts.items():
        if name not in layers:
            _put(model, part, source.read(name), device)
    budget, unserved = WeightBudget(computing.cache_bytes), dict[str, str]()
    for name in layers:
        module, path = name.removesuffix(".weight"), parts[name].parameter.rpartition(".")[0]
        linear = model.get_submodule(path)
        assert linear.bias is None or isinstance(linear.bias, torch.Tensor)
        weight, tensors = source.quantized[module], source.tensors(module)
        layer = QuantizedLinear(linear, weight, tensors, linear.bias, budget=budget, kernel=computing.kernel)
        model.set_submodule(path, layer.to(device))
        if computing.kernel == "int4" and (why := int4_kernel.layer_obstacle(layer.codes(), device)):
            unserved[module] = why
    if computing.kernel == "int4":
        experts = {name.removesuffix(".weight") for name, part in parts.items() if part.expert is not None}
        unserved |= dict.fromkeys(sorted(experts & source.quantized.keys()), "experts are dequantized on loading")
        int4_kernel.refuse_layers(unserved, len(layers))


def _is_layer(name: str, part: Part, source: QuantizedWeights) -> bool:
    return name.removesuffix(".weight") in source.quantized and part.expert is None


def _put(model: PreTrainedModel, part: Part, tensor: torch.Tensor, device: torch.device) -> None:
    """Sets an unquantized parameter, a persistent buffer, or an expert's part of a parameter, in the model's dtype."""
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
