"""transformers models, filled with unquantized weights or with the codes of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qexport.architectures.architecture import Architecture
from qexport.architectures.lazy_model import compute_buffers
from qexport.architectures.naming import Part
from qexport.errors import CompatibilityError, QexportError, listed
from qexport.formats.bitsandbytes import four_bit_tensors
from qexport.formats.stored_weight import StoredWeight, Tensors
from qexport.tensors import BlockQuantized, Quantized, ValuesQuantized, WeightSource
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object

_ROWS_AT_ONCE: Final = 512


def dequantize(quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] on the device of the codes, computed in float32 and rounded to `dtype`.

    bitsandbytes' 4-bit codes are first rounded to the dtype that was quantized, as bitsandbytes does.
    """
    if isinstance(quantized, BlockQuantized):
        return four_bit_tensors.dequantize(quantized).to(dtype)
    if isinstance(quantized, ValuesQuantized):
        return quantized.dequantize(dtype)
    weight = torch.empty(quantized.codes.shape, dtype=dtype, device=quantized.codes.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        end = start + _ROWS_AT_ONCE
        weight[start:end] = quantized.rows(start, end).dequantize(dtype)
    return weight


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


class QuantizedLinear(nn.Module):
    """Replaces a linear layer; holds the stored tensors and dequantizes them in each forward.

    It calls the forward of the class that it replaces (`nn.Linear`, `FalconLinear`, GPT-2's `Conv1D`), so the outputs
    are those of the original layer with the dequantized weight, bit for bit.

    Args:
        linear: the layer to replace, on any device.
        weight: how the weight is stored.
        tensors: the stored tensors that `weight.parts` names.
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
        """Codes and scales move to another device; `model.half()` and similar calls change only the bias."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        raise CompatibilityError(
            "a loaded artifact cannot be saved again: loaders would take its codes for weights",
            mend="copy the artifact's folder",
        )


def _attribute(part: str) -> str:
    """The name of a part's buffer, which may not contain dots."""
    return part.replace(".", "_")


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
    architecture: Architecture, weights: QuantizedWeights, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model whose linear layers keep their codes, ready for `generate`.

    Args:
        architecture: the model's.
        weights: all parameters, quantized and unquantized.
        dtype: to compute in.
        device: where to put it.
    """
    with torch.no_grad():
        model = architecture.in_dtype(dtype).empty_model()
        compute_buffers(model, device)
        _fill(model, architecture.naming.parts, weights, device)
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


def _fill(model: PreTrainedModel, parts: Mapping[str, Part], source: QuantizedWeights, device: torch.device) -> None:
    """Loads the unquantized parameters, including biases, then replaces linears by quantized layers."""
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
