"""qexport's own reader of artifacts whose weights are in safetensors files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from transformers import GenerationConfig, PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.families import without_code_keys
from qexport.architectures.structure import Structure, refuse_impossible_depth
from qexport.errors import InputError, listed
from qexport.formats import reader_of
from qexport.formats.stored_weight import StoredLayer, StoredWeight, input_roundings
from qexport.reading.computing import EXACT, Computing
from qexport.reading.filled_model import as_parameter, quantized_model, read_generation
from qexport.tensors import GroupQuantizedSpec, Quantized, TensorSpec
from qexport.tensors.safetensors_folder import SafetensorsFolder
from qexport.tensors.source import is_finite
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object


class SafetensorsWeights:
    """The tensors of a finished folder, read from disk. A `WeightSource` and a context manager.

    A quantized module appears as its `weight`, dequantized on reading. The constructor reads only headers, and tensors
    of a few bytes that describe others.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.
        like: an architecture that is likely to equal the folder's; if it does, it is reused.

    Attributes:
        folder: as given.
        kind: `weights`.
        config: the content of config.json without its `quantization_config`.
        quantization: the `quantization_config`; None if there is none.
        architecture: the architecture that config.json describes.
        quantized: how each quantized module is stored, by its path.

    Raises:
        InputError: config.json or the weights are missing or malformed, the two contradict each other, or nothing is
            quantized although the config names a method.
    """

    kind: Final = "weights"

    def __init__(self, folder: Path, *, dtype: torch.dtype, like: Architecture | None = None) -> None:
        self.folder, self._dtype = folder, dtype
        self.config: dict[str, Any] = read_json_object(contained_path(folder, "config.json"), limit=CONFIG_BYTES)
        self.quantization = self.config.pop("quantization_config", None)
        self._format = reader_of(self.quantization)
        self._folder = SafetensorsFolder(folder)
        try:
            self.architecture = Architecture.of_config(without_code_keys(self.config)[0], like)
            refuse_impossible_depth(self.architecture.parsed, len(self._folder.specs()))
            self.quantized: Mapping[str, StoredWeight] = self._format.weights(self._folder)
            if self.quantization is not None and not self.quantized:
                raise _nothing_quantized(self.quantization, folder)
            self._specs = self._merged()
        except BaseException:
            self.close()
            raise

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every parameter's shape and dtype; of quantized ones, as `read` returns them."""
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """A copy of the parameter, dequantized.

        Raises:
            InputError: it is missing, cut short, holds NaN or Inf, or its codes contradict the quantization config.
        """
        return as_parameter(self.stored(name), self._dtype, transposed=name.removesuffix(".weight") in self.transposed)

    def stored(self, name: str) -> torch.Tensor | Quantized:
        """The parameter as it is stored: a copy of the tensor, or the codes [out, in].

        Raises:
            InputError: as for `read`.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.quantized:
            return self.quantized[module].quantized(self.tensors(module))
        return self._finite(name)

    @property
    def method(self) -> str:
        """How the weights are stored, for users."""
        return self._format.description

    @property
    def rounds_activations(self) -> bool:
        """Whether runtimes round the inputs of quantized layers: W8A8 and its like."""
        return bool(input_roundings(self.layers))

    @property
    def layers(self) -> dict[str, StoredLayer]:
        """Each quantized module, by its path.

        Raises:
            InputError: a module has codes, but is unquantized according to the config.
        """
        return {module: weight.layer for module, weight in self.quantized.items()}

    @property
    def files(self) -> list[str]:
        """The names of the files with the weights, sorted."""
        return sorted(self._folder.shards)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(spec.nbytes for spec in self._folder.specs().values())

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized module, by their names inside the module.

        Raises:
            InputError: one is cut short, or holds NaN or Inf.
        """
        return {part: self._finite(f"{module}.{part}") for part in self.quantized[module].parts}

    def model(
        self, *, device: torch.device, dtype: torch.dtype | None = None, computing: Computing = EXACT
    ) -> PreTrainedModel:
        """The model, ready for `generate`; see `qexport.load`. Call `check_complete` first.

        Raises:
            InputError: a tensor cannot be read.
            CompatibilityError: the kernel cannot serve the device, the dtype or a layer.
        """
        exact = self._in_dtype(torch.float32)
        own = exact.specs()[f"{self.architecture.structure.embedding}.weight"].dtype
        model = quantized_model(self.architecture, exact, dtype=dtype or own, device=device, computing=computing)
        if self._generation is not None:
            model.generation_config = GenerationConfig.from_dict(self._generation)
        return model

    @cached_property
    def _generation(self) -> dict[str, Any] | None:
        return read_generation(self.folder)

    def check_complete(self, structure: Structure | None = None) -> None:
        """Checks that the artifact has the parameters of a model, from the headers alone.

        Args:
            structure: the model's; None for the one of config.json.

        Raises:
            InputError: a parameter is missing, unexpected or of another shape; or a linear is unquantized where the
                quantization config says that it is quantized, or the reverse.
        """
        structure = structure or self.architecture.structure
        problems = structure.differences(self._specs)
        claimed, quantized = self._format.claimed(structure), self.quantized.keys()
        problems += [
            f"{module}: unquantized, but quantized according to the config" for module in sorted(claimed - quantized)
        ]
        problems += [
            f"{module}: quantized, but unquantized according to the config" for module in sorted(quantized - claimed)
        ]
        if problems:
            raise InputError("the artifact is not the model that it claims to be", where=listed(problems))

    def close(self) -> None:
        """Closes every shard."""
        self._folder.close()

    def __enter__(self) -> SafetensorsWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _merged(self) -> dict[str, TensorSpec]:
        """The specs of all parameters: each quantized module's tensors are one parameter."""
        found = self._folder.specs()
        modules = {f"{module}.{part}": module for module, weight in self.quantized.items() for part in weight.parts}
        specs: dict[str, TensorSpec] = {}
        for name, spec in found.items():
            if (module := modules.get(name)) is not None:
                specs[f"{module}.weight"] = TensorSpec(self._shape(module), self._dtype)
            elif name.endswith(".weight") and name.removesuffix(".weight") in self.quantized:
                raise InputError("the module is stored both unquantized and quantized", where=self._folder.place(name))
            else:
                specs[name] = spec
        return specs

    def _shape(self, module: str) -> tuple[int, ...]:
        shape = self.quantized[module].shape
        return shape[::-1] if module in self.transposed else shape

    @property
    def grids(self) -> dict[str, GroupQuantizedSpec]:
        """Bits, groups and symmetry of each module that is quantized in groups along its inputs, by its path."""
        return {module: spec for module, weight in self.quantized.items() if (spec := weight.grid) is not None}

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose unquantized weight is [in, out] (GPT-2's Conv1D); codes are always [out, in]."""
        return self.architecture.structure.transposed

    @property
    def raised(self) -> frozenset[str]:
        """Empty: parameters are stored as they are."""
        return frozenset()

    def _in_dtype(self, dtype: torch.dtype) -> SafetensorsWeights:
        """The same open files, dequantized to another dtype."""
        other = copy.copy(self)
        other._dtype = dtype
        other._specs = other._merged()
        return other

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self._folder.read(name)
        if not is_finite(tensor):
            raise InputError("the tensor has NaN or Inf", where=self._folder.place(name))
        return tensor


def _nothing_quantized(quantization: Mapping[str, Any], folder: Path) -> InputError:
    return InputError(
        f"config.json claims quant_method {quantization.get('quant_method')!r}, but no layer is quantized",
        where=str(folder),
        mend="quantize the model again; the tool that made this folder quantized no layer",
    )
