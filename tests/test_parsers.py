"""Arbitrary and damaged bytes give every parser an error of qexport's, or a value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parsers import Parser, parsers

NAMES = (
    "safetensors", "index", "gguf", "recipe", "gates", "config", "adapter config", "manifest", "report", "graph",
    "documents", "format prompts", "requests", "prompts", "archive", "reference",
)  # fmt: skip
PIECES = st.sampled_from(
    [
        b"",
        b"\0",
        b"\xff",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b'"\\ud800"',
        b"[[[[",
        b"9" * 40,
        b"\n",
    ]
)
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), PIECES | st.binary(max_size=6)), min_size=1, max_size=4
)


BOUNDS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def all_parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return parsers(tmp_path_factory.mktemp("seeds"))


def test_each_parser_is_named(all_parsers: dict[str, Parser]) -> None:
    assert tuple(all_parsers) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(BOUNDS, max_examples=30)
@given(seed=st.integers(0, 9), changes=CHANGES)
def test_damaged_bytes(
    name: str, seed: int, changes: list[tuple[float, int, bytes]], all_parsers: dict[str, Parser], tmp_path: Path
) -> None:
    parser = all_parsers[name]
    content = parser.seeds[seed % len(parser.seeds)]
    for share, length, piece in changes:
        place = int(share * len(content))
        content = content[:place] + piece + content[place + length :]
    parser(content, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@settings(BOUNDS, max_examples=10)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_arbitrary_bytes(name: str, content: bytes, all_parsers: dict[str, Parser], tmp_path: Path) -> None:
    all_parsers[name](content, tmp_path)
