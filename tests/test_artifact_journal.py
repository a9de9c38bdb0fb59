"""The file of a journal: what is read back after any kill and any damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qexport.artifact.journal import Entry, Journal, refuse_other_run
from qexport.errors import RecipeError

RECORDS: list[tuple[str, dict[str, Any]]] = [
    ("run", {"identity": {"qexport": "1"}}),
    ("unit", {"tensors": [1, 2]}),
    ("look", {"text": 'a\n"b" \u2028é'}),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "journal").touch()
    return tmp_path / "journal"


def write(path: Path) -> list[Entry]:
    journal = Journal(path)
    for kind, content in RECORDS:
        journal.append(kind, content)
    return list(journal.entries)


def test_records_are_read_back_in_their_order(path: Path) -> None:
    written = write(path)
    assert Journal(path).entries == written == [Entry(kind, content) for kind, content in RECORDS]
    assert Journal(path).of_kind("unit") == [{"tensors": [1, 2]}]


def test_a_journal_without_records_is_an_empty_file(path: Path) -> None:
    assert Journal(path).entries == []
    write(path)
    Journal(path).clear()
    assert path.read_bytes() == b""


def test_a_torn_record_is_ignored_wherever_it_was_torn_and_the_next_one_takes_its_place(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        assert len(journal.entries) == sum(end <= size for end in ends)
        kind, content = RECORDS[len(journal.entries)]
        journal.append(kind, content)
        assert path.read_bytes() == whole[: ends[len(journal.entries) - 1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.tuples(st.integers(0, 10_000), st.integers(1, 255)))
def test_no_changed_byte_is_believed(path: Path, damage: tuple[int, int]) -> None:
    path.write_bytes(b"")
    written = write(path)
    content = bytearray(path.read_bytes())
    place = damage[0] % len(content)
    content[place] ^= damage[1]
    path.write_bytes(content)
    found = Journal(path).entries
    assert found == written[: content[:place].count(b"\n")]


@given(content=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_content_is_a_journal_without_records(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Journal(path).entries == []


def test_each_value_that_differs_is_named(path: Path) -> None:
    found = {"recipe": {"quantize": {"bits": 4}, "export": [{"layout": "tgi"}]}, "torch": "2.9"}
    refuse_other_run(found, found, path)
    own = {"recipe": {"quantize": {"bits": 3}, "export": [{"layout": "tgi"}, {"layout": "vllm"}]}, "torch": "2.9"}
    with pytest.raises(RecipeError, match="differs") as caught:
        refuse_other_run(found, own, path)
    assert "recipe.quantize.bits: was 4, is 3" in str(caught.value)
    assert "recipe.export.1.layout: was null, is vllm" in str(caught.value)
    assert "torch" not in str(caught.value)
    assert "--restart" in str(caught.value)
