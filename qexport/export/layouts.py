"""The interface of a layout, the layouts of a recipe's `export`, and the simplest one: safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qexport.amounts import parse_size
from qexport.architectures.architecture import Checkpoint
from qexport.architectures.structure import Structure
from qexport.artifact.manifest import CardText, GraphRecord
from qexport.errors import CompatibilityError, InputError, QexportError, RecipeError, listed
from qexport.export import (
    ExportSettings,
    GgufSettings,
    OnnxSettings,
    SafetensorsSettings,
    TgiSettings,
    VllmSettings,
)
from qexport.export.gguf.layout import GgufLayout
from qexport.export.launch import Launch
from qexport.export.loaders import Folder, loading_section, stock_loaders, warnings
from qexport.export.model_files import card_text, model_files, sizes_of, write_files
from qexport.export.tgi.layout import TgiLayout
from qexport.export.vllm.layout import VllmLayout
from qexport.export.weight_files import WeightFiles
from qexport.formats import Outputs
from qexport.tensors import BlockQuantizedSpec


class Layout(Protocol):
    """A folder for one kind of loader or server. The constructor refuses a plan that the layout cannot carry."""

    @property
    def name(self) -> str:
        """The name in the recipe's `export`."""
        ...

    @property
    def readers(self) -> Sequence[str]:
        """The libraries and servers that the folder is for, besides qexport."""
        ...

    @property
    def weights(self) -> WeightFiles:
        """The weights that the folder needs; layouts with equal weights share the files."""
        ...

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config`; None if the folder has 16-bit weights."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What users of this folder should know."""
        ...

    @property
    def graph(self) -> GraphRecord | None:
        """The manifest's record of the folder's graph; None if it has none."""
        ...

    @property
    def card(self) -> CardText:
        """What the model card says of the folder."""
        ...

    @property
    def launch(self) -> Launch | None:
        """What the launch files say, once they are written; None if there are none."""
        ...

    @property
    def degrees(self) -> Mapping[str, Sequence[int]]:
        """The tensor-parallel degrees that work, by server; empty for a layout that no server is meant to load."""
        ...

    def files(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Bytes of each file that will be written, by name, except manifest, listing, report and model card.

        They are known before any weight is read; the size of a graph, which is traced later, is an estimate.
        """
        ...

    def prepare(self) -> None:
        """Does what needs no weights and may fail, before anything is quantized.

        Raises:
            CompatibilityError: the layout cannot carry the model.
        """
        ...

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes everything except model card and manifest into the folder, which already has the weights.

        Raises:
            QexportError: a file of the checkpoint would be written outside the folder, or replace another file.
        """
        ...

    def check(self, folder: Path) -> None:
        """Checks the finished folder against every rule of its loaders or server.

        Raises:
            QexportError: a rule is broken.
        """
        ...


class SafetensorsLayout:
    """The method's own format, for the libraries that read it.

    Args:
        settings: from the recipe.
        outputs: what the pass will yield.
        structure: of the model.

    Raises:
        CompatibilityError: a layer cannot be stored.
    """

    name = "safetensors"
    graph = None
    degrees: Mapping[str, Sequence[int]] = {}
    launch = None

    def __init__(self, settings: SafetensorsSettings, outputs: Outputs, structure: Structure) -> None:
        self._outputs, self._structure = outputs, structure
        self.weights = WeightFiles(outputs.format, outputs, parse_size(settings.max_shard_size))
        self.weights.refuse_faults()

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config` for config.json."""
        return self._outputs.format.quantization_config(self._outputs.specs, self._structure)

    @property
    def readers(self) -> list[str]:
        """The libraries that load it correctly."""
        return stock_loaders(self._folder)

    @property
    def notes(self) -> list[str]:
        """What loaders get wrong with this artifact without an error."""
        return warnings(self._folder)

    @property
    def card(self) -> CardText:
        """The format, and the libraries that load it."""
        return card_text(self._outputs.format, loading=loading_section(self._folder))

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
        """Does nothing: the constructor has checked everything that needs no weights."""

    def files(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """See `Layout.files`."""
        return {**self.weights.files, **sizes_of(self._files(checkpoint))}

    def write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Writes config and tokenizer."""
        write_files(folder, self._files(checkpoint))

    def _files(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """All files except the weights, the manifest and the model card."""
        dtype = self._outputs.unquantized_dtype(f"{self._structure.embedding}.weight")
        return model_files(checkpoint, self.quantization, dtype)

    def check(self, folder: Path) -> None:
        """Does nothing: there are no rules besides reading the weights back, as in every layout."""


def make_layouts(
    exports: Sequence[ExportSettings], outputs: Outputs, structure: Structure, checkpoint: Checkpoint
) -> tuple[Layout, ...]:
    """The layouts of a recipe's `export`; see `make_layout`.

    Raises:
        QexportError: some cannot be made. The error says what is wrong with each of them.
    """
    made, problems = list[Layout](), dict[str, QexportError]()
    for settings in exports:
        try:
            made.append(make_layout(settings, outputs, structure, checkpoint))
        except (CompatibilityError, InputError, RecipeError) as error:
            problems[settings.layout] = error
    if problems:
        raise _joined(problems)
    return tuple(made)


def _joined(problems: Mapping[str, QexportError]) -> QexportError:
    """One error for several layouts, of the class of the first."""
    first = next(iter(problems.values()))
    if len(problems) == 1:
        return first
    return type(first)(
        f"{len(problems)} layouts cannot be written",
        where=listed([f"{name}: {error.what} ({error.where})" for name, error in problems.items()]),
        mend=listed([f"{name}: {error.mend}" for name, error in problems.items() if error.mend]),
    )


def make_layout(settings: ExportSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> Layout:
    """The layout for one entry of a recipe's `export`.

    Args:
        settings: the entry.
        outputs: what the pass will yield.
        structure: of the model.
        checkpoint: the merged model.

    Raises:
        RecipeError: a package that the layout needs is not installed.
        CompatibilityError: the layout cannot carry the method or the model; the error says why.
        InputError: a file that the layout rewrites, such as tokenizer_config.json, is malformed.
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
        case GgufSettings():
            return GgufLayout(settings, outputs, structure, checkpoint)


def _onnx_layout(settings: OnnxSettings, outputs: Outputs, structure: Structure, checkpoint: Checkpoint) -> Layout:
    """Its packages are an extra, so it is imported only when a recipe names it."""
    try:
        from qexport.export.onnx.layout import OnnxLayout
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"the layout onnx needs the package {error.name}", where="export", mend="pip install 'qexport[onnx]'"
        ) from error
    return OnnxLayout(settings, outputs, structure, checkpoint)
