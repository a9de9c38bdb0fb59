"""What a layout is, the layouts that a recipe's `export` asks for, and the plainest one: safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import GraphRecord
from qexport.errors import RecipeError
from qexport.export.loaders import Folder, loading_section, stock_loaders, warnings
from qexport.export.model_files import model_files, write_files
from qexport.export.settings import (
    ExportSettings,
    OnnxSettings,
    SafetensorsSettings,
    TgiSettings,
    VllmSettings,
    parse_size,
)
from qexport.export.tgi.layout import TgiLayout
from qexport.export.vllm.layout import VllmLayout
from qexport.export.weight_files import WeightFiles
from qexport.formats import Outputs
from qexport.tensors import BlockQuantizedSpec


class Layout(Protocol):
    """One folder for one kind of reader. Made from the plan alone; what it cannot carry it refuses when it is made."""

    @property
    def name(self) -> str:
        """The name in the recipe's `export`."""
        ...

    @property
    def readers(self) -> Sequence[str]:
        """Those who are to read the folder, besides qexport."""
        ...

    @property
    def weights(self) -> WeightFiles:
        """The weights that it wants in the folder; layouts with equal ones share the files."""
        ...

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config` in its config.json; None where the folder holds 16-bit weights."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a user of this folder should know."""
        ...

    @property
    def graph(self) -> GraphRecord | None:
        """What the manifest says of a graph in the folder; None where there is none."""
        ...

    def prepare(self) -> None:
        """Does, before anything is quantized, what needs no weights and may fail.

        Raises:
            CompatibilityError: the model cannot be laid out so.
        """
        ...

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes everything but the weights and the manifest into the folder, which holds the weights.

        Raises:
            QexportError: a file cannot be written.
        """
        ...

    def check(self, folder: Path) -> None:
        """Checks the finished folder: every rule of its readers.

        Raises:
            QexportError: a rule is broken.
        """
        ...


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
        self.weights = WeightFiles(outputs.format, outputs, parse_size(settings.max_shard_size))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What config.json says of the codes."""
        return self._outputs.format.quantization_config(self._outputs.specs, self._structure)

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
        """Nothing: what can fail without weights was tried when the layout was made."""

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes config, tokenizer and model card.

        Raises:
            QexportError: a file of the checkpoint would leave the folder or replace another file.
        """
        outputs, embedding = self._outputs, f"{self._structure.embedding}.weight"
        dtype, loading = outputs.unquantized_dtype(embedding), loading_section(self._folder)
        write_files(folder, model_files(checkpoint, outputs.format, self.quantization, dtype, loading=loading))

    def check(self, folder: Path) -> None:
        """Nothing: the weights are read back as in every layout."""


def make_layout(settings: ExportSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> Layout:
    """The layout that a recipe asks for.

    Args:
        settings: one entry of the recipe's `export`.
        outputs: what the pass will yield.
        structure: the model's.
        checkpoint: the merged model.

    Raises:
        RecipeError: packages that the layout needs are not installed.
        CompatibilityError: the layout cannot carry the method or the model, with the reason.
        InputError: a file beside the weights, which the layout rewrites, is malformed.
    """
    match settings:
        case SafetensorsSettings():
            return SafetensorsLayout(settings, outputs, structure)
        case TgiSettings():
            return TgiLayout(settings, outputs, structure, checkpoint)
        case VllmSettings():
            return VllmLayout(settings, outputs, structure, checkpoint)
        case OnnxSettings():
            return _onnx_layout(settings, outputs, structure, checkpoint)


def _onnx_layout(settings: OnnxSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> Layout:
    """Its packages are an extra, so it is imported only where it is asked for."""
    try:
        from qexport.export.onnx.layout import OnnxLayout
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"the layout onnx needs the package {error.name}", where="export", mend="pip install 'qexport[onnx]'"
        ) from error
    return OnnxLayout(settings, outputs, structure, checkpoint)
