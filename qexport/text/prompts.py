"""Prompts that both models continue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qexport.errors import InputError
from qexport.text.json_lines import read_json_lines


@dataclass(frozen=True)
class Prompt:
    """A prompt with a name of its own."""

    id: str
    prompt: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file: `id` and `prompt` in each line, other fields are passed over.

    Raises:
        InputError: the file cannot be read or is empty, a field is missing, blank or no text, or an id comes twice.
    """
    prompts: dict[str, Prompt] = {}
    for where, row in read_json_lines(path):
        for field in ("id", "prompt"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise InputError(f"each prompt needs the field {field!r}, a text that is not blank", where=where)
        if row["id"] in prompts:
            raise InputError(f"the id {row['id']!r} comes twice", where=where, mend="give each prompt an id of its own")
        prompts[row["id"]] = Prompt(row["id"], row["prompt"])
    if not prompts:
        raise InputError("there are no prompts in it", where=str(path))
    return list(prompts.values())
