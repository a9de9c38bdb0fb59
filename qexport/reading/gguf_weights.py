"""qexport's own reader of artifacts whose weights are in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import GenerationConfig, PreTrainedModel

from qexport.architectures.architecture import Architecture
from qexport.architectures.families import without_code_keys
from qexport.architectures.structure import Structure, refuse_impossible_depth
from qexport.artifact.names import GGUF_NAME, gguf_of
from qexport.errors import CompatibilityError, InputError, listed
from qexport.formats.gguf import DTYPES, blocks
from qexport.formats.gguf.dequantizing import bits_of, dequantized, refuse_unreadable
from qexport.formats.gguf.families import FAMILIES, Places, constants, places
from qexport.formats.stored_weight import StoredLayer, Tensors
from qexport.reading.computing import EXACT, Computing
from qexport.reading.filled_model import as_parameter, quantized_model, read_generation
from qexport.tensors import GroupQuantized, GroupQuantizedSpec, Quantized, TensorSpec, ValuesQuantized
from qexport.tensors.gguf_parts import open_gguf
from qexport.tensors.source import is_finite
from qexport.tensors.strict_files import CONFIG_BYTES, contained_path, read_json_object

_TORCH: Final = {kind: dtype for dtype, kind in DTYPES.items()}
_SHARED_BITS: Final = 4
"""Of the type that holds codes of fewer bits too."""

_SAMPLE: Final = 128
"""Rows whose scales tell how many values share one, and whose codes tell how many bits they need."""


@dataclass(frozen=True)
class GgufMatrix:
    """A quantized weight. See `StoredWeight`.

    Attributes:
        out_features: rows.
        in_features: columns.
        kind: how the values are stored.
        bits: of a code; in Q4_0 those that its codes need.
    """

    out_features: int
    in_features: int
    kind: GGMLQuantizationType
    bits: int

    parts: ClassVar[tuple[str, ...]] = ("blocks",)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features

    @property
    def has_codes(self) -> bool:
        """Whether the codes are read, as of the types that qexport writes; else the values alone are known."""
        return self.kind in blocks.BITS

    @property
    def layer(self) -> StoredLayer:
        """The module as shown to users, with one group for each block."""
        return StoredLayer("gptq", self.bits, blocks.BLOCK, self.shape)

    @property
    def grid(self) -> GroupQuantizedSpec | None:
        """The same as a grid; None where the codes are not read."""
        if not self.has_codes:
            return None
        return GroupQuantizedSpec(*self.shape, self.bits, blocks.BLOCK, sym=True, desc_act=False)

    def quantized(self, tensors: Tensors) -> GroupQuantized | ValuesQuantized:
        """The codes in the stored bytes, on their device, or the values.

        The codes of llama.cpp's own Q4_0 are on grids that no other format has: where its scales are negative, they
        reach 8 steps above zero and 7 below.
        """
        rows = tensors[self.parts[0]]
        if self.has_codes:
            found = blocks.unpack(rows, self.bits)
            if self.bits == 8 or not bool((found.scales < 0).any()):
                return found
        values = dequantized(rows.cpu().numpy(), self.kind, torch.float32).to(rows.device)
        return ValuesQuantized(values, self.bits, blocks.BLOCK)


class GgufWeights:
    """The parameters of a model in a GGUF artifact, by their names in a checkpoint's files. A `WeightSource`.

    The architecture comes from config.json. What the file's own header says of it is compared where both are known: see
    `qexport.export.gguf.layout.compared_header`.

    Args:
        folder: the artifact.
        dtype: of dequantized weights.
        like: an architecture that is likely to equal the folder's; if it does, it is reused.

    Attributes:
        folder: as given.
        kind: `gguf`.
        config: the content of config.json.
        architecture: the architecture that config.json describes.
        file: the GGUF file, or the model in several.
        quantized: how each quantized linear layer is stored, by its path; without the output head.

    Raises:
        InputError: config.json or the file is missing or malformed.
        CompatibilityError: the family is not known, or a tensor is stored in a way that `gguf` cannot dequantize.
    """

    kind: Final = "gguf"

    def __init__(self, folder: Path, *, dtype: torch.dtype, like: Architecture | None = None) -> None:
        self.folder, self._dtype = folder, dtype
        self.config: dict[str, Any] = read_json_object(contained_path(folder, "config.json"), limit=CONFIG_BYTES)
        self.file = open_gguf(contained_path(folder, gguf_of(folder) or GGUF_NAME))
        try:
            for path in self.file.paths:
                contained_path(folder, path.name)
            self.architecture = Architecture.of_config(without_code_keys(self.config)[0], like)
            refuse_impossible_depth(self.architecture.parsed, len(self.file.tensors))
            self._places = self._find_places()
            self._names = self._parameters()
            self._matrices = {
                name.removesuffix(".weight"): self._matrix(name)
                for name, stored in self._names.items()
                if self.file.tensors[stored].kind not in _TORCH
            }
            self.quantized: Mapping[str, GgufMatrix] = {
                name: matrix for name, matrix in self._matrices.items() if name != self.architecture.structure.embedding
            }
        except BaseException:
            self.close()
            raise

    def specs(self) -> Mapping[str, TensorSpec]:
        """The shape and dtype of every tensor as `read` returns it; one without a place in the model keeps its name."""
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        """A copy of the parameter, dequantized.

        Raises:
            InputError: the file does not have it or has become shorter, or it holds NaN or Inf.
        """
        return as_parameter(self.stored(name), self._dtype, transposed=name.removesuffix(".weight") in self.transposed)

    def stored(self, name: str) -> torch.Tensor | Quantized:
        """The parameter as it is stored, in the model's order of rows: a copy of the tensor, or the codes [out, in].

        Codes have one group for each block of 32, also where more values share a scale.

        Raises:
            InputError: as for `read`.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._matrices:
            found = self._matrices[module].quantized(self.tensors(module))
            if isinstance(found, ValuesQuantized) and not is_finite(found.values):
                raise InputError("the tensor has NaN or Inf", where=f"{self.file.path}: {self._names[name]}")
            return found
        value = self._rows(name)
        if not is_finite(value):
            raise InputError("the tensor has NaN or Inf", where=f"{self.file.path}: {self._names[name]}")
        return value

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The stored bytes of a quantized module, in the model's order of rows.

        Raises:
            InputError: the file has become shorter, or a scale is NaN or Inf.
        """
        name, matrix = f"{module}.weight", self._matrices[module]
        rows = self._rows(name)
        if matrix.has_codes and not is_finite(blocks.unpack(rows, matrix.bits).scales):
            raise InputError("the tensor has NaN or Inf", where=f"{self.file.path}: {self._names[name]}")
        return {matrix.parts[0]: rows}

    def _rows(self, name: str) -> torch.Tensor:
        """The stored tensor; of codes their bytes, uint8 [out, row_bytes]."""
        if name not in self._names:
            raise InputError("there is no tensor with this name", where=f"{self.file.path}: {name}")
        kind = self.file.tensors[self._names[name]].kind
        rows = self._first_rows(name)
        if kind in _TORCH:
            rows = self._places.turned(name, rows.view(_TORCH[kind]).reshape(self._shape(name)))
        return self._places.restored(name, rows)

    def _first_rows(self, name: str, most: int | None = None) -> torch.Tensor:
        """The stored bytes of a parameter's rows in the file's order, uint8 [rows, row_bytes], or of its first ones."""
        rows = math.prod(self._shape(name)[:-1])
        first = rows * self._places.experts.get(name, 0)
        count = rows if most is None else min(most, rows)
        return torch.from_numpy(self.file.read_rows(self._names[name], first, first + count))

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape that a parameter has in the file; of an expert's matrix its own, [out, in]."""
        shape = self.file.tensors[self._names[name]].shape
        return shape[1:] if name in self._places.experts else shape

    @property
    def quantization(self) -> None:
        """None: the file itself says how its weights are stored."""
        return None

    @property
    def method(self) -> str:
        """How the weights are stored, for users."""
        kinds = sorted({matrix.kind.name for matrix in self._matrices.values()})
        return f"GGUF, {' and '.join(kinds) or 'unquantized'}"

    @property
    def rounds_activations(self) -> bool:
        """False: how a runtime computes with the codes is its own choice."""
        return False

    @property
    def transposed(self) -> frozenset[str]:
        """The modules whose unquantized weight is [in, out] (GPT-2's Conv1D); codes are always [out, in]."""
        return self.architecture.structure.transposed

    @property
    def raised(self) -> frozenset[str]:
        """The norms of families that multiply by 1 + their weights."""
        return self._places.raised

    @cached_property
    def layers(self) -> dict[str, StoredLayer]:
        """Each quantized module, by its path. The first use reads some scales: a group may be several blocks."""
        return {
            module: StoredLayer("gptq", matrix.bits, self._group_size(module, matrix), matrix.shape)
            for module, matrix in self.quantized.items()
        }

    @cached_property
    def grids(self) -> dict[str, GroupQuantizedSpec]:
        """Bits, groups and symmetry of each quantized module, by its path."""
        return {
            module: GroupQuantizedSpec(*layer.shape, layer.bits, layer.group_size, sym=True, desc_act=False)
            for module, layer in self.layers.items()
            if self.quantized[module].has_codes
        }

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.file.tensors.values())

    @property
    def files(self) -> list[str]:
        """The names of the files, of several the first one first."""
        return [path.name for path in self.file.paths]

    def model(
        self, *, device: torch.device, dtype: torch.dtype | None = None, computing: Computing = EXACT
    ) -> PreTrainedModel:
        """The model, ready for `generate`. Call `check_complete` first.

        Raises:
            InputError: a tensor cannot be read.
            CompatibilityError: the kernel cannot serve the device, the dtype or a layer.
        """
        own = self._specs[f"{self.architecture.structure.embedding}.weight"].dtype
        model = quantized_model(self.architecture, self, dtype=dtype or own, device=device, computing=computing)
        if self._generation is not None:
            model.generation_config = GenerationConfig.from_dict(self._generation)
        return model

    @cached_property
    def _generation(self) -> dict[str, Any] | None:
        return read_generation(self.folder)

    def check_complete(self, structure: Structure | None = None) -> None:
        """Checks that the file has the parameters of a model, without reading weights.

        Args:
            structure: the model's; None for the one of config.json.

        Raises:
            InputError: a parameter is missing, unexpected or of another shape.
        """
        if problems := (structure or self.architecture.structure).differences(self._specs):
            raise InputError("the file is not the model of its config.json", where=listed(problems))

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def __enter__(self) -> GgufWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find_places(self) -> Places:
        config = self.architecture.parsed
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise CompatibilityError(
                f"GGUF artifacts of the family {config.model_type} are not known", where=str(self.file.path)
            )
        return places(family, config, self.architecture.structure.parameters)

    def _parameters(self) -> dict[str, str]:
        """The tensor of each parameter, in the model's order; other tensors behind them, under their own names."""
        tensors = self.file.tensors
        known = {name: stored for name, stored in self._places.names.items() if stored in tensors}
        taken = set(known.values())
        for stored, tensor in tensors.items():
            count = self._places.stacks.get(stored)
            if count is not None and (len(tensor.shape) != 3 or tensor.shape[0] != count):
                raise InputError(
                    f"shape {list(tensor.shape)}, and the model has {count} experts",
                    where=f"{self.file.path}: {stored}",
                )
            if tensor.kind not in _TORCH and len(tensor.shape) != (2 if count is None else 3):
                raise InputError(
                    f"{tensor.kind.name} {list(tensor.shape)} is not read as an artifact",
                    where=f"{self.file.path}: {stored}",
                    mend="name a file whose quantized tensors are matrices",
                )
        refuse_unreadable(self.file, (name for name, tensor in tensors.items() if tensor.kind not in _TORCH))
        taken |= constants(self.architecture.parsed).keys()
        return known | {stored: stored for stored in tensors if stored not in taken}

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        tensors = self.file.tensors
        return {
            name: TensorSpec(self._places.shape(name, self._shape(name)), _TORCH.get(tensors[stored].kind, self._dtype))
            for name, stored in self._names.items()
        }

    def _matrix(self, name: str) -> GgufMatrix:
        """How a matrix is stored. The codes of the first rows tell whether 2 or 3 bits were given 4."""
        kind = self.file.tensors[self._names[name]].kind
        bits = bits_of(kind)
        if blocks.BITS.get(kind) == _SHARED_BITS:
            bits = blocks.unpack(self._first_rows(name, _SAMPLE), min(blocks.NARROW)).bits
        out_features, in_features = self._shape(name)
        return GgufMatrix(out_features, in_features, kind, bits)

    def _group_size(self, module: str, matrix: GgufMatrix) -> int:
        """Values per scale, as the first rows tell: neighbouring blocks of a group have equal scales and minima."""
        if not matrix.has_codes and matrix.kind != blocks.ASYMMETRIC:
            return blocks.BLOCK
        rows = self._first_rows(f"{module}.weight", _SAMPLE).numpy()
        found = rows.reshape(len(rows), -1, GGML_QUANT_SIZES[matrix.kind][1])
        scales = found[..., : 4 if matrix.kind == blocks.ASYMMETRIC else 2]
        starts = (scales[:, 1:] != scales[:, :-1]).any((0, 2)).nonzero()[0] + 1
        return math.gcd(*starts.tolist()) * blocks.BLOCK if len(starts) else matrix.in_features
