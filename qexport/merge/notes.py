"""What a merge does not refuse but a user should know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qexport.tensors.checkpoint import Checkpoint

_QUANTIZATION = re.compile(r"[.-](i?q\d\w*|bf16|f16|f32)$", re.IGNORECASE)


def other_base(config: Mapping[str, Any], base_name: str) -> str | None:
    """Says so where an adapter names no base, or another one than the base's origin. Only last components count."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return "the adapter does not say for which base model it was made"
    if _plain_name(named) == _plain_name(base_name):
        return None
    return f"the adapter was made for {_last_component(named)}, the base is {_last_component(base_name)}"


def other_files(adapter: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """Tells of tokenizer files beside the adapter that differ from the base's, which are the ones that travel on."""
    for name, content in checkpoint.files.items():
        beside = adapter / name
        if beside.is_file() and beside.read_bytes() != content:
            yield f"the adapter's folder has another {name} than the base; the base's is used"


def _plain_name(name: str) -> str:
    """`pkg/SmolLM2-135M-Instruct.Q4_1.gguf` and `HuggingFaceTB/SmolLM2-135M-Instruct` are the same model."""
    return _QUANTIZATION.sub("", _last_component(name).lower().removesuffix(".gguf"))


def _last_component(name: str) -> str:
    parts = PurePosixPath(name.replace("\\", "/").rstrip("/")).parts
    cached = [part for part in parts if part.startswith("models--")]
    if cached:  # a snapshot in the hub's cache: .../models--org--name/snapshots/commit
        return cached[-1].rpartition("--")[2]
    return parts[-1] if parts else name
