"""Where the names of a chart's points go, so that none covers another name or a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

CHARACTER: Final = 7.6
"""The width of a character in units of a chart, at most on average, on a narrow page whose text is larger."""

HEIGHT: Final = 17.0
"""Of a line of text, likewise."""

_ASIDE: Final = 10.0
"""From a point to its name."""

_ROWS: Final = 14
"""Lines above and below a point that are tried."""


@dataclass(frozen=True)
class LabelPlace:
    """The place of a name.

    Attributes:
        x: of its anchor.
        y: of its baseline.
        anchor: `start` to the right of the point, `end` to its left.
        leads: whether it is so far away that a line must lead to it.
    """

    x: float
    y: float
    anchor: str
    leads: bool


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: _Box) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > 0 and min(self.bottom, other.bottom) > max(self.top, other.top)

    def inside(self, other: _Box) -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


def label_places(
    points: Sequence[tuple[float, float]],
    lengths: Sequence[int],
    *,
    left: float,
    right: float,
    top: float,
    bottom: float,
    radius: float,
) -> list[LabelPlace]:
    """The nearest free place for each name; where there is none, the first one.

    Args:
        points: in units of the chart.
        lengths: characters of each name.
        left: where names may be, as the others.
        right: likewise.
        top: likewise.
        bottom: likewise.
        radius: of the points.
    """
    bounds, found = _Box(left, top, right, bottom), list[LabelPlace]()
    taken = [_Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    for (x, y), length in zip(points, lengths, strict=True):
        tried = list(_tried(x, y, (left + right) / 2))
        free = (
            each for each in tried if (box := _box(each, length)).inside(bounds) and not any(map(box.touches, taken))
        )
        found.append(next(free, tried[0]))
        taken.append(_box(found[-1], length))
    return found


def _tried(x: float, y: float, middle: float) -> Iterator[LabelPlace]:
    """The places beside a point, the nearest first: on the side with more room, then on the other."""
    sides = (("end", x - _ASIDE), ("start", x + _ASIDE))
    for row in range(_ROWS):
        for baseline in (y - 9 - row * HEIGHT, y + 18 + row * HEIGHT):
            for anchor, at in sides if x > middle else sides[::-1]:
                yield LabelPlace(at, baseline, anchor, leads=row > 0)


def _box(place: LabelPlace, length: int) -> _Box:
    width = length * CHARACTER
    left = place.x - width if place.anchor == "end" else place.x
    return _Box(left, place.y - HEIGHT + 4, left + width, place.y + 4)
