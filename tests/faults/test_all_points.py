"""Faults at operations all over a run, for every method and layout: at least 2,000 points, see `make test-faults`.

All operations from the first that publishes to the last are met, and of those before them so many at equal distances.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from artifact_cases import LAYOUTS
from faults.points import KINDS, Case, Harness, Kind, Old, Point, spread

METHODS = ("gptq", "nf4", "int8", "w8a8", "none")
OLD: tuple[Old, ...] = ("artifact", "folder")
RECORD = json.loads((Path(__file__).parents[1] / "artifact_bytes.json").read_text(encoding="ascii"))["artifacts"]
WANTED: dict[Kind, int] = {"kill": 24, "torn write": 4, "full disk": 6, "disk error": 12}
"""Points before the first rename."""


def carries(layout: str, method: str) -> bool:
    """Whether the layout can hold the method's codes; shards are as whole files in that."""
    return "refused" not in RECORD[f"llama, {method}"][layout.removesuffix(" shards")]


def cases() -> Iterator[tuple[Case, Kind]]:
    layouts = [each for each in LAYOUTS if not each.startswith("onnx ") and each not in ("tgi shards", "vllm shards")]
    plain = [Case(method, layout) for method, layout in product(METHODS, layouts) if carries(layout, method)]
    yield from product(plain, KINDS)
    old = [
        Case("none", layout, old=old, exchange=exchange)
        for layout, old, exchange in product(("safetensors", "shared"), OLD, (True, False))
    ]
    yield from product(old, KINDS)
    measured = [Case("none", "safetensors", verified=True)]
    measured += [Case("none", "safetensors", old="rejected", exchange=exchange) for exchange in (True, False)]
    yield from product(measured, ("kill", "disk error"))


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    found = Harness(tmp_path_factory.mktemp("faults"))
    yield found
    found.close()


def points(harness: Harness, case: Case, kind: Kind) -> list[Point]:
    """Torn writes come before the first rename only."""
    total = harness.counted(case, kind)
    publishing = total + 1 if kind == "torn write" else harness.publishing(case, kind) - 2
    wanted = WANTED[kind] if case.old == "nothing" and not case.verified else WANTED[kind] // 4
    numbers = [*spread(1, publishing - 1, wanted), *range(publishing, total + 1)]
    return [Point(case, kind, number) for number in numbers]


def run(case: Case) -> str:
    """The method, what is replaced and how, and whether the artifact is measured."""
    parts = [case.method, *([] if case.old == "nothing" else [f"over {case.old}"])]
    parts += [*([] if case.exchange else ["in two steps"]), *(["measured"] if case.verified else [])]
    return ", ".join(parts)


def name(case: Case, kind: Kind) -> str:
    return f"{run(case)}, {case.layout}, {kind}"


@pytest.mark.parametrize(("case", "kind"), [pytest.param(*each, id=name(*each)) for each in cases()])
def test_after_any_fault_the_run_can_be_repeated(
    harness: Harness, case: Case, kind: Kind, record_property: Callable[[str, object], None]
) -> None:
    chosen = points(harness, case, kind)
    record_property("points", [run(case), case.layout, kind, len(chosen)])
    assert [problem for point in chosen for problem in harness.problems(point)] == []
