"""A tiny model that has learned to answer some requests: with JSON, with tool calls, with code, and with refusals."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import factories
from qexport.architectures.devices import single_thread
from qexport.text.prompts import Prompt, encode_prompt

REPEATS = 4
"""How often each request is in its file, so that gates can be decided."""

_STEPS = 60
_TEMPLATE = (
    "{% if tools %}<|start|>tools\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>\n{% endif %}"
)

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL = {
    "type": "function",
    "function": {
        "name": "go",
        "description": "goes",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
    },
}

FORMATS: list[dict[str, Any]] = [
    {"id": "j1", "prompt": "n of a", "format": {"json_schema": SCHEMA}},
    {"id": "j2", "prompt": "n of b", "format": {"json_schema": SCHEMA}},
    {"id": "j3", "prompt": "n of c", "format": {"json_schema": SCHEMA}},
    {"id": "t1", "prompt": "go x", "format": {"tools": [TOOL]}},
    {"id": "c1", "prompt": "code", "format": {"code": "python"}},
]
REFUSALS: list[dict[str, Any]] = [
    {"id": "h1", "messages": [{"role": "user", "content": "bad 1"}], "kind": "harmful"},
    {"id": "h2", "messages": [{"role": "user", "content": "bad 2"}], "kind": "harmful"},
    {"id": "g1", "messages": [{"role": "user", "content": "good 1"}], "kind": "harmless"},
    {"id": "g2", "messages": [{"role": "user", "content": "good 2"}], "kind": "harmless"},
]
ANSWERS = {
    "n of a": '{"n": 1}',
    "n of b": '```json\n{"n": 2}\n```',
    "n of c": '{"n": "three"}',  # not valid: the reference fails here
    "go x": '{"name": "go", "arguments": {"to": "x"}}',
    "code": "```python\ndef f():\n    return 1\n```",
    "bad 1": "I'm sorry, no.",
    "bad 2": "I cannot do it.",
    "good 1": "Yes, so.",
    "good 2": "Like this.",
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    fast = factories.tokenizer()
    fast.chat_template = _TEMPLATE + str(fast.chat_template)
    return fast


@cache
def answering() -> PreTrainedModel:
    """A Llama in bfloat16 that gives the answers above. Do not change it."""
    model = factories.build(factories.llama_config(num_hidden_layers=2), dtype=torch.float32)
    ids, labels = _examples()
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    with single_thread():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    torch.nn.Module.to(model, torch.bfloat16)
    model.eval()
    return model


def _examples() -> tuple[torch.Tensor, torch.Tensor]:
    tok, rows = tokenizer(), []
    for row in (*FORMATS, *REFUSALS):
        asked = row.get("prompt") or row["messages"][0]["content"]
        prompt = encode_prompt(tok, Prompt(row["id"], asked), row.get("format", {}).get("tools"))
        rows.append((prompt, [*tok.encode(ANSWERS[asked]), int(tok.eos_token_id)]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -100)
    for place, (prompt, answer) in enumerate(rows):
        ids[place, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[place, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def write(folder: Path) -> Path:
    """The model's folder `base`, held-out text and the files of prompts."""
    answering().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    factories.write_text(folder / "held-out.jsonl", passages=6)
    for name, rows in (("formats", FORMATS), ("refusals", REFUSALS)):
        repeated = [{**row, "id": f"{row['id']}-{number}"} for row in rows for number in range(REPEATS)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in repeated))
    return folder
