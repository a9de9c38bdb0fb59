"""A finished folder, whatever its weights are stored in, and `qexport.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import torch
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.formats.stored_weight import StoredLayer
from qexport.hidden_packages import hidden
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.tensors import GroupQuantizedSpec, TensorSpec

Kind = Literal["weights", "graph"]
"""Weights in safetensors files, which models of transformers take; or an ONNX graph, for a runtime of its own."""

_GRAPH_NAME: Final = "model.onnx"
"""As in `qexport.reading.onnx.graph`, which needs the extra `onnx`."""


class StoredModel(Protocol):
    """What is in a folder. A `WeightSource` and a context manager; weights are read when they are asked for."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        ...

    @property
    def kind(self) -> Kind:
        """What the weights are stored in."""
        ...

    @property
    def architecture(self) -> Architecture:
        """That of its config.json."""
        ...

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

    def model(self, *, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model as its users load it, ready for `generate`. `check_complete` comes before.

        Args:
            device: where to compute.
            dtype: to compute in; that of the dense weights where None. A graph has its own.

        Raises:
            RecipeError: a graph computes in another dtype, or the extra `onnx` is not installed.
            InputError: a tensor cannot be read, or ONNX Runtime cannot load the graph on this device.
        """
        ...

    def check_complete(self, structure: Structure | None = None) -> None:
        """Holds the headers against a model: that of its config.json where None is given.

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


def open_stored(folder: Path, *, dtype: torch.dtype, like: Architecture | None = None) -> StoredModel:
    """The reader of a folder.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.
        like: an architecture that the folder's is likely to equal; what was built of it is shared then.

    Raises:
        RecipeError: it is an ONNX artifact, and the extra `onnx` is not installed.
        InputError: a file is missing or malformed, or files contradict each other.
        CompatibilityError: transformers does not know the family.
    """
    if not (folder / _GRAPH_NAME).is_file():
        return SafetensorsWeights(folder, dtype=dtype, like=like)
    from qexport.reading.onnx.weights import OnnxWeights

    return OnnxWeights(folder, dtype=dtype, like=like)


def model_folder(path: Path) -> Path:
    """The same path.

    Raises:
        InputError: it is no folder with a config.json; perhaps the one above several layouts.
    """
    if not (path / "config.json").is_file():
        layouts = sorted(str(found.parent) for found in path.glob("*/config.json"))
        mend = f"load one of its layouts: {', '.join(layouts)}" if layouts else "name the folder of an artifact"
        raise InputError("the folder holds no config.json", where=str(path), mend=mend)
    return path


@hidden("kernels")
def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a finished folder, ready for `generate`.

    Quantized layers keep the tensors of the file, so the model takes the memory of the artifact; each forward
    dequantizes one weight after the other. The experts of a mixture are the exception: transformers holds them in one
    parameter, so they are dequantized here and take the memory of a dense model. Neither bitsandbytes nor gptqmodel is
    needed, and nothing from the folder is executed.

    Args:
        path: an artifact of qexport (of several layouts, the folder of one of them), or a folder of another maker in
            one of the formats: dense, AutoGPTQ v1, bitsandbytes, compressed-tensors; or an ONNX graph, which ONNX
            Runtime computes.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`.
        dtype: to compute in; the dtype of the artifact's dense weights where None. A graph has its own.

    Raises:
        RecipeError: the device is not there, the extra `onnx` is not installed, or a graph computes in another dtype.
        InputError: a file is missing or malformed, or the tensors are not those of the model.
        CompatibilityError: transformers does not know the family.
    """
    folder, where = model_folder(Path(path)), find_device(device)
    with open_stored(folder, dtype=torch.float32) as artifact:
        artifact.check_complete()
        return artifact.model(device=where, dtype=dtype)
