"""SHA-256 of files, bytes, tensors and JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def sha256_bytes(content: bytes | memoryview) -> str:
    """The hex digest of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """The hex digest of a file, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_chunks(chunks: Iterable[memoryview]) -> str:
    """The hex digest of bytes that come in pieces."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The hex digest of a JSON value, whatever the order of its keys.

    Raises:
        ValueError: the value holds NaN or Inf.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return sha256_bytes(text.encode("ascii"))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
