"""The parameters of a model, read back from its ONNX artifact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from transformers import GenerationConfig

from qexport.architectures.architecture import Architecture
from qexport.architectures.families import without_code_keys
from qexport.architectures.structure import Structure, refuse_impossible_depth
from qexport.errors import CompatibilityError, InputError, RecipeError, listed
from qexport.formats.onnx import description, reads_codes, stored_matrix
from qexport.formats.onnx.lookups import looks_up_codes, same_codes
from qexport.formats.onnx.operators import StoredMatrix, Wiring
from qexport.formats.stored_weight import StoredLayer
from qexport.reading.computing import EXACT, Computing
from qexport.reading.filled_model import as_parameter, read_generation
from qexport.reading.onnx.external_data import ExternalData
from qexport.reading.onnx.graph import Graph
from qexport.tensors import GroupQuantizedSpec, Quantized, TensorSpec
from qexport.tensors.source import is_finite
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object

if TYPE_CHECKING:
    from qexport.reading.onnx.model import OnnxCausalLM


class OnnxWeights:
    """The parameters of a model in an ONNX artifact, by their names in a checkpoint's files. A `WeightSource`.

    A quantized module appears as its `weight`, dequantized on reading: the values that the graph multiplies with if its
    activations are float32. Unlike bitsandbytes, MatMulBnb4 does not round them to the dtype that was quantized, so
    they equal those of a safetensors artifact only in that dtype.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.
        like: an architecture that is likely to equal the folder's; if it does, it is reused.

    Attributes:
        folder: as given.
        kind: `graph`.
        config: the content of config.json.
        architecture: the architecture that config.json describes.
        quantized: how each quantized module is stored, by its path; the embedding is not among them.

    Raises:
        InputError: config.json or the graph is missing or malformed (see `qexport.reading.onnx.graph.Graph`), or an
            operator's codes contradict its attributes.
        CompatibilityError: transformers does not know the family.
    """

    kind: Final = "graph"

    def __init__(self, folder: Path, *, dtype: torch.dtype, like: Architecture | None = None) -> None:
        self.folder, self._dtype = folder, dtype
        self.config = read_config(folder)
        self._graph = Graph(folder)
        self.architecture = Architecture.of_config(without_code_keys(self.config)[0], like)
        refuse_impossible_depth(self.architecture.parsed, len(self._graph.initializers))
        self._matrices = _matrices(self._graph)
        embedding = self.architecture.structure.embedding
        self.quantized: Mapping[str, StoredMatrix] = {
            module: matrix for module, matrix in self._matrices.items() if module != embedding
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        """The shape and dtype of every parameter in the graph; of quantized ones, as `read` returns them.

        Other tensors of the graph (tables of positions, constants of operators) are not included.
        """
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """A copy of the parameter, dequantized.

        Raises:
            InputError: the graph does not have it, its file has become shorter, it holds NaN or Inf, or its codes are
                out of range.
        """
        return as_parameter(self.stored(name), self._dtype, transposed=name.removesuffix(".weight") in self.transposed)

    def stored(self, name: str) -> torch.Tensor | Quantized:
        """The parameter as it is stored: a copy of the tensor, or the codes [out, in].

        Raises:
            InputError: as for `read`.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._matrices:
            return self._matrices[module].quantized(self._graph)
        tensor = self._graph.read(name)
        if not is_finite(tensor):
            raise InputError("the tensor has NaN or Inf", where=self._graph.where(name))
        return tensor

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored parameters."""
        parts = {part for weight in self._matrices.values() for part in weight.parts}
        stored = parts | (self._specs.keys() & self._graph.initializers.keys())
        return sum(self._graph.initializers[name].spec.nbytes for name in stored)

    @property
    def quantization(self) -> None:
        """None: the graph itself says how its weights are stored."""
        return None

    @property
    def method(self) -> str:
        """How the weights are stored, for users."""
        return f"ONNX, {description(self._matrices.values())}"

    @property
    def rounds_activations(self) -> bool:
        """Whether ONNX Runtime rounds the inputs of quantized layers to 8 bits."""
        return any(matrix.rounds_inputs for matrix in self._matrices.values())

    @cached_property
    def layers(self) -> dict[str, StoredLayer]:
        """Each quantized module, by its path, and a head that multiplies with the codes of a rounded embedding. The
        first use reads the scales: a group may be several blocks.
        """
        found, structure = dict(self.quantized), self.architecture.structure
        if structure.tied and structure.embedding in self._matrices:
            found[structure.head] = self._matrices[structure.embedding]
        return {module: matrix.layer(self._graph) for module, matrix in found.items()}

    @cached_property
    def grids(self) -> dict[str, GroupQuantizedSpec]:
        """Bits, groups and symmetry of each module that is quantized in groups along its inputs, by its path. The first
        use reads the scales.
        """
        found = {module: matrix.grid(self._graph) for module, matrix in self.quantized.items()}
        return {module: spec for module, spec in found.items() if spec is not None}

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose unquantized weight is [in, out] (GPT-2's Conv1D); codes are always [out, in]."""
        return self.architecture.structure.transposed

    @property
    def raised(self) -> frozenset[str]:
        """Empty: parameters are stored as they are."""
        return frozenset()

    @property
    def files(self) -> list[str]:
        """The names of the graph's file and of its data files, sorted."""
        places = (found.place for found in self._graph.initializers.values())
        return sorted(
            {self._graph.path.name, *(place.path.name for place in places if isinstance(place, ExternalData))}
        )

    def __enter__(self) -> Self:
        """The same object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing: no file stays open between reads."""

    def model(
        self, *, device: torch.device, dtype: torch.dtype | None = None, computing: Computing = EXACT
    ) -> OnnxCausalLM:
        """The graph in ONNX Runtime, ready for `generate`. Call `check_complete` first.

        Args:
            device: `cpu`, or a CUDA device.
            dtype: what the graph must compute in; None for any dtype.
            computing: ONNX Runtime decides itself what it keeps, and has its own kernels.

        Raises:
            CompatibilityError: another kernel is asked for.
            RecipeError: ONNX Runtime is not installed, or the graph computes in another dtype.
            InputError: ONNX Runtime cannot load the graph on that device.
        """
        from qexport.reading.onnx.model import open_model

        if computing.kernel != "exact":
            raise CompatibilityError(
                f"the kernel {computing.kernel} is for weights, and ONNX Runtime computes this graph with its own",
                where=str(self.folder),
                mend=f"load without kernel={computing.kernel!r}, or load the layout safetensors",
            )
        model = open_model(self, device=device)
        if self._generation is not None:
            model.generation_config = GenerationConfig.from_dict(self._generation)
        if dtype not in (None, model.dtype):
            raise RecipeError(
                f"the graph computes in {model.dtype}, not in {dtype}",
                where=str(self.folder),
                mend="omit `dtype`, or export the model with other `activations`",
            )
        return model

    @cached_property
    def _generation(self) -> dict[str, Any] | None:
        return read_generation(self.folder)

    def check_complete(self, structure: Structure | None = None) -> None:
        """Checks that the graph has the parameters of a model, without reading weights.

        Args:
            structure: the model's; None for the one of config.json.

        Raises:
            InputError: a parameter is missing, unexpected, of another shape, or not used by any operator.
        """
        problems = (structure or self.architecture.structure).differences(self._specs)
        unquantized = [name for name in self._specs if name.removesuffix(".weight") not in self._matrices]
        problems += [f"{name}: no operator reads it" for name in unquantized if name not in self._graph.used]
        if problems:
            raise InputError("the graph is not the model of its config.json", where=listed(problems))

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        """In the order of the model's parameters."""
        quantized = {
            f"{module}.weight": TensorSpec(
                weight.shape[::-1] if module in self.transposed else weight.shape, self._dtype
            )
            for module, weight in self._matrices.items()
        }
        initializers, parameters = self._graph.initializers, self.architecture.structure.parameters
        unquantized = {name: initializers[name].spec for name in parameters if name in initializers}
        found = unquantized | quantized
        ordered = {name: found[name] for name in parameters if name in found}
        return ordered | found


def read_config(folder: Path) -> dict[str, Any]:
    """The content of an ONNX artifact's config.json.

    Raises:
        InputError: it is missing or malformed, or has a quantization_config, which is for safetensors files only.
    """
    config = read_json_object(contained_path(folder, "config.json"), limit=CONFIG_BYTES)
    if "quantization_config" in config:
        raise InputError(
            "an ONNX artifact's config.json has a quantization_config",
            where=str(folder / "config.json"),
            mend="remove the key (the graph itself says how its weights are stored), or export the model again",
        )
    return config


def _matrices(graph: Graph) -> dict[str, StoredMatrix]:
    """Lookups of rows come last: whether inputs are rounded, the operators that multiply with the same codes say."""
    wiring = Wiring(graph.nodes)
    found: dict[str, StoredMatrix] = {}
    for node in sorted(filter(reads_codes, graph.nodes), key=looks_up_codes):
        module, weight = stored_matrix(graph, node, wiring)
        other = found.setdefault(module, weight)
        if weight != other and not (looks_up_codes(node) and same_codes(weight, other)):
            raise InputError("two operators read the same codes in different ways", where=graph.where(module))
        if weight.codes != f"{module}.weight" and f"{module}.weight" in graph.initializers:
            raise InputError("the module is stored both unquantized and quantized", where=graph.where(module))
    return found
