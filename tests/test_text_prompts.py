"""Prompts from JSON lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from qexport.errors import InputError
from qexport.text.prompts import Prompt, read_prompts


def test_prompts_are_read_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "b", "prompt": "Two", "domain": "x"}\n{"id": "a", "prompt": "One"}\n', encoding="utf-8")
    assert read_prompts(path) == [Prompt("b", "Two"), Prompt("a", "One")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', r"'a' comes twice\n.*prompts\.jsonl:2"),
        ('{"prompt": "x"}', "needs the field 'id'"),
        ('{"id": "a", "prompt": " "}', "needs the field 'prompt'"),
        ('{"id": "a", "prompt": 3}', "needs the field 'prompt'"),
        ("", "no prompts"),
    ],
)
def test_a_faulty_prompt_is_told_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_prompts(path)
