"""A folder without a `quantization_config`: every weight is there as it is."""

from __future__ import annotations

from typing import Final

from qexport.architectures.structure import Structure
from qexport.errors import InputError, listed
from qexport.reading.stored_format import StoredWeight
from qexport.tensors import WeightSource

_QUANTIZED_PARTS: Final = (
    ".qweight", ".SCB", ".weight.absmax", ".weight_packed", ".weight_scale",
)  # fmt: skip


class DenseFormat:
    """The 16-bit weights themselves."""

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """None.

        Raises:
            InputError: tensors are there that only quantized modules have.
        """
        if quantized := [name for name in source.specs() if name.endswith(_QUANTIZED_PARTS)]:
            raise InputError(
                f"{len(quantized)} tensors belong to quantized layers, but config.json has no quantization_config",
                where=listed(quantized),
            )
        return {}

    def claimed(self, structure: Structure) -> set[str]:
        """None."""
        return set()
