"""The tests that `make quick` leaves out: each exists, and what is left still reaches every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import slow_tests

TESTS = Path(__file__).parent
ROOMS = sorted(path.stem for path in (TESTS.parent / "qexport").glob("[a-z]*") if path.suffix in ("", ".py"))


def functions(file: Path) -> set[str]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def quick_functions() -> dict[Path, set[str]]:
    slow = {name for _, name in slow_tests()}
    files = [path for path in sorted(TESTS.glob("test_*.py")) if path.name not in slow]
    return {path: {name for name in functions(path) if f"{path.name}::{name}" not in slow} for path in files}


def test_every_line_of_the_list_names_a_test_or_a_file_that_exists() -> None:
    files = [*TESTS.glob("test_*.py"), *TESTS.glob("hostile/test_*.py")]
    known = {str(path.relative_to(TESTS)): functions(path) for path in files}
    tests = {f"{file}::{function}" for file, found in known.items() for function in found}
    assert slow_tests()
    assert [name for _, name in slow_tests() if name not in known.keys() | tests] == []


def test_quick_tests_reach_every_room() -> None:
    """By the imports of the files that still have a quick test."""
    text = "".join(path.read_text(encoding="utf-8") for path, quick in quick_functions().items() if quick)
    reached = set(re.findall(r"^ *from qexport\.(\w+)", text, flags=re.MULTILINE))
    assert [room for room in ROOMS if room not in reached] == []
