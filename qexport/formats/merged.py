"""The merged 16-bit weights, unquantized, without a `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from qexport.architectures.structure import Structure
from qexport.errors import InputError, listed
from qexport.formats.format import Card, Specs
from qexport.formats.stored_weight import StoredWeight
from qexport.tensors import (
    Float4QuantizedSpec,
    Float8QuantizedSpec,
    GroupQuantizedSpec,
    OutputSpec,
    QuantizedSpec,
    TensorRecord,
    TensorSpec,
    WeightSource,
)

_QUANTIZED_PARTS: Final = (
    ".qweight", ".SCB", ".weight.absmax", ".weight_packed", ".weight_scale", ".weight_scale_inv",
)  # fmt: skip


@dataclass(frozen=True)
class MergedFormat:
    """The merged model's own tensors, even those of quantized modules: for servers that quantize by themselves."""

    quant_method: ClassVar[str | None] = None
    config_file: ClassVar[str | None] = None

    def specs(self, name: str, spec: OutputSpec) -> dict[str, TensorSpec]:
        """The merged parameter."""
        if isinstance(spec, TensorSpec):
            return {name: spec}
        assert not isinstance(spec, GroupQuantizedSpec | Float8QuantizedSpec | Float4QuantizedSpec)
        return {name: TensorSpec(spec.shape[::-1] if spec.transposed else spec.shape, spec.dtype)}

    def tensors(self, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The merged parameter."""
        value = record.value if isinstance(record.value, torch.Tensor) else record.merged
        assert value is not None, f"{record.name} came without its merged weight"
        return {record.name: value}

    def fault(self, spec: QuantizedSpec) -> str | None:
        """None: every matrix can be stored."""
        return None

    def quantization_config(self, specs: Specs, structure: Structure) -> None:
        """None: nothing is quantized."""
        return None

    @property
    def card(self) -> Card:
        """The format on the model card."""
        return Card("merged", "16-bit", "the merged weights, not quantized")

    @classmethod
    def reads(cls, config: Mapping[str, Any] | None) -> bool:
        """Whether there is no `quantization_config`."""
        return config is None

    @staticmethod
    def reader(config: Mapping[str, Any]) -> MergedReader:
        """The reader, which is the same for every folder."""
        return MergedReader()


class MergedReader:
    """A folder without a `quantization_config`: every weight is stored unquantized."""

    description = "unquantized"

    def weights(self, source: WeightSource) -> dict[str, StoredWeight]:
        """An empty mapping.

        Raises:
            InputError: the folder has tensors that only quantized modules have.
        """
        if quantized := [name for name in source.specs() if name.endswith(_QUANTIZED_PARTS)]:
            raise InputError(
                f"{len(quantized)} tensors belong to quantized layers, but config.json has no quantization_config",
                where=listed(quantized),
            )
        return {}

    def claimed(self, structure: Structure) -> set[str]:
        """An empty set."""
        return set()
