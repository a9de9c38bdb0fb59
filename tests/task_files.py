"""Task files for the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs/tasks.md"


def from_the_page(folder: Path) -> Path:
    """The example of docs/tasks.md, as a reader would write it."""
    text = PAGE.read_text(encoding="utf-8")
    task = folder / "harbour.yaml"
    for language, file in (("yaml", task), ("json", folder / "harbour.jsonl")):
        block = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
        assert block
        file.write_text(block[1], encoding="utf-8")
    return task


def write_task(folder: Path, rows: list[dict[str, Any]], text: str, *, name: str = "local") -> Path:
    """A task file with the rows as its split `test`; `text` holds the fields beyond the data."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / f"{name}.yaml"
    head = (
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\ntest_split: test\n"
    )
    path.write_text(head + text, encoding="utf-8")
    return path


CHOICE = """
output_type: multiple_choice
doc_to_text: "{{ question }}"
doc_to_choice: "{{ choices }}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""

GENERATION = """
output_type: generate_until
doc_to_text: "{{ question }}"
doc_to_target: "{{ answer }}"
generation_kwargs:
  until: ["|"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
