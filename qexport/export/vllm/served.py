"""An artifact as vLLM finds it: the tensors that it loads, and how each layer is quantized by its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import LinearSpec, Structure
from qexport.artifact.disk import disk_failure
from qexport.errors import InputError, QexportError
from qexport.export.launch import FOLDER
from qexport.export.served import ServedModel, ServedWeights
from qexport.formats.awq import AwqRules
from qexport.formats.block_fp8 import BlockFp8Rules
from qexport.formats.compressed_tensors.reading import CompressedTensorsRules
from qexport.formats.gptq.reading import GptqRules
from qexport.formats.stored_weight import Scheme
from qexport.tensors.safetensors_folder import SafetensorsFolder


@dataclass(frozen=True)
class ServedByVllm(ServedModel):
    """An artifact as vLLM finds it; see `ServedModel`.

    Attributes:
        plan: the structure of a planned model; None to read it from config.json.
    """

    plan: Structure | None = None

    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        """The tensors of the single file, or of all files in the index."""
        try:
            with SafetensorsFolder(folder) as weights:
                return ServedWeights(dict(weights.specs()))
        except InputError as error:
            if disk_failure(error, where=None):
                raise
            return ServedWeights({}, unreadable={"*.safetensors": error.what})

    @property
    def architecture(self) -> str:
        """The class that config.json names, or transformers' class for the family."""
        model_type = self.config.get("model_type", "")
        named = self.config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")]
        return str(named[0])

    @property
    def dtype(self) -> Any:
        """The dtype that config.json names."""
        return self.config.get("dtype", self.config.get("torch_dtype"))

    @cached_property
    def structure_or_fault(self) -> Structure | str:
        """The structure of the model in config.json, or why there is none."""
        if self.plan is not None:
            return self.plan
        try:
            config = {key: value for key, value in self.config.items() if key != "quantization_config"}
            return Architecture(config).structure
        except (QexportError, AttributeError, TypeError, ValueError) as error:
            return str(error).partition("\n")[0]

    @property
    def structure(self) -> Structure | None:
        """The structure of the model in config.json; None if there is none."""
        return self.structure_or_fault if isinstance(self.structure_or_fault, Structure) else None

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The linear layers of the blocks."""
        return self.structure.block_linears if self.structure else ()

    @cached_property
    def schemes(self) -> dict[str, Scheme | None]:
        """How each linear layer of the blocks is quantized by config.json; None for an unquantized one.

        Raises:
            InputError: the quantization_config is malformed or not supported.
        """
        find = self._scheme_of()
        return {linear.name: find(linear.name) for linear in self.linears}

    @property
    def schemes_or_none(self) -> dict[str, Scheme | None]:
        """`schemes`, but empty if the quantization_config is not supported, which another rule reports."""
        try:
            return self.schemes
        except InputError:
            return {}

    @property
    def engine_arguments(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The `model.json` of the Triton repository, with its name; empty if there are no launch files."""
        names = [name for name in self.files if fnmatch(name, f"{FOLDER}/triton/*/1/model.json")]
        return [(name, self.json(name)) for name in names]

    def _scheme_of(self) -> Callable[[str], Scheme | None]:
        match self.method:
            case "gptq":
                return GptqRules(self.quantization).scheme
            case "awq":
                return AwqRules(self.quantization).scheme
            case "compressed-tensors":
                return CompressedTensorsRules(self.quantization).scheme
            case "fp8":
                return BlockFp8Rules(self.quantization).scheme
            case _:
                return lambda module: None
