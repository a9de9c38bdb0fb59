"""The merged model as a source of tensors: the merge happens when a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from qexport.errors import NumericalError
from qexport.merge.changes import Change, ReadFactor
from qexport.tensors.finite import is_finite
from qexport.tensors.source import TensorSpec, WeightSource


class MergedSource:
    """A `WeightSource` over a base: floating-point tensors in one dtype, some of them changed by an adapter.

    Holds no tensor between reads. A read needs the tensor, its merged copy in float32, and its factors.
    """

    def __init__(
        self, base: WeightSource, changes: Mapping[str, tuple[Change, ...]], read_factor: ReadFactor, dtype: torch.dtype
    ) -> None:
        self._base = base
        self._changes = changes
        self._read_factor = read_factor
        self._dtype = dtype

    def specs(self) -> Mapping[str, TensorSpec]:
        """The base's tensors in their order; those of floating point have the merged dtype."""
        return {
            name: replace(spec, dtype=self._dtype) if spec.dtype.is_floating_point else spec
            for name, spec in self._base.specs().items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The merged tensor: changed in float32 and rounded once.

        Raises:
            InputError: the base's tensor is missing, cut short, or holds NaN or Inf.
            NumericalError: the merged tensor does, which means that it overflowed.
        """
        tensor = self._base.read(name)
        changes = self._changes.get(name, ())
        if not tensor.is_floating_point() or (not changes and tensor.dtype == self._dtype):
            return tensor
        for change in changes:
            tensor = change.apply(tensor, self._read_factor)
        merged = tensor.to(self._dtype).contiguous()
        if not is_finite(merged):
            raise NumericalError(
                f"the merged tensor is not finite in {str(self._dtype).removeprefix('torch.')}",
                where=name,
                mend="merge.dtype float32 has the widest range; else the adapter's scale is out of bounds",
            )
        return merged
