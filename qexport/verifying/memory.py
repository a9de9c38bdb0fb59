"""Whether models fit in memory: whole, as they are stored, or only block by block."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch

from qexport.architectures.runner import BlockRunner
from qexport.architectures.structure import Structure
from qexport.reading.stored_model import StoredModel

HEADROOM: Final = 1.25
"""For the activations, the key-value cache, and memory that the allocator cannot reuse."""


Way = Literal["whole", "drafted", "blocks"]
"""How prompts are continued: by whole models; block by block, while the artifact is in memory as it is stored and
drafts; or block by block alone."""


def choose_way(reference: BlockRunner, artifact: StoredModel, available: float) -> Way:
    """The way that takes the fewest passes over the blocks and fits in memory.

    Args:
        reference: the merged model.
        artifact: the artifact.
        available: from `available_memory`.
    """
    if needed_memory(reference) <= available:
        return "whole"
    return "drafted" if drafting_memory(reference, artifact) <= available else "blocks"


def needed_memory(runner: BlockRunner) -> int:
    """Bytes that `BlockRunner.whole` and a short generation take, roughly."""
    return int((bytes_in_memory(runner.structure, runner.dtype) + _head(runner.structure)) * HEADROOM)


def drafting_memory(reference: BlockRunner, artifact: StoredModel) -> int:
    """Bytes that the artifact as it is stored and a short generation take, and the reference block by block beside it,
    roughly.
    """
    structure, sizes = reference.structure, {"outside": 0}
    for name, shape in structure.parameters.items():
        block = structure.block_of(name) or "outside"
        sizes[block] = sizes.get(block, 0) + math.prod(shape) * reference.dtype.itemsize
    beside = sizes.pop("outside") + max(sizes.values())
    stored = loaded_bytes(artifact, structure, reference.dtype)
    return int((stored + beside + 2 * _head(structure)) * HEADROOM)


def loaded_bytes(artifact: StoredModel, structure: Structure, dtype: torch.dtype) -> int:
    """Bytes of `StoredModel.model`, which dequantizes the experts of a mixture, whose structure this is."""
    if any(linear.expert for linear in structure.block_linears):
        return bytes_in_memory(structure, dtype)
    return sum((artifact.folder / name).stat().st_size for name in artifact.files)


def cache_memory(runner: BlockRunner, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, at most."""
    config = runner.architecture.parsed.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * kept
    return int(2 * len(runner.structure.blocks) * width * tokens * runner.dtype.itemsize)


def _head(structure: Structure) -> int:
    """Bytes of the output head's weight in float32."""
    head = structure.parameters[f"{structure.embedding if structure.tied else structure.head}.weight"]
    return math.prod(head) * torch.float32.itemsize


def bytes_in_memory(structure: Structure, dtype: torch.dtype) -> int:
    """Bytes of the weights of an unquantized model."""
    return sum(math.prod(shape) for shape in structure.parameters.values()) * dtype.itemsize
