"""A folder as vLLM finds it on the disk. Nothing here knows how it was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import LinearSpec, Structure
from qexport.errors import InputError, QexportError
from qexport.export.vllm.launch import FOLDER
from qexport.reading.compressed_tensors_rules import CompressedTensorsRules
from qexport.reading.gptq_rules import QuantizationRules
from qexport.tensors import TensorSpec
from qexport.tensors.safetensors_folder import SafetensorsFolder
from qexport.tensors.strict_files import read_json_object

_LIMIT: Final = 1 << 26

Scheme = tuple[int, int, bool]
"""Bits, inputs in a group (-1: the whole row), symmetric."""


@dataclass(frozen=True)
class ServedFolder:
    """What lies in a folder.

    Attributes:
        path: the folder.
        config: config.json; empty where it cannot be read.
        structure: the model that config.json names; None where there is none.
        tensors: every stored tensor by name; empty where the weights cannot be read.
        unreadable: what cannot be read, by `config`, `structure` and `weights`, with the reason.
    """

    path: Path
    config: Mapping[str, Any]
    structure: Structure | None
    tensors: Mapping[str, TensorSpec]
    unreadable: Mapping[str, str]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config` of config.json; empty where there is none."""
        value = self.config.get("quantization_config")
        return value if isinstance(value, Mapping) else {}

    @property
    def method(self) -> Any:
        """The method that config.json names; None where there is none."""
        return self.quantization.get("quant_method")

    @property
    def dtype(self) -> Any:
        """The dtype that config.json names."""
        return self.config.get("dtype", self.config.get("torch_dtype"))

    @cached_property
    def linears(self) -> list[LinearSpec]:
        """The linear layers of the blocks."""
        return list(self.structure.block_linears) if self.structure else []

    @cached_property
    def schemes(self) -> dict[str, Scheme | None]:
        """How each linear layer of the blocks is quantized by config.json; None for a dense one.

        Raises:
            InputError: the quantization_config cannot be followed.
        """
        find = self._scheme_of()
        return {linear.name: find(linear.name) for linear in self.linears}

    @cached_property
    def engine_arguments(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The `model.json` of the Triton repository, with its place; none where there are no launch files."""
        files = sorted(self.path.glob(f"{FOLDER}/triton/*/1/model.json"))
        return [(str(file.relative_to(self.path)), read_json_object(file, limit=_LIMIT)) for file in files]

    def _scheme_of(self) -> Any:
        if self.method == "gptq":
            gptq = QuantizationRules(self.quantization)
            return lambda name: None if (s := gptq.scheme(name)) is None else (s.bits, s.group_size, s.sym)
        if self.method == "compressed-tensors":
            rules = CompressedTensorsRules(self.quantization)
            return lambda name: None if (s := rules.scheme(name)) is None else (s.bits, s.group_size, s.sym)
        return lambda name: None


def read_folder(path: Path) -> ServedFolder:
    """Reads config.json and the headers of the weights. What cannot be read is noted, not raised."""
    unreadable: dict[str, str] = {}
    config: Mapping[str, Any] = {}
    structure, tensors = None, dict[str, TensorSpec]()
    try:
        config = read_json_object(path / "config.json", limit=_LIMIT)
    except InputError as error:
        unreadable["config"] = error.what
    try:
        structure = Architecture(
            {key: value for key, value in config.items() if key != "quantization_config"}
        ).structure
    except (QexportError, AttributeError, TypeError, ValueError) as error:
        unreadable["structure"] = str(error).partition("\n")[0]
    try:
        weights = SafetensorsFolder(path)
        tensors = dict(weights.specs())
        weights.close()
    except InputError as error:
        unreadable["weights"] = error.what
    return ServedFolder(path, config, structure, tensors, unreadable)
