"""compressed-tensors' `int-quantized` and `pack-quantized`, as `qexport.packing.compressed_tensors` lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError
from qexport.packing import compressed_tensors
from qexport.reading.compressed_tensors_rules import CompressedTensorsRules
from qexport.reading.stored_format import Scheme, StoredWeight, Tensors, int8_shape, refuse_missing
from qexport.tensors import GroupQuantized, RowQuantized, TensorSpec, WeightSource

_LARGEST: Final = 1 << 31


@dataclass(frozen=True)
class PackedWeight:
    """One module's words, scales and shape; zero points and g_idx where the scheme has them."""

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: tuple[str, ...]

    def quantized(self, tensors: Tensors) -> GroupQuantized:
        """The codes.

        Raises:
            InputError: the config calls the module dense; see `qexport.packing.compressed_tensors.unpack_groups`.
        """
        if self.scheme is None:
            raise _dense_by_config(self.module)
        return compressed_tensors.unpack_groups(
            tensors,
            bits=self.scheme.bits,
            group_size=self.scheme.group_size,
            sym=self.scheme.sym,
            desc_act=self.scheme.desc_act,
            module=self.module,
        )


@dataclass(frozen=True)
class RowWeight:
    """One module's int8 codes and scales."""

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: tuple[str, ...] = ("weight", "weight_scale")

    def quantized(self, tensors: Tensors) -> RowQuantized:
        """The codes.

        Raises:
            InputError: the config calls the module dense, or something else than symmetric rows of 8 bits; a code is
                -128; see `qexport.packing.compressed_tensors.unpack_rows`.
        """
        if self.scheme is None:
            raise _dense_by_config(self.module)
        if self.scheme != Scheme(8, -1, sym=True, desc_act=False):
            raise InputError("only symmetric int8 rows are read in the format int-quantized", where=self.module)
        rows = compressed_tensors.unpack_rows(tensors, module=self.module)
        if int(rows.codes.min()) < -127:
            raise InputError("a code is -128", where=f"{self.module}.weight")
        return rows


class CompressedTensorsFormat:
    """`quant_method: compressed-tensors`.

    Args:
        config: the `quantization_config`.

    Raises:
        InputError: it cannot be followed; see `CompressedTensorsRules`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rules = CompressedTensorsRules(config)

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """The modules that have a `weight_packed`, or else a `weight_scale`; shapes of packed ones are read.

        Raises:
            InputError: a part is missing, or has another shape than the others ask for.
        """
        suffix = ".weight_packed" if self._rules.packed else ".weight_scale"
        modules = [name.removesuffix(suffix) for name in source.specs() if name.endswith(suffix)]
        make = self._packed if self._rules.packed else self._rows
        return {module: make(module, source) for module in modules}

    def claimed(self, structure: Structure) -> set[str]:
        """The modules that the config calls quantized: linears of the blocks, and the head unless it is tied."""
        linears = {linear.name for linear in structure.block_linears}
        heads = set() if structure.tied else {structure.head}
        return {module for module in linears | heads if self._rules.scheme(module)}

    def _packed(self, module: str, source: WeightSource) -> PackedWeight:
        scheme, specs = self._rules.scheme(module), source.specs()
        parts = ["weight_packed", "weight_scale", "weight_shape"]
        if scheme and not scheme.sym:
            parts.append("weight_zero_point")
        if scheme and scheme.desc_act:
            parts.append("weight_g_idx")
        refuse_missing(module, parts, specs)
        if specs[f"{module}.weight_shape"] != TensorSpec((2,), torch.int64):
            raise InputError("the shape of a packed layer is no int64 [2]", where=f"{module}.weight_shape")
        rows, columns = source.read(f"{module}.weight_shape").tolist()
        if not (0 < rows < _LARGEST and 0 < columns < _LARGEST):
            raise InputError(f"[{rows}, {columns}] is no shape", where=f"{module}.weight_shape")
        return PackedWeight(module, (rows, columns), scheme, tuple(parts))

    def _rows(self, module: str, source: WeightSource) -> RowWeight:
        refuse_missing(module, RowWeight.parts, source.specs())
        return RowWeight(module, int8_shape(module, source.specs()), self._rules.scheme(module))


def _dense_by_config(module: str) -> InputError:
    return InputError("a module is quantized that should be dense", where=f"quantization_config: ignore, {module}")
