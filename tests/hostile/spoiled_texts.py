"""Texts for calibration and verification, and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cases import GPTQ, RUN, VERIFYING, Case, verifying
from world import content


def texts() -> Iterator[Case]:
    lines: dict[str, bytes] = {
        "empty": b"", "blank lines": b"\n" * 100_000, "no JSON": b"{\n", "a list": b"[]\n", "binary": bytes(range(256)), "deep": b"[" * 90_000 + b"\n", "no text": b'{"a": 1}\n',
        "a number": b'{"text": 1}\n', "a surrogate": b'{"text": "\\ud800"}\n', "messages of text": b'{"messages": "x"}\n', "messages of numbers": b'{"messages": [1]}\n', "no role": b'{"messages": [{"content": "a"}]}\n',
        "no content": b'{"messages": [{"role": "user"}]}\n', "too little": b'{"text": "a"}\n', "a key twice": b'{"text": "a", "text": "b"}\n', "NUL": b"\0" * 1000, "a long line": b'{"text": "' + b"a" * (70 << 20) + b'"}\n',
        "a long number": b'{"text": ' + b"9" * 10_000 + b"}\n", "a domain of numbers": b'{"text": "a", "domain": 3}\n',
    }  # fmt: skip
    for case, value in lines.items():
        yield Case(f"calibration: {case}", content("text.jsonl", value), GPTQ, 3)
        yield Case(f"held-out: {case}", content("held-out.jsonl", value), VERIFYING, 3)
    prompts: dict[str, list[Any]] = {
        "none": [], "no id": [{"prompt": "a"}], "an id twice": [{"id": "a", "prompt": "x"}] * 2, "an id of numbers": [{"id": 1, "prompt": "x"}], "a prompt of numbers": [{"id": "a", "prompt": 1}],
        "both": [{"id": "a", "prompt": "x", "messages": []}], "no messages": [{"id": "a", "messages": []}], "ends with the assistant": [{"id": "a", "messages": [{"role": "assistant", "content": "x"}]}],
        "a style of nonsense": [{"id": "a", "prompt": "x", "style": "odd"}], "a lonely pair": [{"id": "a", "prompt": "x", "pair": "p"}], "a style that is a list": [{"id": "a", "prompt": "x", "style": []}],
        "a list": [[]], "null": [None], "a surrogate": [{"id": "a", "prompt": "\ud800"}], "a pair of numbers": [{"id": "a", "prompt": "x", "pair": 3}], "a role of numbers": [{"id": "a", "messages": [{"role": 1, "content": "x"}]}],
    }  # fmt: skip
    for case, rows in prompts.items():
        content_of = "".join(json.dumps(row) + "\n" for row in rows)
        yield Case(f"prompts: {case}", content("prompts.jsonl", content_of), VERIFYING, 3)
    for name in ("nowhere.jsonl", "base", "r.yaml", "x" * 300 + ".jsonl"):
        yield Case(f"a text called {name[:15]!r}", verifying(text=name), RUN, 3)
    yield Case("a text with a NUL", verifying(text="a\0b.jsonl"), RUN, 2, "is not a path")
