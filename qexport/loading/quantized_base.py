"""A base that is quantized already, read as what it dequantizes to. One tensor at a time; nothing is rounded again.

bitsandbytes' 4 bits dequantize to the dtype that was quantized, as `dequantize_4bit` does; all other codes to float32,
in which code and scale are multiplied. Libraries that multiply in the dtype of the scales round once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any, Final

import torch

from qexport.architectures.architecture import Architecture
from qexport.errors import InputError, listed
from qexport.formats import reader_of
from qexport.formats.bitsandbytes import llm_int8
from qexport.formats.format import FormatReader
from qexport.formats.stored_weight import WHERE, StoredWeight
from qexport.loading.model_weights import ChunkedSource
from qexport.reading.quantized_linear import dequantize
from qexport.tensors import BlockQuantizedSpec, GroupQuantizedSpec, RowQuantized
from qexport.tensors.source import TensorSpec, is_finite

READ: Final = ("bitsandbytes", "gptq", "compressed-tensors", "fp8")
"""The methods whose codes say exactly what each weight is."""

_MEND: Final = "name the 16-bit model that it was made from"


def take_quantization(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Takes the `quantization_config` out of a config.json; None if the base is not quantized.

    Args:
        config: the content of config.json, which loses it.
        where: the file, for the errors.

    Raises:
        InputError: the base is quantized in a way that cannot be read exactly.
    """
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    if any(each.get("quantization_config") for each in inner) or _compressed([config, *inner]):
        raise _not_read("in a part of the model, or by an old version of compressed-tensors", where)
    found = config.pop("quantization_config", None)
    if not found:
        return None
    if not isinstance(found, dict) or found.get("quant_method") not in READ:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise _not_read(f"with quant_method {method!r}", where)
    return found


def _compressed(parts: list[Mapping[str, Any]]) -> bool:
    return any(each.get("compression_config") for each in parts)


def _not_read(how: str, where: str) -> InputError:
    return InputError(
        f"the base is quantized already {how}; qexport reads bases of {', '.join(READ[:-1])} and {READ[-1]} as what "
        "they dequantize to, and no others",
        where=f"{where}: quantization_config",
        mend=_MEND,
    )


class DequantizedSource:
    """The tensors of a quantized folder: each quantized module appears as its `weight`, dequantized when it is read.

    Args:
        stored: the folder's tensors.
        quantization: its `quantization_config`.
        architecture: the model's.

    Attributes:
        description: how the weights are stored, for people.

    Raises:
        InputError: the config is malformed or contradicts the tensors.
    """

    def __init__(self, stored: ChunkedSource, quantization: dict[str, Any], architecture: Architecture) -> None:
        self._stored = stored
        reader = reader_of(quantization)
        self.description = reader.description
        self._modules = reader.weights(stored)
        self._refuse_contradictions(reader, architecture)
        prefix = f"{architecture.skeleton.base_model_prefix}."
        transposed = architecture.structure.transposed
        self._transposed = transposed | {name.removeprefix(prefix) for name in transposed}
        self._specs = dict(self._dequantized_specs())

    def _refuse_contradictions(self, reader: FormatReader, architecture: Architecture) -> None:
        if not self._modules:
            raise InputError(
                "config.json says that the base is quantized, but no module of it holds codes",
                where=WHERE,
                mend="remove quantization_config if the weights are unquantized, or fetch the model again",
            )
        without = reader.claimed(architecture.structure) - self._modules.keys()
        unquantized = [module for module in sorted(without) if f"{module}.weight" in self._stored.specs()]
        twice = [
            module
            for module, weight in self._modules.items()
            if "weight" not in weight.parts and f"{module}.weight" in self._stored.specs()
        ]
        if unquantized or twice:
            problems = [f"{module}: unquantized, but quantized according to the config" for module in unquantized]
            problems += [f"{module}: stored both unquantized and quantized" for module in twice]
            raise InputError("the weights contradict config.json", where=listed(problems), mend="fetch it again")

    def _dequantized_specs(self) -> Iterator[tuple[str, TensorSpec]]:
        parts = {f"{module}.{part}": module for module, weight in self._modules.items() for part in weight.parts}
        seen: Set[str] = set()
        for name, spec in self._stored.specs().items():
            module = parts.get(name)
            if module is None:
                yield name, spec
            elif module not in seen:
                seen |= {module}
                shape = self._modules[module].shape
                turned = shape[::-1] if module in self._transposed else shape
                yield f"{module}.weight", TensorSpec(turned, _dtype(self._modules[module]))

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every parameter's shape and dtype, in the order of the files."""
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """The parameter, dequantized.

        Raises:
            InputError: it is missing or cut short, or its codes contradict the quantization config.
        """
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self._modules:
            return self._stored.read(name)
        weight = self._modules[module]
        codes = weight.quantized({part: self._finite(f"{module}.{part}") for part in weight.parts})
        if isinstance(codes, RowQuantized) and isinstance(weight, llm_int8.LlmInt8Weight):
            matrix = llm_int8.dequantize(codes)
        else:
            matrix = dequantize(codes, _dtype(weight))
        return matrix.t().contiguous() if module in self._transposed else matrix

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self._stored.read(name)
        if not is_finite(tensor):
            raise InputError("the tensor has NaN or Inf", where=self._stored.place(name), mend="fetch the file again")
        return tensor

    def place(self, name: str) -> str:
        """The tensor's file and its name there; of a quantized module, the place of its codes."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._modules:
            return self._stored.place(f"{module}.{self._modules[module].parts[0]}")
        return self._stored.place(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces; those of a quantized module in one."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._modules:
            yield memoryview(bytes(self.read(name).reshape(-1).view(torch.uint8).numpy()))
        else:
            yield from self._stored.chunks(name)


def _dtype(weight: StoredWeight) -> torch.dtype:
    spec: BlockQuantizedSpec | GroupQuantizedSpec | None = getattr(weight, "spec", None)
    return spec.dtype if isinstance(spec, BlockQuantizedSpec) else torch.float32
