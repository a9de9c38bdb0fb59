"""The comparison of the weights, as rows for the page and as text for a comment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qexport.amounts import counted
from qexport.artifact.measurements import LayerWeights, WeightsRecord
from qexport.artifact.report import Report

_SHOWN: Final = 8
_LARGEST: Final = float("inf")


@dataclass(frozen=True)
class LayerRow:
    """A quantized layer.

    Attributes:
        name: the module's path.
        error: relative error of the weights.
        ratio: as a multiple of the error of rounding to nearest.
        outputs: the error of the outputs as such a multiple; a dash where it was not measured.
        gain: how large the weights are, 1 for as large as the nearest ones.
        row: the worst row, with its multiple.
        group: the worst group, with its multiple; a dash where a row has one scale.
        fault: what is wrong, or empty.
    """

    name: str
    error: str
    ratio: str
    outputs: str
    gain: str
    row: str
    group: str
    fault: str


@dataclass(frozen=True)
class WeightsView:
    """What the section on weights shows.

    Attributes:
        sentence: how many tensors were compared, and what was found.
        rows: the layers with faults, then those with the largest errors.
        unequal: unquantized tensors that differ, with how.
    """

    sentence: str
    rows: list[LayerRow]
    unequal: list[tuple[str, str]]


def weights_view(report: Report) -> WeightsView | None:
    """The section's content; None if the weights were not compared."""
    if report.weights is None:
        return None
    found = report.weights
    inexact = [layer for layer in found.layers if layer.faults or not layer.exact]
    ordered = sorted(inexact, key=lambda layer: (not layer.faults, -_ratio(layer)))
    unequal = [(each.name, each.text) for each in found.unequal[:_SHOWN]]
    return WeightsView(_sentence(found), [_row(layer) for layer in ordered[:_SHOWN]], unequal)


def _sentence(found: WeightsRecord) -> str:
    faulty, exact = sum(bool(layer.faults) for layer in found.layers), sum(layer.exact for layer in found.layers)
    unequal = f"{len(found.unequal)} of them differ" if found.unequal else "all equal to the reference's"
    parts = [f"{counted(found.unquantized, 'unquantized tensor')}, {unequal}"]
    if found.layers:
        layers = counted(len(found.layers), "quantized layer")
        parts.append(f"{layers}, {faulty} with a fault" if faulty else f"{layers}, none with a fault")
    if exact:
        parts.append(f"the codes of {exact} are exactly those that the method gives")
    return f"{'; '.join(parts)}."


def _ratio(layer: LayerWeights) -> float:
    return _LARGEST if layer.ratio is None else layer.ratio


def _row(layer: LayerWeights) -> LayerRow:
    dash = "–"
    row = f"{layer.worst_row} ({layer.worst_row_ratio:.2f}×)"
    group = dash
    if layer.worst_group is not None and layer.worst_group_ratio is not None:
        group = f"{layer.worst_group[0]}, {layer.worst_group[1]} ({layer.worst_group_ratio:.2f}×)"
    ratio = dash if layer.ratio is None else f"{layer.ratio:.2f}×"
    fault = layer.faults[0] if layer.faults else ""
    outputs = dash if layer.output_ratio is None else f"{layer.output_ratio:.2f}×"
    return LayerRow(layer.name, f"{layer.relative_error:.3g}", ratio, outputs, f"{layer.gain:.3f}", row, group, fault)


def cells(row: LayerRow) -> Sequence[str]:
    """The row's texts, in the order of the table's columns."""
    return (row.name, row.error, row.ratio, row.outputs, row.gain, row.row, row.group, row.fault)


COLUMNS: Final = (
    "layer", "relative error", "of rounding", "outputs, of rounding", "size", "worst row", "worst row, group", "fault",
)  # fmt: skip
"""The heads of the columns of `cells`."""
