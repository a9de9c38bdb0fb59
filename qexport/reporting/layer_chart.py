"""A chart of GPTQ's gain over round-to-nearest in each layer, and of the damping that it needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

from qexport.records import LayerRecord
from qexport.reporting.selection import fallen_back, loss_ratio
from qexport.reporting.svg import LARGEST, WIDTH, Axis, chart, line, tag, text, tick_text

_LEFT: Final = 52.0
_RIGHT: Final = WIDTH - 14.0
_TOP: Final = 22.0
_BOTTOM: Final = 206.0
_DAMPING_TOP: Final = 244.0
_DAMPING_BOTTOM: Final = 296.0


def layer_chart(layers: Sequence[LayerRecord]) -> Markup:
    """Loss divided by round-to-nearest's, in the model's order, and below it each layer's damping.

    Layers that fell back to round-to-nearest are crosses on the line of equal loss.
    """
    across = Axis(0, max(len(layers) - 1, 1), _LEFT + 8, _RIGHT - 8)
    ratios = [ratio for layer in layers if (ratio := loss_ratio(layer)) is not None]
    up = Axis(0, min(max([1.0, *ratios]), LARGEST) * 1.12, _BOTTOM, _TOP)
    fallen = {layer.name for layer in fallen_back(layers)}
    drawn = [
        _cross(layer, across.place(index), up.place(1.0))
        if layer.name in fallen
        else _dot(layer, across.place(index), up)
        for index, layer in enumerate(layers)
    ]
    better = sum(ratio < 1 for ratio in ratios)
    return chart(
        "layer-loss",
        "Loss of each layer over round-to-nearest's",
        f"{better} of {len(ratios)} layers have a smaller loss than round-to-nearest; {len(fallen)} fell back to it.",
        340,
        *(line(_LEFT, up.place(tick), _RIGHT, up.place(tick), "grid") for tick in up.ticks(4)),
        *(text(_LEFT - 8, up.place(tick) + 4, tick_text(tick), anchor="end") for tick in up.ticks(4)),
        line(_LEFT, up.place(1.0), _RIGHT, up.place(1.0), "limit"),
        text(_RIGHT, up.place(1.0) - 6, "round-to-nearest", anchor="end", class_="axis-label"),
        *drawn,
        line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"),
        *_damping(layers, across),
        *_block_ticks(layers, across),
        text((_LEFT + _RIGHT) / 2, 335, "block", anchor="middle", class_="axis-label"),
    )


def _dot(layer: LayerRecord, x: float, up: Axis) -> Markup:
    ratio = loss_ratio(layer)
    if ratio is None:
        return Markup("")
    tooltip = tag("title", f"{layer.name}: {ratio:.2f} of round-to-nearest's loss")
    return tag("circle", tooltip, cx=x, cy=up.place(ratio), r=2.6, class_="point soft" if ratio < 1 else "point worse")


def _cross(layer: LayerRecord, x: float, y: float) -> Markup:
    tooltip = tag("title", f"{layer.name}: fell back to round-to-nearest")
    return tag("path", tooltip, d=f"M{x - 5:.1f} {y - 5:.1f}l10 10m-10 0l10 -10", class_="cross")


def _damping(layers: Sequence[LayerRecord], across: Axis) -> list[Markup]:
    """The damping as a share of the mean diagonal, on a logarithmic axis."""
    found = [(index, layer, layer.damp_percent) for index, layer in enumerate(layers) if layer.damp_percent]
    if not found:
        return []
    values = [value for _, _, value in found]
    up = Axis(
        min(values) / 1.8, max(max(values) * 1.8, min(values) * 10), _DAMPING_BOTTOM, _DAMPING_TOP, logarithmic=True
    )
    usual = min(values)
    drawn = [
        tag(
            "circle",
            tag("title", f"{layer.name}: damping {value:g}"),
            cx=across.place(index),
            cy=up.place(value),
            r=2.2,
            class_="point soft" if value <= usual else "point worse",
        )
        for index, layer, value in found
    ]
    return [
        text(_RIGHT, _DAMPING_TOP - 8, "damping, share of the mean diagonal", anchor="end", class_="axis-label"),
        *(line(_LEFT, up.place(tick), _RIGHT, up.place(tick), "grid") for tick in up.ticks(3)),
        *(text(_LEFT - 8, up.place(tick) + 4, tick_text(tick), anchor="end") for tick in up.ticks(3)),
        *drawn,
        line(_LEFT, _DAMPING_BOTTOM, _RIGHT, _DAMPING_BOTTOM, "axis"),
    ]


def _block_ticks(layers: Sequence[LayerRecord], across: Axis) -> list[Markup]:
    """Ticks where blocks begin, about seven at most."""
    starts: dict[int, int] = {}
    for index, layer in enumerate(layers):
        if number := re.search(r"\.(\d+)\.", layer.name):
            starts.setdefault(int(number[1]), index)
    stride = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if len(starts) <= 7 * step)
    return [
        text(across.place(index), _DAMPING_BOTTOM + 18, str(block), anchor="middle")
        for block, index in starts.items()
        if block % stride == 0
    ]
