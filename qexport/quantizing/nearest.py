"""A model rounded to nearest, as a source of tensors: what calibrated quantization has to be better than."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qexport.quantizing.solver import Options, round_to_nearest
from qexport.tensors import GroupQuantizedSpec, TensorSpec, WeightSource


class NearestSource:
    """A `WeightSource` over a merged model. Its linear layers are rounded to nearest when they are read.

    Each group's grid spans its largest value (symmetric) or its range (asymmetric), without a search and without
    calibration.

    Args:
        weights: the merged model.
        grids: bits, groups and symmetry of each layer to round, by its path.
        transposed: the layers whose weights are [in, out] in files.
    """

    def __init__(
        self, weights: WeightSource, grids: Mapping[str, GroupQuantizedSpec], transposed: frozenset[str]
    ) -> None:
        self._weights = weights
        self._grids = grids
        self._transposed = transposed

    def specs(self) -> Mapping[str, TensorSpec]:
        """The merged model's."""
        return self._weights.specs()

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the merged model's dtype."""
        tensor = self._weights.read(name)
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self._grids:
            return tensor
        matrix = tensor.t() if module in self._transposed else tensor
        rounded = round_to_nearest(matrix.to(torch.float32), _options(self._grids[module])).dequantize(tensor.dtype)
        return rounded.t().contiguous() if module in self._transposed else rounded


def _options(grid: GroupQuantizedSpec) -> Options:
    return Options(grid.bits, grid.group_size, "original", grid.sym, damp_percent=0.0, search=False)
