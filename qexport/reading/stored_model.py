"""A finished folder with weights in any format, and `qexport.load`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import torch
from transformers import PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.devices import find_device
from qexport.architectures.structure import Structure
from qexport.artifact.integrity import find_artifact
from qexport.artifact.manifest import REPORT_FOLDER
from qexport.artifact.names import gguf_of
from qexport.formats.stored_weight import StoredLayer
from qexport.hidden_packages import hidden
from qexport.reading.computing import DEFAULT_CACHE, EXACT, Computing, Kernel, parse_computing
from qexport.reading.folders import model_folder
from qexport.reading.gguf_weights import GgufWeights
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.tensors import GroupQuantizedSpec, Quantized, TensorSpec, WeightSource

Kind = Literal["weights", "graph", "gguf"]
"""Weights in safetensors files, for transformers models; an ONNX graph for ONNX Runtime; a GGUF file for llama.cpp."""

_GRAPH_NAME: Final = "model.onnx"
"""The same as in `qexport.reading.onnx.graph`, whose import needs the extra `onnx`."""


class StoredWeights(WeightSource, Protocol):
    """Parameters that are stored as codes, or as they are."""

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose unquantized weight is [in, out]; codes are always [out, in]."""
        ...

    @property
    def raised(self) -> frozenset[str]:
        """Parameters that are stored plus 1, in float32: what is smaller than 2**-24 in them is lost."""
        ...

    @property
    def grids(self) -> Mapping[str, GroupQuantizedSpec]:
        """Bits, groups and symmetry of each module that is quantized in groups along its inputs, by its path."""
        ...

    def stored(self, name: str) -> torch.Tensor | Quantized:
        """A parameter as it is stored: a copy of the tensor, or the codes [out, in].

        Raises:
            InputError: as for `read`.
        """
        ...


class StoredModel(StoredWeights, Protocol):
    """The model in a folder, and a context manager; weights are read on demand."""

    @property
    def folder(self) -> Path:
        """Its path."""
        ...

    @property
    def kind(self) -> Kind:
        """What the weights are stored in."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The architecture that config.json describes."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json without its `quantization_config`."""
        ...

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config`; None if there is none."""
        ...

    @property
    def method(self) -> str:
        """How the weights are stored, for users."""
        ...

    @property
    def rounds_activations(self) -> bool:
        """Whether runtimes round the inputs of quantized layers, so that sound computations differ by much."""
        ...

    @property
    def layers(self) -> Mapping[str, StoredLayer]:
        """Each quantized module, by its path.

        Raises:
            InputError: a module has codes, but is unquantized according to the config.
        """
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """The names of the files with the weights, sorted; for ONNX also the graph's file."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """Every parameter's shape and dtype; of quantized ones, as `read` returns them."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A copy of a parameter, dequantized.

        Raises:
            InputError: it is missing, cut short, holds NaN or Inf, or its codes contradict the folder's config.
        """
        ...

    def model(
        self, *, device: torch.device, dtype: torch.dtype | None = None, computing: Computing = EXACT
    ) -> PreTrainedModel:
        """The model as users load it, ready for `generate`. Call `check_complete` first.

        Args:
            device: where to compute.
            dtype: to compute in; None for that of the unquantized weights. A graph has a fixed dtype.
            computing: how quantized layers compute. A graph decides that itself.

        Raises:
            CompatibilityError: the kernel cannot serve the device, the dtype or a layer.
            RecipeError: a graph computes in another dtype, or the extra `onnx` is not installed.
            InputError: a tensor cannot be read, or ONNX Runtime cannot load the graph on this device.
        """
        ...

    def check_complete(self, structure: Structure | None = None) -> None:
        """Checks that the folder has the parameters of a model, from the headers alone.

        Args:
            structure: the model's; None for the one of config.json.

        Raises:
            InputError: a parameter is missing, unexpected or of another shape.
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
    """Opens a folder with the reader for its weights.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.
        like: an architecture that is likely to equal the folder's; if it does, it is reused.

    Raises:
        RecipeError: it is an ONNX artifact, and the extra `onnx` is not installed.
        InputError: a file is missing or malformed, or files contradict each other.
        CompatibilityError: transformers does not know the family.
    """
    if gguf_of(folder) is not None:
        return GgufWeights(folder, dtype=dtype, like=like)
    if not (folder / _GRAPH_NAME).is_file():
        return SafetensorsWeights(folder, dtype=dtype, like=like)
    from qexport.reading.onnx.weights import OnnxWeights

    return OnnxWeights(folder, dtype=dtype, like=like)


def _is_loaded(name: str) -> bool:
    return name != "README.md" and not name.startswith(("launch/", f"{REPORT_FOLDER}/"))


@hidden("kernels")
def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    check: bool = True,
    cache: str | None = DEFAULT_CACHE,
    kernel: Kernel = "exact",
) -> PreTrainedModel:
    """The model in a finished folder, ready for `generate`.

    Quantized layers keep the tensors of the file. The first forward dequantizes one weight after another and keeps each
    while `cache` has room; the others are dequantized in every forward. So the model takes the memory of the artifact,
    and at most `cache` more. The experts of a mixture are the exception: transformers holds them in one parameter, so
    they are dequantized on loading and take the memory of unquantized weights. Neither bitsandbytes nor gptqmodel is
    needed, and nothing from the folder is executed.

    Args:
        path: the folder of an artifact (if it has several layouts, of one layout), or a folder from another tool, in
            one of the formats unquantized, AutoGPTQ v1, bitsandbytes or compressed-tensors, with a GGUF file, or with
            an ONNX graph, which ONNX Runtime computes.
        device: `auto` (CUDA if available, else the CPU), `cpu`, `cuda` or `cuda:1`.
        dtype: to compute in; None for the dtype of the artifact's unquantized weights. A graph has a fixed dtype.
        check: whether the files of an artifact of qexport are compared with their digests first, all but model card,
            launch files and report. This reads the weights once more. Leaving it out gives a `UserWarning`.
        cache: the most memory for dequantized weights, for example `2 GB`; None to keep none. Outputs do not depend on
            it. An ONNX graph has none.
        kernel: `exact` multiplies with the dequantized weights, as verification does. `int4` multiplies up to 16 inputs
            at a time with the codes themselves, in torch's kernel for bfloat16 and 4-bit codes; more inputs, as in a
            long prompt, are computed as with `exact`.

    Raises:
        RecipeError: the device does not exist, the extra `onnx` is not installed, a graph computes in another dtype, or
            `cache` or `kernel` is not understood.
        InputError: a file is missing or malformed, was changed, or is not listed; or the tensors are not those of the
            model.
        CompatibilityError: transformers does not know the family; or `kernel` cannot serve the device, the dtype or a
            layer, and all such layers are named.
    """
    computing = parse_computing(kernel, cache)
    folder, where = model_folder(Path(path)), find_device(device)
    if check:
        find_artifact(folder, reads=_is_loaded)
    else:
        warnings.warn(f"{folder} is loaded without comparing its files with their digests", stacklevel=2)
    with open_stored(folder, dtype=torch.float32) as artifact:
        artifact.check_complete()
        return artifact.model(device=where, dtype=dtype, computing=computing)
