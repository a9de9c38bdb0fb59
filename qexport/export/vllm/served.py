"""An artifact as vLLM finds it: which tensors it loads, and how its config says that each layer is quantized."""

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
from qexport.errors import InputError, QexportError
from qexport.export.model_files import FOLDER
from qexport.export.served import ServedModel, ServedWeights
from qexport.formats.compressed_tensors.reading import CompressedTensorsRules
from qexport.formats.gptq.reading import GptqRules
from qexport.formats.stored_weight import Scheme
from qexport.tensors.safetensors_folder import SafetensorsFolder


@dataclass(frozen=True)
class ServedByVllm(ServedModel):
    """See `ServedModel`.

    Attributes:
        plan: the structure of a planned model; None where config.json is to be asked.
    """

    plan: Structure | None = None

    @staticmethod
    def read_weights(folder: Path) -> ServedWeights:
        """The tensors of the one file, or of all that the index names."""
        try:
            with SafetensorsFolder(folder) as weights:
                return ServedWeights(dict(weights.specs()))
        except InputError as error:
            return ServedWeights({}, unreadable={"*.safetensors": error.what})

    @property
    def architecture(self) -> str:
        """The class that config.json names, or that transformers would name."""
        model_type = self.config.get("model_type", "")
        named = self.config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")]
        return str(named[0])

    @property
    def dtype(self) -> Any:
        """The dtype that config.json names."""
        return self.config.get("dtype", self.config.get("torch_dtype"))

    @cached_property
    def described(self) -> Structure | str:
        """The model that config.json names; the reason where there is none."""
        if self.plan is not None:
            return self.plan
        try:
            config = {key: value for key, value in self.config.items() if key != "quantization_config"}
            return Architecture(config).structure
        except (QexportError, AttributeError, TypeError, ValueError) as error:
            return str(error).partition("\n")[0]

    @property
    def structure(self) -> Structure | None:
        """The model that config.json names; None where there is none."""
        return self.described if isinstance(self.described, Structure) else None

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The linear layers of the blocks."""
        return self.structure.block_linears if self.structure else ()

    @cached_property
    def schemes(self) -> dict[str, Scheme | None]:
        """How each linear layer of the blocks is quantized by config.json; None for a dense one.

        Raises:
            InputError: the quantization_config cannot be followed.
        """
        find = self._scheme_of()
        return {linear.name: find(linear.name) for linear in self.linears}

    @property
    def followed(self) -> dict[str, Scheme | None]:
        """`schemes`, or nothing where the quantization_config cannot be followed, which is a fault of its own."""
        try:
            return self.schemes
        except InputError:
            return {}

    @property
    def engine_arguments(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The `model.json` of the Triton repository, with its place; none where there are no launch files."""
        names = [name for name in self.files if fnmatch(name, f"{FOLDER}/triton/*/1/model.json")]
        return [(name, self.json(name)) for name in names]

    def _scheme_of(self) -> Callable[[str], Scheme | None]:
        match self.method:
            case "gptq":
                return GptqRules(self.quantization).scheme
            case "compressed-tensors":
                return CompressedTensorsRules(self.quantization).scheme
            case _:
                return lambda module: None
