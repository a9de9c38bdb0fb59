"""qexport's own reader of finished artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError, listed
from qexport.packing import gptq
from qexport.reading.gptq_rules import WHERE, QuantizationRules, Scheme
from qexport.tensors import GroupQuantized, TensorSpec
from qexport.tensors.contained_path import contained_path
from qexport.tensors.finite import is_finite
from qexport.tensors.safetensors_folder import SafetensorsFolder
from qexport.tensors.strict_json import read_json_object

_PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")
_CONFIG_LIMIT: Final = 1 << 24
_ROWS_AT_ONCE: Final = 512


class ArtifactSource:
    """The tensors of a folder in the safetensors layout, read from disk. A `WeightSource` and a context manager.

    A quantized module appears as its `weight`, dequantized when it is read. Only headers are read when it is made.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.

    Attributes:
        config: the content of config.json without its `quantization_config`.
        quantized: the paths of the quantized modules.

    Raises:
        InputError: config.json or the weights are missing or malformed, or the two contradict each other.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.config: dict[str, Any] = read_json_object(contained_path(folder, "config.json"), limit=_CONFIG_LIMIT)
        quantization = self.config.pop("quantization_config", None)
        self._rules = None if quantization is None else QuantizationRules(quantization)
        self._folder = SafetensorsFolder(folder)
        found = self._folder.specs()
        self.quantized = frozenset(name.removesuffix(".qweight") for name in found if name.endswith(".qweight"))
        try:
            self._specs = self._merged(found)
        except InputError:
            self.close()
            raise

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every parameter's shape and dtype, quantized ones as they are read."""
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """The parameter in memory of its own.

        Raises:
            InputError: it is missing, cut short, holds NaN or Inf, or its codes contradict the quantization config.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.quantized:
            return self._dequantized(module)
        return self._finite(name)

    def check_complete(self, structure: Structure) -> None:
        """Holds the artifact against the model that it is to be, from the headers alone.

        Raises:
            InputError: parameters are missing, unexpected or of another shape, or a linear is dense where the
                quantization config says that it is quantized, or the other way round.
        """
        expected, found = structure.parameters, self._specs
        problems = [f"{name}: missing" for name in expected if name not in found]
        problems += [f"{name}: unexpected" for name in found if name not in expected]
        problems += [
            f"{name}: shape {list(found[name].shape)}, the model asks for {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        claimed = self._claimed(structure)
        problems += [f"{module}: dense, but quantized by its config" for module in sorted(claimed - self.quantized)]
        problems += [f"{module}: quantized, but dense by its config" for module in sorted(self.quantized - claimed)]
        if problems:
            raise InputError("the artifact is not the model that it claims to be", where=listed(problems))

    def close(self) -> None:
        """Closes every shard."""
        self._folder.close()

    def __enter__(self) -> ArtifactSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claimed(self, structure: Structure) -> set[str]:
        """The modules that the config calls quantized."""
        if self._rules is None:
            return set()
        linears = {linear.name for block in structure.linears.values() for linear in block}
        claimed = {name for name in linears if self._rules.scheme(name)}
        return claimed | ({structure.head} if self._rules.lm_head else set())

    def _merged(self, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """One parameter for the four tensors of each quantized module."""
        specs: dict[str, TensorSpec] = {}
        for name, spec in found.items():
            module, _, part = name.rpartition(".")
            if module in self.quantized and part in _PARTS:
                specs[f"{module}.weight"] = self._weight_spec(module, found)
            elif module in self.quantized and part == "weight":
                raise InputError("a module is there both dense and quantized", where=self._folder.place(name))
            else:
                specs[name] = spec
        return specs

    def _weight_spec(self, module: str, found: Mapping[str, TensorSpec]) -> TensorSpec:
        if missing := [part for part in _PARTS if f"{module}.{part}" not in found]:
            raise InputError(f"a quantized module lacks {', '.join(missing)}", where=module)
        out_features, in_features = found[f"{module}.scales"].shape[-1:], found[f"{module}.g_idx"].shape
        return TensorSpec((*out_features, *in_features), self._dtype)

    def _dequantized(self, module: str) -> torch.Tensor:
        quantized = self._unpacked(module)
        weight = torch.empty(quantized.codes.shape, dtype=self._dtype)
        for start in range(0, len(weight), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            weight[rows] = quantized.rows(rows.start, rows.stop).dequantize(self._dtype)
        return weight

    def _unpacked(self, module: str) -> GroupQuantized:
        scheme = self._scheme(module)
        tensors = {part: self._finite(f"{module}.{part}") for part in _PARTS}
        return gptq.unpack(
            tensors,
            bits=scheme.bits,
            group_size=scheme.group_size,
            sym=scheme.sym,
            desc_act=scheme.desc_act,
            module=module,
        )

    def _scheme(self, module: str) -> Scheme:
        scheme = self._rules.scheme(module) if self._rules else None
        if scheme is None:
            raise InputError("a module is quantized that should be dense", where=f"{WHERE}: dynamic, {module}")
        return scheme

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self._folder.read(name)
        if not is_finite(tensor):
            raise InputError("there is NaN or Inf in it", where=self._folder.place(name))
        return tensor
