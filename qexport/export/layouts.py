"""What a layout is, and the layouts that a recipe's `export` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qexport.architectures.checkpoint import Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import GraphRecord
from qexport.errors import RecipeError
from qexport.export.safetensors_layout import SafetensorsLayout
from qexport.export.settings import ExportSettings, OnnxSettings, SafetensorsSettings, TgiSettings, VllmSettings
from qexport.export.tgi.layout import TgiLayout
from qexport.export.vllm.layout import VllmLayout
from qexport.export.weight_files import WeightFiles
from qexport.tensors import Outputs


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
        """Holds the finished folder against what its readers demand.

        Raises:
            QexportError: a demand is not met.
        """
        ...


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
