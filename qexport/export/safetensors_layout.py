"""The safetensors layout: a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport.architectures.checkpoint import Checkpoint
from qexport.architectures.structure import Structure
from qexport.export.encodings import AutoGptq, Bitsandbytes, CompressedTensors, Encoding, Merged16
from qexport.export.loaders import Folder, loading_section, stock_loaders, warnings
from qexport.export.model_files import write_model_files
from qexport.export.quantization_config import quantization_config
from qexport.export.settings import SafetensorsSettings, parse_size
from qexport.export.weight_files import WeightFiles
from qexport.tensors import W8A8, BlockQuantizedSpec, Dense, FourBit, Gptq, LlmInt8, Method, Outputs


class SafetensorsLayout:
    """The method's own format, as the libraries that know it read it.

    Args:
        settings: the recipe's.
        outputs: what the pass will yield.
        structure: the model's.

    Raises:
        CompatibilityError: a layer cannot be stored.
    """

    name = "safetensors"
    graph = None

    def __init__(self, settings: SafetensorsSettings, outputs: Outputs, structure: Structure) -> None:
        self._outputs, self._structure = outputs, structure
        self.weights = WeightFiles(_encoding(outputs.method), outputs, parse_size(settings.max_shard_size))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What config.json says of the codes."""
        return quantization_config(self._outputs, self._structure)

    @property
    def readers(self) -> list[str]:
        """The libraries that load it without a reservation."""
        return stock_loaders(self._folder)

    @property
    def notes(self) -> list[str]:
        """What stock loaders get wrong with this artifact, silently."""
        return warnings(self._folder)

    @property
    def _folder(self) -> Folder:
        quantized = self._outputs.quantized
        return Folder(
            self.quantization,
            {module: spec.shape for module, spec in quantized.items()},
            self._structure.model_type,
            self._structure.head,
            self.name,
            block_sizes={
                module: spec.block_size for module, spec in quantized.items() if isinstance(spec, BlockQuantizedSpec)
            },
        )

    def prepare(self) -> None:
        """There is nothing that could fail late."""

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes config, tokenizer and model card.

        Raises:
            QexportError: a file of the checkpoint would leave the folder or replace another file.
        """
        outputs, embedding = self._outputs, f"{self._structure.embedding}.weight"
        write_model_files(
            folder,
            checkpoint,
            outputs.method,
            self.quantization,
            outputs.dense_dtype(embedding),
            loading=loading_section(self._folder),
        )

    def check(self, folder: Path) -> None:
        """Nothing beyond what `readback` holds against every layout."""


def _encoding(method: Method) -> Encoding:
    match method:
        case Dense():
            return Merged16()
        case Gptq():
            return AutoGptq()
        case W8A8():
            return CompressedTensors()
        case FourBit() | LlmInt8():
            return Bitsandbytes()
