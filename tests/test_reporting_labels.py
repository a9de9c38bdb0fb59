"""The names of a chart's points: where they go."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from qexport.reporting.labels import CHARACTER, HEIGHT, LabelPlace, label_places

LEFT, RIGHT, TOP, BOTTOM = 60.0, 480.0, 20.0, 250.0
POINTS = st.lists(
    st.tuples(st.floats(LEFT + 10, RIGHT - 20), st.floats(TOP + 10, BOTTOM - 10)), min_size=1, max_size=8, unique=True
)


def placed(points: list[tuple[float, float]], length: int = 10) -> list[LabelPlace]:
    return label_places(points, [length] * len(points), left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, radius=5.5)


def box(place: LabelPlace, length: int = 10) -> tuple[float, float, float, float]:
    left = place.x - length * CHARACTER if place.anchor == "end" else place.x
    return left, place.y + 4 - HEIGHT, left + length * CHARACTER, place.y + 4


def touch(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    across = min(one[2], other[2]) - max(one[0], other[0])
    return across > 1e-9 and min(one[3], other[3]) - max(one[1], other[1]) > 1e-9


def test_a_name_alone_is_beside_its_point() -> None:
    assert placed([(100, 100)]) == [LabelPlace(110, 91, "start", leads=False)]
    assert placed([(400, 100)]) == [LabelPlace(390, 91, "end", leads=False)]


def test_a_name_that_would_leave_the_chart_goes_below() -> None:
    assert placed([(100, TOP + 5)])[0].y == TOP + 5 + 18


@given(POINTS)
def test_no_name_covers_another_or_a_point(points: list[tuple[float, float]]) -> None:
    found = [box(place) for place in placed(points)]
    assert not [pair for pair in combinations(found, 2) if touch(*pair)]
    circles = [(x - 5.5, y - 5.5, x + 5.5, y + 5.5) for x, y in points]
    assert not [name for name in found if any(touch(name, circle) for circle in circles)]


def test_equal_points_have_their_names_one_below_the_other() -> None:
    found = placed([(100, 100)] * 4)
    assert len({(place.x, place.y) for place in found}) == 4
    assert not [pair for pair in combinations(map(box, found), 2) if touch(*pair)]


def test_a_chart_without_room_shows_every_name_all_the_same() -> None:
    assert placed([(100, 100)], length=200) == [LabelPlace(110, 91, "start", leads=False)]
