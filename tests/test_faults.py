"""A fault at 50 operations of runs: what is at the final path is whole, and the same command ends what was begun.

`make test-faults` goes through thousands of them. The second half plants mistakes and sees that they are found.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.points import Case, Harness, Kind, Point, not_durable, spread

NEW = Case("none", "safetensors")
FORCED = Case("none", "safetensors", old="artifact")
FORCED_APART = Case("none", "safetensors", old="artifact", exchange=False)
FOREIGN = Case("none", "safetensors", old="folder")
FOREIGN_APART = Case("none", "safetensors", old="folder", exchange=False)

WHOLE_RUNS: list[tuple[Case, Kind, int]] = [
    (NEW, "kill", 7), (NEW, "torn write", 3), (NEW, "full disk", 4), (NEW, "disk error", 5),
    (Case("gptq", "safetensors"), "kill", 2), (Case("nf4", "tgi"), "kill", 2), (Case("w8a8", "vllm"), "kill", 2),
]  # fmt: skip
"""Case, fault, and how many points of the whole run."""

ENDINGS: list[tuple[Case, Kind, int]] = [
    (NEW, "kill", 3), (FORCED, "kill", 4), (FORCED, "disk error", 2), (FORCED_APART, "kill", 5),
    (FORCED_APART, "disk error", 3), (FOREIGN, "kill", 3), (FOREIGN_APART, "kill", 5),
]  # fmt: skip
"""The same, of the part from just before the first rename to the end."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    found = Harness(tmp_path_factory.mktemp("faults"))
    yield found
    found.close()


def ending(harness: Harness, case: Case, kind: Kind, wanted: int) -> list[Point]:
    first = harness.publishing(case, kind) - 2
    return [Point(case, kind, number) for number in spread(first, harness.counted(case, kind), wanted)]


def test_after_any_fault_the_run_can_be_repeated(harness: Harness) -> None:
    points = [
        Point(case, kind, number)
        for case, kind, wanted in WHOLE_RUNS
        for number in spread(1, harness.counted(case, kind), wanted)
    ]
    for case, kind, wanted in ENDINGS:
        points += ending(harness, case, kind, wanted)
    assert len(points) == 50
    assert [problem for point in points for problem in harness.problems(point)] == []


def test_an_error_of_the_disk_while_onnx_runtime_reads_is_one_of_the_disk(harness: Harness) -> None:
    """It opens the weights by itself, once for each tensor, after everything else has read them."""
    case = Case("none", "onnx")
    operations = [each for each in harness.operations(case)[1] if each.counts("disk error")]
    opened = [
        number
        for number, each in enumerate(operations, 1)
        if each.name == "open" and each.path.endswith((".onnx", ".onnx.data"))
    ]
    assert len(opened) > 50
    points = [Point(case, "disk error", opened[index]) for index in spread(0, len(opened) - 1, 6)]
    assert [problem for point in points for problem in harness.problems(point)] == []


@pytest.mark.parametrize("case", [NEW, FORCED, FOREIGN_APART], ids=["new", "forced", "in two steps"])
def test_everything_published_is_on_the_disk_before(harness: Harness, case: Case) -> None:
    output, operations = harness.operations(case)
    assert len(operations) > 50
    assert not_durable(output, operations) == []


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        ("files_are_not_synced", "model.safetensors is not on the disk before it is published"),
        ("the_new_names_are_not_synced", "the artifact's name is not on the disk"),
        ("new_parents_are_not_synced", "a name in"),
    ],
)
def test_a_missing_sync_is_found(harness: Harness, plant: str, expected: str) -> None:
    output, operations = harness.operations(NEW, plant)
    assert any(expected in problem for problem in not_durable(output, operations))


@pytest.mark.parametrize(
    ("plant", "case", "kind", "expected"),
    [
        ("the_manifest_is_written_after_publishing", NEW, "kill", "what stands at the final path"),
        ("the_marker_is_removed_after_the_rename", NEW, "kill", "differs in ['.qexport-partial']"),
        ("the_folder_is_copied", NEW, "kill", "what stands at the final path"),
        ("what_is_replaced_is_not_marked", FOREIGN, "kill", "not qexport's"),
        ("an_exchange_is_two_renames", FORCED, "kill", "neither the old folder nor the new one"),
        ("what_is_finished_is_made_anew", NEW, "kill", "makes anew what was finished"),
        ("what_lies_aside_is_forgotten", FORCED_APART, "kill", "it leaves ['out', 'out.replaced', 'out.sha256']"),
        ("an_error_of_the_disk_is_a_defect", NEW, "disk error", "it ends with 1"),
    ],
)
def test_a_mistake_in_publishing_is_found(harness: Harness, plant: str, case: Case, kind: Kind, expected: str) -> None:
    """At one of the operations around the first rename that publishes."""
    middle = harness.publishing(case, kind)
    for number in sorted(range(middle - 4, middle + 8), key=lambda number: abs(number - middle - 1)):
        problems = harness.problems(Point(case, kind, number), plant=plant)
        if any(expected in problem for problem in problems):
            return
    raise AssertionError(f"nothing was found but {problems}")
