"""A finished folder, whatever its weights are stored in: safetensors files, or an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import torch

from qexport.architectures.structure import Structure
from qexport.formats.stored_weight import StoredLayer
from qexport.reading.artifact_source import ArtifactSource
from qexport.tensors import GroupQuantizedSpec, TensorSpec

_GRAPH_NAME: Final = "model.onnx"
"""As in `qexport.reading.onnx.graph`, which needs the extra `onnx`."""


class StoredModel(Protocol):
    """What is in a folder. A `WeightSource` and a context manager; weights are read when they are asked for."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json without its `quantization_config`."""
        ...

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config`; None where there is none."""
        ...

    @property
    def method(self) -> str:
        """How the weights are stored, for a reader."""
        ...

    @property
    def layers(self) -> Mapping[str, StoredLayer]:
        """Each quantized module, by its path.

        Raises:
            InputError: a module has codes, and the config says nothing of them.
        """
        ...

    @property
    def grids(self) -> Mapping[str, GroupQuantizedSpec]:
        """Bits, groups and symmetry of each module that is quantized in groups along its inputs, by its path."""
        ...

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose dense weight is [in, out]; codes are always [out, in]."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """The names of the files with the weights, sorted; of an ONNX folder also the graph's."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every parameter's shape and dtype, quantized ones as they are read."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A parameter, dequantized, in memory of its own.

        Raises:
            InputError: it is missing, cut short, holds NaN or Inf, or its codes are not as the folder says.
        """
        ...

    def check_complete(self, structure: Structure) -> None:
        """Holds the headers against a model.

        Raises:
            InputError: parameters are missing, unexpected or of another shape.
        """
        ...

    def __enter__(self) -> Self:
        """The same object."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Closes the files."""
        ...


def holds_graph(folder: Path) -> bool:
    """Whether the folder's model is an ONNX graph, which only a runtime of its own can run."""
    return (folder / _GRAPH_NAME).is_file()


def open_stored(folder: Path, *, dtype: torch.dtype) -> StoredModel:
    """The reader of a folder.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.

    Raises:
        RecipeError: it is an ONNX artifact, and the extra `onnx` is not installed.
        InputError: a file is missing or malformed, or files contradict each other.
        CompatibilityError: transformers does not know the family.
    """
    if not holds_graph(folder):
        return ArtifactSource(folder, dtype=dtype)
    from qexport.reading.onnx.weights import OnnxWeights

    return OnnxWeights(folder, dtype=dtype)
