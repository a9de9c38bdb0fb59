"""Rounding each weight on its own: the pass of the methods without a forward, and a model rounded to nearest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch

from qexport.architectures.architecture import Checkpoint
from qexport.architectures.joined import SHARING, joined_modules
from qexport.architectures.structure import Structure
from qexport.formats import Outputs
from qexport.formats.bitsandbytes.four_bit_codes import quantize as quantize_blocks
from qexport.progress import Progress
from qexport.quantizing.float4 import global_scale_of, mxfp4, nvfp4
from qexport.quantizing.float8 import float8
from qexport.quantizing.method import PassInputs, RoundingMethod
from qexport.quantizing.row_int8 import llm_int8, w8a8
from qexport.quantizing.selection import notes_on_experts, select_rounded
from qexport.quantizing.solver import Options, round_to_nearest
from qexport.records import LayerRecord
from qexport.tensors import (
    BlockQuantized,
    BlockQuantizedSpec,
    Float4Quantized,
    Float4QuantizedSpec,
    Float8Quantized,
    GroupQuantized,
    GroupQuantizedSpec,
    NestedAbsmax,
    OutputSpec,
    Quantized,
    QuantizedSpec,
    RowQuantized,
    TensorRecord,
    TensorSpec,
    WeightSource,
)


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
        rounded = nearest_on(matrix, self._grids[module]).dequantize(tensor.dtype)
        return rounded.t().contiguous() if module in self._transposed else rounded


def nearest_on(matrix: torch.Tensor, grid: GroupQuantizedSpec) -> GroupQuantized:
    """A matrix [out, in], rounded to nearest on grids that span each group's largest value or its range."""
    options = Options(grid.bits, grid.group_size, "original", grid.sym, damp_percent=0.0, search=False)
    return round_to_nearest(matrix.to(torch.float32), options)


Rounding = Callable[[torch.Tensor], Quantized]
"""How a method rounds a matrix [out, in], each weight on its own."""


def rounding_of(weight: torch.Tensor, quantized: Quantized) -> Rounding | None:
    """How codes were found, if they are exactly those that nf4, nvfp4, mxfp4, int8, w8a8 or fp8 computes; else None.

    None for codes in groups along the inputs that are integers, whose grids depend on more than the weights.

    Args:
        weight: the merged matrix [out, in].
        quantized: the codes.
    """
    if isinstance(quantized, BlockQuantized):
        rounding = partial(_rounded_to_blocks, spec=quantized.spec)
        found = rounding(weight)
        same = torch.equal(found.codes, quantized.codes) and torch.equal(found.absmax, quantized.absmax)
        return rounding if same and _same_nested(found.nested, quantized.nested) else None
    if isinstance(quantized, RowQuantized):
        return next((each for each in _row_methods(weight) if _same_rows(each(weight), quantized)), None)
    if isinstance(quantized, Float8Quantized):
        nearest = partial(float8, block=quantized.block)
        return nearest if nearest(weight).equals(quantized) else None
    if isinstance(quantized, Float4Quantized):
        return _float4_rounding(weight, quantized)
    return None


def _float4_rounding(weight: torch.Tensor, quantized: Float4Quantized) -> Rounding | None:
    """With the global scale of the codes, which other layers may share, unless it is too large for the weight."""
    rounding: Callable[[torch.Tensor], Float4Quantized] = mxfp4
    if quantized.global_scale is not None:
        if bool(quantized.global_scale > global_scale_of(float(weight.abs().amax()))):
            return None
        rounding = partial(nvfp4, global_scale=quantized.global_scale)
    return rounding if rounding(weight).equals(quantized) else None


def _rounded_to_blocks(weight: torch.Tensor, spec: BlockQuantizedSpec) -> BlockQuantized:
    return quantize_blocks(weight.to(spec.dtype).contiguous(), spec)


def _row_methods(weight: torch.Tensor) -> list[Callable[[torch.Tensor], RowQuantized]]:
    if weight.abs().amax() > torch.finfo(torch.float16).max:
        return [w8a8]
    return [w8a8, llm_int8, partial(w8a8, scale_dtype=torch.float16), partial(llm_int8, scale_dtype=torch.float16)]


def _same_rows(one: RowQuantized, other: RowQuantized) -> bool:
    """Some formats store the scales, from which the absmaxes come back with another last bit."""
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def _same_nested(one: NestedAbsmax | None, other: NestedAbsmax | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.absmax, other.absmax) and one.offset == other.offset


def plan(method: RoundingMethod, checkpoint: Checkpoint) -> Outputs:
    """What `quantize` will yield."""
    structure, stored = checkpoint.architecture.structure, checkpoint.weights.specs()
    specs: dict[str, OutputSpec] = dict(stored)
    for linear in select_rounded(structure, method):
        name = f"{linear.name}.weight"
        specs[name] = method.spec(linear, stored[name])
    return Outputs(method.format(), specs, notes_on_experts(structure, specs, method))


def quantize(method: RoundingMethod | None, inputs: PassInputs) -> Iterator[TensorRecord]:
    """Yields every tensor of the model, one after the other, quantized where the plan says so.

    Args:
        method: what rounds a matrix; None if nothing is quantized.
        inputs: the model, and where to begin.
    """
    specs, resume = inputs.outputs.specs, inputs.resume
    units = _units(inputs.checkpoint.architecture.structure, specs)
    done = sum(map(len, units[: inputs.finished_units]))
    records = _records(method, list(specs)[done:], inputs)
    for unit in units[inputs.finished_units :]:
        for name in unit:
            inputs.progress(Progress("quantize", done, len(specs), "tensor", name))
            yield next(records)
            done += 1
        if resume is not None:
            resume.finished(lambda: ())
    inputs.progress(Progress("quantize", done, len(specs), "tensor"))


def _units(structure: Structure, names: Iterable[str]) -> list[list[str]]:
    """The tensors in order, those together that follow one another and belong to the same block."""
    return [list(unit) for _, unit in groupby(names, structure.block_of)]


def _records(method: RoundingMethod | None, names: Sequence[str], inputs: PassInputs) -> Iterator[TensorRecord]:
    """The tensors as the plan describes them, rounded by the workers."""
    waiting, specs = deque[tuple[str, torch.Tensor]](), inputs.outputs.specs
    joined = _Joined(inputs.checkpoint.weights, specs)

    def matrices() -> Iterator[_Matrix | None]:
        for name, (merged, spec) in zip(names, _ahead(joined.read, names), strict=True):
            waiting.append((name, merged))
            transposed = name.removesuffix(".weight") in inputs.checkpoint.architecture.structure.transposed
            yield None if isinstance(spec, TensorSpec) else _Matrix(merged.t() if transposed else merged, spec)

    for quantized in inputs.execution.map(_codes, matrices(), method, inputs.device):
        (name, merged), layer = waiting.popleft(), None
        spec = specs[name]
        if method is not None and not isinstance(spec, TensorSpec):
            module = name.removesuffix(".weight")
            layer = LayerRecord.uncalibrated(module, method.layer_method, spec.bits, spec.group_size)
        yield TensorRecord(name, merged) if quantized is None else TensorRecord(name, quantized, layer, merged)


@dataclass(frozen=True)
class _Matrix:
    """A merged matrix [out, in], and what it will be quantized to."""

    values: torch.Tensor
    spec: QuantizedSpec


def _codes(matrix: _Matrix | None, method: RoundingMethod | None, device: torch.device) -> Quantized | None:
    """The codes of a matrix, if there is one."""
    if matrix is None:
        return None
    assert method is not None
    return method.codes(matrix.values.contiguous().to(device), matrix.spec)


class _Joined:
    """The merged tensors with their specs, into which the largest magnitude goes of layers that share a global scale.

    Args:
        weights: the merged model.
        specs: what its tensors become.
    """

    def __init__(self, weights: WeightSource, specs: Mapping[str, OutputSpec]) -> None:
        self._weights, self._specs = weights, specs
        sharing = [name.removesuffix(".weight") for name, spec in specs.items() if _has_global_scale(spec)]
        groups = joined_modules(dict.fromkeys(sharing), SHARING)
        self._group = {f"{module}.weight": [f"{each}.weight" for each in group] for group in groups for module in group}
        self._absmax: dict[str, float] = {}

    def read(self, name: str) -> tuple[torch.Tensor, OutputSpec]:
        """A tensor and its spec. With the first of a group the others are read too, and again when their turn comes."""
        tensor, spec = self._weights.read(name), self._specs[name]
        if not isinstance(spec, Float4QuantizedSpec) or name not in self._group:
            return tensor, spec
        group = self._group[name]
        if group[0] not in self._absmax:
            self._absmax[group[0]] = max(
                _absmax(tensor if each == name else self._weights.read(each)) for each in group
            )
        return tensor, replace(spec, absmax=self._absmax[group[0]])


def _has_global_scale(spec: OutputSpec) -> bool:
    return isinstance(spec, Float4QuantizedSpec) and spec.kind == "nvfp4"


def _absmax(tensor: torch.Tensor) -> float:
    return float(tensor.abs().amax())


_T = TypeVar("_T")


def _ahead(read: Callable[[str], _T], names: Sequence[str]) -> Iterator[_T]:
    """What is read in order; a thread reads and merges the next one while the caller works on the current one."""
    if not names:
        return
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, names[0])
        for name in names[1:]:
            found = pending.result()
            pending = reader.submit(read, name)
            yield found
            del found
        yield pending.result()
