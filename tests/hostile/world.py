"""A sound model, adapter, texts, recipe, GGUF file and artifacts, which every case gets a copy of and spoils."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import factories
from adapters import save_adapter
from qexport.cli import main

Spoil = Callable[[Path], object]

RECIPE: dict[str, Any] = {
    "load": {"base": "base", "adapter": "adapter"},
    "quantize": {"method": "nf4"},
    "export": [{"layout": "safetensors"}],
    "output": "out",
}

GATES = "profile: off\n"

VERIFY: dict[str, Any] = {
    "text": "held-out.jsonl",
    "windows": 6,
    "max_windows": 6,
    "sequence_length": 16,
    "profile": "off",
    "prompts": "prompts.jsonl",
    "max_new_tokens": 2,
    "gates": {"kl_over_base": None, "kl_over_rtn": None},
}


def make(folder: Path) -> Path:
    """Makes all of it, and a finished artifact in `artifact`, with a report."""
    model = factories.build(factories.llama_config())
    factories.save(model, folder / "base")
    save_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), folder / "adapter", spread=0.01)
    factories.write_text(folder / "text.jsonl")
    factories.write_text(folder / "held-out.jsonl", seed=1)
    write_lines(folder / "prompts.jsonl", [{"id": "a", "prompt": "hello"}])
    (folder / "gates.yaml").write_text(GATES)
    write_recipe(folder / "r.yaml", RECIPE)
    here = Path.cwd()
    os.chdir(folder)
    try:
        write_recipe(folder / "v.yaml", RECIPE | {"verify": VERIFY})
        assert main(["run", "v.yaml", "output=artifact"]) == 0
        write_recipe(folder / "g.yaml", GPTQ)
    finally:
        os.chdir(here)
    return folder


CALIBRATION = {"source": "text.jsonl", "samples": 2, "sequence_length": 16, "chat_template": True}
GPTQ = RECIPE | {"quantize": {"method": "gptq", "group_size": 16, "calibration": CALIBRATION}}


def write_recipe(path: Path, recipe: Any) -> None:
    path.write_text(json.dumps(recipe), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def content(name: str, value: bytes | str) -> Spoil:
    """Another content for a file."""
    return lambda world: (world / name).write_bytes(value if isinstance(value, bytes) else value.encode())


def changed_json(name: str, *path: str, **values: Any) -> Spoil:
    """Other values in a JSON file, below the keys of `path`; None stands for null, `...` removes the key."""

    def spoil(world: Path) -> None:
        whole = json.loads((world / name).read_text())
        inner = whole
        for key in path:
            inner = inner.setdefault(key, {})
        for key, value in values.items():
            if value is ...:
                inner.pop(key, None)
            else:
                inner[key] = value
        (world / name).write_text(json.dumps(whole))

    return spoil


def cut(name: str, share: float) -> Spoil:
    """Only the beginning of a file."""

    def spoil(world: Path) -> None:
        whole = (world / name).read_bytes()
        (world / name).write_bytes(whole[: int(len(whole) * share)])

    return spoil


def header(name: str, value: Any, data: bytes = b"", *, length: int | None = None) -> Spoil:
    """A safetensors file with any header."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return content(name, struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """A tensor in such a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """A safetensors file with other tensors."""

    def spoil(world: Path) -> None:
        found = load_file(world / name)
        change(found)
        save_file(found, world / name, metadata={"format": "pt"})

    return spoil


def all_of(*spoils: Spoil) -> Spoil:
    return lambda world: [spoil(world) for spoil in spoils]
