"""Rounding each weight on its own: the pass of the methods without a forward, and a model rounded to nearest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.formats import Outputs
from qexport.progress import Progress, ProgressCallback, silent
from qexport.quantizing.method import RoundingMethod
from qexport.quantizing.selection import notes_on_experts, select_rounded
from qexport.quantizing.solver import Options, round_to_nearest
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantizedSpec, OutputSpec, TensorRecord, TensorSpec, WeightSource


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


def plan(method: RoundingMethod, checkpoint: Checkpoint) -> Outputs:
    """What `quantize` will yield."""
    structure, stored = checkpoint.architecture.structure, checkpoint.weights.specs()
    specs: dict[str, OutputSpec] = dict(stored)
    for linear in select_rounded(structure, method):
        name = f"{linear.name}.weight"
        specs[name] = method.spec(linear, stored[name])
    return Outputs(method.format(), specs, notes_on_experts(structure, specs, method))


def quantize(
    method: RoundingMethod | None,
    checkpoint: Checkpoint,
    outputs: Outputs,
    *,
    device: torch.device,
    progress: ProgressCallback = silent,
) -> Iterator[TensorRecord]:
    """Yields every tensor of the model, one after the other, quantized where `outputs` says so.

    Args:
        method: what rounds a matrix; None if nothing is quantized.
        checkpoint: the merged model.
        outputs: what `plan` returned.
        device: where to compute.
        progress: is called with each tensor.
    """
    transposed = checkpoint.architecture.structure.transposed
    merged_ahead = _ahead(checkpoint.weights, outputs.specs)
    for done, ((name, spec), merged) in enumerate(zip(outputs.specs.items(), merged_ahead, strict=True)):
        progress(Progress("quantize", done, len(outputs.specs), "tensor", name))
        if isinstance(spec, TensorSpec):
            yield TensorRecord(name, merged)
            continue
        assert method is not None
        module = name.removesuffix(".weight")
        matrix = merged.t().contiguous() if module in transposed else merged  # in every format the codes are [out, in]
        layer = LayerRecord.uncalibrated(module, method.layer_method, spec.bits, spec.group_size)
        yield TensorRecord(name, method.codes(matrix.to(device), spec), layer, merged)
    progress(Progress("quantize", len(outputs.specs), len(outputs.specs), "tensor"))


def _ahead(weights: WeightSource, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """The tensors in order; a thread reads and merges the next one while the caller works on the current one."""
    with ThreadPoolExecutor(1) as reader:
        remaining = iter(names)
        pending = reader.submit(weights.read, next(remaining))
        for name in remaining:
            found = pending.result()
            pending = reader.submit(weights.read, name)
            yield found
            del found
        yield pending.result()
