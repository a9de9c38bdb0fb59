"""The codes of AWQ: powers of two for the inputs of layers, chosen on their outputs, then rounding to nearest.

Section 3 of arXiv:2306.00978. Its scales are powers of the inputs' sizes; here each is rounded to a power of two, so
that the norm or layer before can be divided by it without rounding (`qexport.architectures.folds`). The outputs' error
comes from the Hessian that GPTQ's pass sums, tr(D H D^T) of a change D, instead of outputs: it is that of all tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from qexport.architectures.folds import (
    Fold,
    Gains,
    agreed,
    folded_codes,
    folded_inputs,
    folded_outputs,
    folds,
    room,
    shown_by_vector,
)
from qexport.architectures.structure import Structure
from qexport.errors import NumericalError
from qexport.quantizing.gptq_pass import BlockPass
from qexport.quantizing.layer import Hessian, SolvedLayer, output_energy, output_error, rounded_layer, usable
from qexport.quantizing.shard import WindowShard
from qexport.quantizing.solver import Options, round_to_nearest
from qexport.records import LayerRecord
from qexport.tensors import GroupQuantized, TensorRecord

if TYPE_CHECKING:
    from qexport.quantizing.awq import Awq

_STEPS: Final = 10
"""Powers of the inputs' sizes that are tried are multiples of one over this, below 1; AutoAWQ tries twice as many."""

_OFFSETS: Final = (0.0, 0.25, 0.5, 0.75)
"""Added to the exponents before they are rounded: a factor for all inputs changes nothing but the rounding."""

_ROWS: Final = 512
"""Outputs that the search looks at, spread over those of all layers with the same input."""

_ATTEMPTS: Final = 4
"""How often layers are rounded, if codes do not show an exponent."""


def notes_on_folds(method: Awq, structure: Structure, quantized: Collection[str]) -> tuple[str, ...]:
    """A note where no layer's inputs can be divided, although the recipe asks for it."""
    if not method.scale or planned(structure, quantized):
        return ()
    return (
        f"no weights are scaled: qexport knows no norm or layer of {structure.model_type} that can be divided by the "
        "scales; only clipping ranges are searched",
    )


def planned(structure: Structure, quantized: Collection[str]) -> dict[frozenset[str], Fold]:
    """The folds all of whose consumers are quantized, by the consumers."""
    return {frozenset(each.consumers): each for each in folds(structure) if set(each.consumers) <= set(quantized)}


class AwqPass(BlockPass):
    """GPTQ's pass with AWQ's codes. The model in memory is never folded: its layers get the codes' values for inputs
    that are not divided, which are the same products.
    """

    def __init__(self, *args: Any, scale: bool) -> None:
        super().__init__(*args)
        self._folds = planned(self._structure, self._chosen) if scale else {}
        self._exponents: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[Tensor, SolvedLayer]] = {}

    def _solved_together(
        self, weights: Mapping[str, Tensor], hessian: Hessian, halves: object = None
    ) -> dict[str, SolvedLayer]:
        fold = self._folds.get(frozenset(weights))
        bounds = None if fold is None else self._bounds(fold)
        found = solve_scaled(weights, hessian, self._chosen, self._method.on_failure, bounds)
        if fold is not None:
            exponents = found[fold.consumers[0]].exponents
            self._exponents |= {} if exponents is None else {fold.source: exponents}
        sources = {each.source for each in self._folds.values()}
        self._sources |= {name: (weights[name], layer) for name, layer in found.items() if name in sources}
        return found

    @staticmethod
    def solved_alone(
        problem: tuple[Mapping[str, Tensor], Hessian],
        options: Mapping[str, Options],
        on_failure: Literal["error", "round_to_nearest"],
    ) -> dict[str, SolvedLayer]:
        """Experts, whose inputs are not scaled."""
        return solve_scaled(*problem, options, on_failure, None)

    def _bounds(self, fold: Fold) -> tuple[Tensor, Tensor]:
        """By which exponents each channel of a source can be divided exactly, and so that it shows them."""
        if fold.source in self._sources:
            weight, layer = self._sources[fold.source]
            values, divided = layer.weight(torch.float32), [layer.quantized.scales]
        else:
            known = self._structure.parameters
            own = self._shards.first(WindowShard.parameters, [name for name in fold.parameters if name in known])
            weight = values = own[f"{fold.source}.weight"]
            divided = [each.reshape(len(each), -1).t() for each in own.values()]
        by_vector = weight.dim() == 1
        shown = shown_by_vector(values, weight) if by_vector else Gains.of(values.float(), weight.float(), 1).shown()
        free = shown.decided & (shown.exponents == 0)
        low, high = (torch.stack(each) for each in zip(*map(room, divided), strict=True))
        return torch.where(free, low.amax(0), 0), torch.where(free, high.amin(0), 0)

    def _records(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], solved: Mapping[str, SolvedLayer]
    ) -> list[TensorRecord]:
        """With the sources divided, whose blocks have been solved."""
        divided = {
            parameter: self._exponents[fold.source]
            for fold in self._folds.values()
            if fold.source in self._exponents
            for parameter in fold.parameters
        }
        records = super()._records(names, tensors, solved)
        self._exponents, self._sources = {}, {}
        return [_divided(record, divided[record.name]) if record.name in divided else record for record in records]


def _divided(record: TensorRecord, exponents: Tensor) -> TensorRecord:
    value, exponents = record.value, exponents.cpu()
    if isinstance(value, Tensor):
        return replace(record, value=folded_outputs(value, exponents))
    assert isinstance(value, GroupQuantized)
    return replace(record, value=folded_codes(value, exponents))


def solve_scaled(
    weights: Mapping[str, Tensor],
    hessian: Hessian,
    options: Mapping[str, Options],
    on_failure: Literal["error", "round_to_nearest"],
    bounds: tuple[Tensor, Tensor] | None,
) -> dict[str, SolvedLayer]:
    """Quantizes layers that share one input.

    Args:
        weights: float32 [out, in] by module path.
        hessian: of the shared input.
        options: by module path, the same for all.
        on_failure: what to do if the Hessian cannot be used.
        bounds: the least and the most exponent of each input, int64 [in]; None if inputs cannot be divided.

    Raises:
        NumericalError: the Hessian is not finite or of no tokens, and `on_failure` is `error`.
    """
    dead = int((hessian.matrix().diagonal() == 0).sum())
    try:
        matrix = usable(hessian)
    except NumericalError as error:
        if on_failure == "error":
            raise NumericalError(error.what, where=", ".join(weights), mend=error.mend) from error
        return {name: rounded_layer(name, weights[name], options[name], hessian, dead) for name in weights}
    shared = options[next(iter(weights))]
    exponents = None if bounds is None else search(torch.cat(list(weights.values())), matrix, shared, *bounds)
    codes, exponents = _shown_codes(weights, matrix.diagonal(), shared, exponents)
    found = {}
    for name, weight in weights.items():
        record = _record(name, weight, codes[name], shared, hessian, exponents)
        found[name] = SolvedLayer(codes[name], record.model_copy(update={"dead_columns": dead}), exponents)
    return found


def search(weight: Tensor, matrix: Tensor, options: Options, least: Tensor, most: Tensor) -> Tensor | None:
    """The exponents with the least error of the outputs, int64 [in]; None if without any it is as small.

    Args:
        weight: float32 [out, in], of all layers with this input.
        matrix: the Hessian, float32 [in, in].
        options: bits and groups.
        least: of each input, int64 [in].
        most: likewise.
    """
    sample = weight[:: max(1, len(weight) // _ROWS)][:_ROWS]
    energy = output_energy(sample, matrix)
    best, found = _loss(sample, matrix, options, energy, None), None
    for exponents in candidates(matrix.diagonal(), least, most):
        loss = _loss(sample, matrix, options, energy, exponents)
        if loss < best:
            best, found = loss, exponents
    return found


def candidates(squares: Tensor, least: Tensor, most: Tensor) -> Iterator[Tensor]:
    """The exponents that are tried, each once.

    Args:
        squares: the inputs' mean squares, float32 [in], positive.
        least: of each input, int64 [in].
        most: likewise.
    """
    sizes, seen = squares.double().log2() / 2, set[bytes]()
    for step in range(1, _STEPS):
        scales = sizes * (step / _STEPS)
        for offset in _OFFSETS:
            centered = scales - (scales.amax() + scales.amin()) / 2 + offset
            exponents = torch.minimum(torch.maximum(centered.round().to(torch.int64), least), most)
            key = exponents.cpu().numpy().tobytes()
            if key not in seen and bool(exponents.any()):
                seen.add(key)
                yield exponents


def _loss(weight: Tensor, matrix: Tensor, options: Options, energy: float, exponents: Tensor | None) -> float:
    scaled = weight if exponents is None else folded_inputs(weight, exponents)
    found = output_error(weight, round_to_nearest(scaled, options), matrix, energy, exponents)
    return float("inf") if found is None else found


def _shown_codes(
    weights: Mapping[str, Tensor], squares: Tensor, options: Options, exponents: Tensor | None
) -> tuple[dict[str, GroupQuantized], Tensor | None]:
    """The codes, and those of the exponents that they show: a column that is lost in rounding is not multiplied, since
    nobody could check it.
    """
    for _ in range(_ATTEMPTS):
        codes = {name: _codes(weight, squares, options, exponents) for name, weight in weights.items()}
        if exponents is None:
            return codes, None
        columns = [Gains.of(codes[name].dequantize(), weights[name], 0).shown() for name in weights]
        shown = agreed(exponents, columns)
        if torch.equal(shown, exponents):
            return codes, exponents
        exponents = shown if bool(shown.any()) else None
    return _shown_codes(weights, squares, options, None)


def _codes(weight: Tensor, squares: Tensor, options: Options, exponents: Tensor | None) -> GroupQuantized:
    if exponents is None:
        return round_to_nearest(weight, options, squares.clone())
    return round_to_nearest(folded_inputs(weight, exponents), options, folded_inputs(squares, -2 * exponents))


def _record(
    name: str, weight: Tensor, codes: GroupQuantized, options: Options, hessian: Hessian, exponents: Tensor | None
) -> LayerRecord:
    matrix = hessian.matrix()
    energy = output_energy(weight, matrix)
    return LayerRecord(
        name=name,
        method="awq",
        bits=codes.bits,
        group_size=codes.group_size,
        loss=output_error(weight, codes, matrix, energy, exponents),
        rtn_loss=output_error(weight, round_to_nearest(weight, options), matrix, energy),
        damp_percent=None,
        tokens=hessian.tokens,
        dead_columns=0,
    )
