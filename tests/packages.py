"""Release folders for tests: what `qexport.registries` moves needs no model, only files and their listing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path

from qexport.registries import Attachment, Package

REPORT = Attachment("report/report.json", "application/json", "application/vnd.example.report")
SIGNATURE = Attachment("model.sig", "application/json", "application/vnd.example.signature")


def make_release(folder: Path, *, weights: int = 3_000_123, seed: int = 0, also: Mapping[str, bytes] = {}) -> Package:
    """A release with so many bytes of weights, which do not repeat."""
    noise = random.Random(seed)
    files = {
        "model-00001-of-00002.safetensors": noise.randbytes(weights),
        "model-00002-of-00002.safetensors": noise.randbytes(weights // 3),
        "config.json": b"{}",
        "README.md": b"# A model\n",
        "launch/docker-run.sh": b"#!/bin/sh\n",
        "tokenizer/" + "long-" * 30 + "é.json": b"{}",
        "empty.txt": b"",
        REPORT.path: b'{"verdict": "passed"}',
        SIGNATURE.path: b'{"signature": "..."}',
        **also,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listed = {name: content for name, content in files.items() if name != SIGNATURE.path}  # it covers the listing
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(listed.items()))
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    return Package(
        folder, "notes", "1.4.0", "safetensors", "llama", "float16", "gptq", 134_515_008, ("Apache-2.0",),
        (REPORT, SIGNATURE),
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
